"""IR kernels around ``nn.linear`` and ``nn.gated_linear`` -> linear kernels, trailing operations in the epilogue."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.linear_pattern import Pattern, Tensor, find
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.elementwise import apply, compute_dtype, dim_value, lowers
from tilewright.codegen.mlir.linear import LinearBuffers, Place, emit_linear
from tilewright.codegen.mlir.linear_cost import linear_features, linear_space
from tilewright.codegen.mlir.linear_expand import largest_step
from tilewright.codegen.mlir.linear_lossless import Compressed
from tilewright.codegen.mlir.linear_sparse import Sparse, element
from tilewright.codegen.mlir.linear_spec import LinearSpec
from tilewright.codegen.mlir.lower import compile_kernel
from tilewright.codegen.mlir.value import Val, constant
from tilewright.codegen.packing import AnyPacking
from tilewright.codegen.schedule import LinearSchedule, Schedule, Space
from tilewright.codegen.target import CpuTarget
from tilewright.ir import CodegenError, Function, Value, as_dim, eval_dim, ops, same_dim


def spec_of(p: Pattern) -> LinearSpec:
    """What kernels compute for a pattern. Raises ValueError with what of the quantization they do not do."""
    weight = p.weights[0]
    scale = "f32" if weight.table is None else None
    return LinearSpec(
        p.features,
        p.depth,
        p.x.data.dtype.value,
        weight.data.dtype.value,
        p.result.dtype.value,
        p.biases[0].dtype.value if p.biases else None,
        p.activation,
        p.activation is not None,
        p.depth // weight.groups if weight.groups > 1 else 0,
        weight.scale.dtype.value if weight.scale else scale,
        compressed=bool(weight.compressed),
        table=weight.table.dtype.value if weight.table else None,
        row_tables=weight.table is not None and weight.table.shape[0] != 1,
        offset=weight.offset is not None,
        expands=p.depth // int(weight.step.shape[-1]) if weight.step else 0,
        sparse=weight.sparse.layout if weight.sparse else None,
        kept=kept(weight.sparse) if weight.sparse else 1.0,
    )


def kept(op: ops.SparseExpand) -> float:
    """The share of a weight's numbers that is stored."""
    return int(op.values.shape[0]) * op.layout.stored.bits / (op.rows * op.columns * op.dtype.bits)


def refusal(p: Pattern) -> str | None:
    """What of a pattern the kernels do not do."""
    for op in p.tail:
        if not (lowers(op) or isinstance(op, ops.Full)):
            return f"{op.name} does not run in the epilogue"
    try:
        spec_of(p)
    except ValueError as error:
        return str(error)
    return None


class LinearEmitter:
    """Linear layers, plain and gated, of floats or of quantized weights and activations, with elementwise epilogues."""

    name: ClassVar[str] = "mlir.linear"

    def match(self, kernel: Function, target: CpuTarget) -> str | None:
        found = find(kernel, refusal)
        return found if isinstance(found, str) else None

    def default_schedule(self, kernel: Function, target: CpuTarget) -> Schedule:
        found = find(kernel, refusal)
        return LinearSchedule.default(target) if isinstance(found, str) else spec_of(found).schedule(target)

    def space(self, kernel: Function, target: CpuTarget, sizes: Mapping[str, int]) -> Space:
        found = matched(kernel)
        return linear_space(spec_of(found), target, eval_dim(found.rows, sizes))

    def layouts(self, kernel: Function, target: CpuTarget) -> Callable[[Schedule], Mapping[int, str]]:
        found = matched(kernel)
        spec = spec_of(found)
        return lambda schedule: _texts(kernel, packings(found, spec, schedule, target))  # type: ignore[arg-type]

    def features(self, kernel: Function, target: CpuTarget, sizes: Mapping[str, int]
                 ) -> Callable[[Schedule], dict[str, float]]:  # fmt: skip
        found = matched(kernel)
        return linear_features(spec_of(found), target, eval_dim(found.rows, sizes), len(found.tail))

    def emit(self, kernel: Function, schedule: Schedule, target: CpuTarget, symbol: str) -> KernelCode:
        found = find(kernel, refusal)
        if isinstance(found, str) or not isinstance(schedule, LinearSchedule):
            raise CodegenError(f"{self.name} cannot lower @{kernel.name} with {schedule}: {found}")
        spec, dims = spec_of(found), tuple(kernel.symbols())
        packed = packings(found, spec, schedule, target)
        pairs = [(f"a{i}", packed[v].stored if v in packed else element(v.dtype)) for i, v in enumerate(kernel.args)]
        with Kernel(symbol, target, dims, [*pairs, ("y", spec.out_dtype)]) as k:
            by_value: dict[Value, Buffer] = dict(zip(kernel.args, k.buffers))
            buffers = roles(found, by_value, k.buffers[-1])
            epilogue = Epilogue(found, by_value) if found.tail else None
            emit_linear(k, spec, schedule, dim_value(found.rows, k.dims), buffers, epilogue)
        tasks = spec.tasks(schedule, target, found.rows)
        return KernelCode(symbol, compile_kernel(k), dims, as_dim(tasks), packing=_texts(kernel, packed))


def matched(kernel: Function) -> Pattern:
    """The pattern of a kernel that ``match`` accepts."""
    found = find(kernel, refusal)
    if isinstance(found, str):
        raise CodegenError(f"@{kernel.name} is no linear kernel: {found}")
    return found


def _texts(kernel: Function, packed: Mapping[Value, AnyPacking]) -> dict[int, str]:
    return {kernel.args.index(v): packing.text for v, packing in packed.items()}  # type: ignore[arg-type]


def packings(found: Pattern, spec: LinearSpec, schedule: LinearSchedule, target: CpuTarget) -> dict[Value, AnyPacking]:
    """The layouts in which weights and what belongs to them must come."""
    layouts: dict[Value, AnyPacking] = {}
    for weight in (w for w in found.weights if not w.compressed):
        if not weight.sparse:
            layouts[weight.data] = spec.packing(schedule, target)
        for value in (weight.scale, weight.zero, weight.offset):
            if value is not None and (value is weight.scale or not spec.expands):
                layouts[value] = spec.group_packing(value.dtype.value, schedule, target)
        if weight.step is not None:
            layouts[weight.step] = spec.step_packing(schedule, target, largest_step(spec.weight))
            layouts |= {weight.zero: spec.step_packing(schedule, target)} if weight.zero is not None else {}
    return layouts


def roles(found: Pattern, buffers: dict[Value, Buffer], y: Buffer) -> LinearBuffers:
    """The kernel's arguments by what they are to the layer."""

    def every(values: list[Value | None]) -> list[Buffer]:
        return [buffers[v] for v in values if v is not None]

    return LinearBuffers(
        buffers[found.x.data],
        every([weight.data for weight in found.weights if not (weight.compressed or weight.sparse)]),
        every([weight.scale for weight in found.weights]),
        every([weight.zero for weight in found.weights]),
        every(list(found.biases)),
        y,
        buffers[found.x.scale] if found.x.scale else None,
        [compressed(weight, buffers) for weight in found.weights if weight.compressed],
        every([weight.table for weight in found.weights]),
        every([weight.step for weight in found.weights]),
        every([weight.offset for weight in found.weights]),
        [sparse(weight.sparse, buffers) for weight in found.weights if weight.sparse],
    )


def compressed(weight: Tensor, buffers: Mapping[Value, Buffer]) -> Compressed:
    """The arguments that a weight is decompressed from."""
    blocks, steps = map(int, weight.compressed[0].shape[:2])
    return Compressed(*(buffers[v] for v in weight.compressed), blocks, steps)


def sparse(op: ops.SparseExpand, buffers: Mapping[Value, Buffer]) -> Sparse:
    """The arguments that a weight is expanded from."""
    return Sparse(*(buffers[v] for v in op.operands), op.layout, op.rows, op.columns)


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
        n = self.pattern.features
        last = value.shape[-1] if value.shape else 1
        if not same_dim(last, n):
            return buffer.load(constant(0)).to(wide).splat(place.lanes)
        if all(d == 1 for d in value.shape[:-1]) and value.shape != self.pattern.result.shape:
            return buffer.load(place.col, place.lanes, place.mask).to(wide)
        return buffer.load(place.row * n + place.col, place.lanes, place.mask).to(wide)
