"""IR kernels around ``nn.linear`` and ``nn.gated_linear`` -> linear kernels, trailing operations in the epilogue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.elementwise import apply, compute_dtype, dim_value, lowers
from tilewright.codegen.mlir.linear import LinearBuffers, Place, emit_linear
from tilewright.codegen.mlir.linear_spec import LinearSpec
from tilewright.codegen.mlir.lower import compile_kernel
from tilewright.codegen.mlir.value import Val, constant
from tilewright.codegen.schedule import LinearSchedule, Schedule
from tilewright.codegen.target import CpuTarget
from tilewright.ir import Argument, CodegenError, Dim, Function, Op, Value, as_dim, ops, product, same_dim

_WEIGHTS = ("f32", "bf16", "f16", "i8")
_INPUTS = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class Pattern:
    """A kernel's linear layer, its operands by role, and the operations after it."""

    anchor: ops.Linear | ops.GatedLinear
    weights: tuple[Value, ...]
    scales: tuple[Value, ...]
    biases: tuple[Value, ...]
    tail: tuple[Op, ...]
    result: Value

    @property
    def rows(self) -> Dim:
        """M: how many rows of x there are."""
        return as_dim(product(self.anchor.x.shape[:-1]))

    def spec(self) -> LinearSpec:
        gated = isinstance(self.anchor, ops.GatedLinear)
        n, k = self.weights[0].shape
        act = self.anchor.act if isinstance(self.anchor, ops.GatedLinear) else None
        return LinearSpec(
            int(n),
            int(k),
            self.anchor.x.dtype.value,
            self.weights[0].dtype.value,
            self.result.dtype.value,
            self.biases[0].dtype.value if self.biases else None,
            act,
            gated,
        )


def find(kernel: Function) -> Pattern | str:
    """The pattern of ``kernel``, or why it has none."""
    anchors = [op for op in kernel.body if isinstance(op, (ops.Linear, ops.GatedLinear))]
    if len(anchors) != 1 or len(kernel.returns) != 1:
        return "not one linear layer with one result"
    anchor = anchors[0]
    assert isinstance(anchor, (ops.Linear, ops.GatedLinear))
    if isinstance(anchor, ops.Linear):
        roles = ((anchor.weight,), (), (anchor.bias,))
    else:
        roles = ((anchor.gate, anchor.up), (), (anchor.gate_bias, anchor.up_bias))
    weights, scales, biases = (tuple(v for v in role if v is not None) for role in roles)
    if len(biases) not in (0, len(weights)):
        return "only one of gate and up has a bias"
    given = {anchor.x, *weights, *scales, *biases}
    if not all(isinstance(v, Argument) for v in given):
        return "an operand of the linear layer is computed in the kernel"
    tail = tuple(op for op in kernel.body[:-1] if op is not anchor)
    pattern = Pattern(anchor, weights, scales, biases, tail, kernel.returns[0])
    return refusal(pattern) or pattern


def refusal(p: Pattern) -> str | None:
    """What of a pattern the kernels do not do."""
    n, k = p.weights[0].shape
    if not (isinstance(n, int) and isinstance(k, int)):
        return "the weight's shape is not static"
    if p.weights[0].dtype.value not in _WEIGHTS or p.anchor.x.dtype.value not in _INPUTS:
        return f"no kernel for x {p.anchor.x.dtype.value} and weight {p.weights[0].dtype.value}"
    if len({b.dtype for b in p.biases}) > 1:
        return "biases of two element types"
    for op in p.tail:
        if not (lowers(op) or isinstance(op, ops.Full)):
            return f"{op.name} does not run in the epilogue"
    return None


class LinearEmitter:
    """Linear layers, plain and gated, f32, bf16, f16 and weight-only i8, with elementwise epilogues."""

    name: ClassVar[str] = "mlir.linear"

    def match(self, kernel: Function, target: CpuTarget) -> str | None:
        found = find(kernel)
        return found if isinstance(found, str) else None

    def default_schedule(self, kernel: Function, target: CpuTarget) -> Schedule:
        return LinearSchedule.default(target)

    def emit(self, kernel: Function, schedule: Schedule, target: CpuTarget, symbol: str) -> KernelCode:
        found = find(kernel)
        if isinstance(found, str) or not isinstance(schedule, LinearSchedule):
            raise CodegenError(f"{self.name} cannot lower @{kernel.name} with {schedule}: {found}")
        spec, dims = found.spec(), tuple(kernel.symbols())
        pairs = [(f"a{i}", v.dtype.value) for i, v in enumerate(kernel.args)]
        with Kernel(symbol, target, dims, [*pairs, ("y", spec.out_dtype)]) as k:
            by_value: dict[Value, Buffer] = dict(zip(kernel.args, k.buffers))
            roles = [[by_value[v] for v in role] for role in (found.weights, found.scales, found.biases)]
            buffers = LinearBuffers(by_value[found.anchor.x], *roles, k.buffers[-1])
            epilogue = Epilogue(found, by_value) if found.tail else None
            emit_linear(k, spec, schedule, dim_value(found.rows, k.dims), buffers, epilogue)
        packing = spec.packing(schedule, target).text
        packed = {kernel.args.index(w): packing for w in found.weights}  # type: ignore[arg-type]
        tasks = spec.tasks(schedule, target, found.rows)
        return KernelCode(symbol, compile_kernel(k), dims, as_dim(tasks), packing=packed)


class Epilogue:
    """Runs the trailing operations on each vector of results."""

    def __init__(self, pattern: Pattern, buffers: dict[Value, Buffer]) -> None:
        self.pattern, self.buffers = pattern, buffers

    def __call__(self, value: Val, place: Place) -> Val:
        known: dict[Value, Val] = {self.pattern.anchor.result: value}
        for op in self.pattern.tail:
            if isinstance(op, ops.Full):
                known[op.result] = constant(op.value, compute_dtype(op.dtype), place.lanes)
            else:
                known[op.result] = apply(op, [self.operand(v, known, place) for v in op.operands])
        return known[self.pattern.result]

    def operand(self, value: Value, known: dict[Value, Val], place: Place) -> Val:
        if value in known:
            return known[value]
        buffer, wide = self.buffers[value], compute_dtype(value.dtype)
        n = self.pattern.weights[0].shape[0]
        last = value.shape[-1] if value.shape else 1
        if not same_dim(last, n):
            return buffer.load(constant(0)).to(wide).splat(place.lanes)
        if all(d == 1 for d in value.shape[:-1]) and value.shape != self.pattern.result.shape:
            return buffer.load(place.col, place.lanes, place.mask).to(wide)
        return buffer.load(place.row * int(n) + place.col, place.lanes, place.mask).to(wide)
