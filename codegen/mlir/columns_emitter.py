"""IR kernels around a linear layer behind ``sparse.threshold`` -> kernels that read no weights of small inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar

from tilewright.codegen.features import log2
from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.linear_pattern import Pattern, find
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.columns import FewRows, Inputs
from tilewright.codegen.mlir.columns_dense import ManyRows
from tilewright.codegen.mlir.columns_spec import WEIGHTS, ColumnsSchedule, ColumnsSpec
from tilewright.codegen.mlir.elementwise import dim_value
from tilewright.codegen.mlir.linear_emitter import Epilogue, roles, spec_of
from tilewright.codegen.mlir.linear_emitter import refusal as linear_refusal
from tilewright.codegen.mlir.lower import compile_kernel
from tilewright.codegen.packing import AnyPacking
from tilewright.codegen.schedule import Schedule, Space
from tilewright.codegen.target import CpuTarget
from tilewright.ir import Argument, CodegenError, Function, Value, eval_dim, ops, same_dim


class ColumnsEmitter:
    """Linear layers, plain and gated, whose small inputs are made zero: what belongs to them is not read for few rows."""

    name: ClassVar[str] = "mlir.columns"

    def match(self, kernel: Function, target: CpuTarget) -> str | None:
        found = find(kernel, refusal, skips=True)
        return found if isinstance(found, str) else None

    def default_schedule(self, kernel: Function, target: CpuTarget) -> Schedule:
        found = find(kernel, refusal, skips=True)
        return ColumnsSchedule.default(target) if isinstance(found, str) else columns_of(found).schedule(target)

    def space(self, kernel: Function, target: CpuTarget, sizes: Mapping[str, int]) -> Space:
        found = matched(kernel)
        spec = columns_of(found)
        least, most = (next((v for v in ColumnsSchedule.domains()[key] if v >= size), None)
                       for key, size in (("panel", spec.linear.n), ("depth", spec.linear.k)))  # fmt: skip
        narrow = {key: tuple(v for v in ColumnsSchedule.domains()[key] if v <= longest)
                  for key, longest in (("panel", least), ("depth", most)) if longest}  # fmt: skip
        if eval_dim(found.rows, sizes) == 1:
            narrow["rows"] = (spec.schedule(target).rows,)
        return Space(ColumnsSchedule, target, spec.schedule(target), narrow)

    def layouts(self, kernel: Function, target: CpuTarget) -> Callable[[Schedule], Mapping[int, str]]:
        found, args = matched(kernel), list[Value](kernel.args)

        def texts(schedule: Schedule) -> dict[int, str]:
            assert isinstance(schedule, ColumnsSchedule)
            return {args.index(v): packing.text for v, packing in packings(found, schedule, target).items()}

        return texts

    def features(self, kernel: Function, target: CpuTarget, sizes: Mapping[str, int]
                 ) -> Callable[[Schedule], dict[str, float]]:  # fmt: skip
        found = matched(kernel)
        spec, rows = columns_of(found), eval_dim(found.rows, sizes)
        linear = spec.linear
        fixed = {"rows": log2(rows), "n": log2(linear.n), "k": log2(linear.k), "parts": float(linear.parts),
                 "bits": float(spec.stored.bits), "group": log2(linear.group), "tail": float(len(found.tail))}  # fmt: skip

        def describe(schedule: Schedule) -> dict[str, float]:
            assert isinstance(schedule, ColumnsSchedule)
            tasks = [eval_dim(d, sizes) for d in (spec.tasks(schedule, target), spec.last(schedule, target))]
            piece = spec.panel(schedule) * spec.stored.bits / 8
            return {**fixed, "tasks": float(tasks[rows > schedule.rows]), "piece": log2(piece)}

        return describe

    def emit(self, kernel: Function, schedule: Schedule, target: CpuTarget, symbol: str) -> KernelCode:
        found = find(kernel, refusal, skips=True)
        if isinstance(found, str) or not isinstance(schedule, ColumnsSchedule):
            raise CodegenError(f"{self.name} cannot lower @{kernel.name} with {schedule}: {found}")
        schedule.validate(target)
        spec, dims = columns_of(found), tuple(kernel.symbols())
        packed = packings(found, schedule, target)
        given = [(f"a{i}", packed[v].stored if v in packed else v.dtype.value) for i, v in enumerate(kernel.args)]
        more = [("y", spec.linear.out_dtype), ("sums", "f32"), ("copy", spec.linear.x_dtype)]
        with Kernel(symbol, target, dims, [*given, *more]) as k:
            y, sums, copy = k.buffers[-3:]
            emit_columns(k, found, spec, schedule, dict(zip(kernel.args, k.buffers)), (y, sums, copy))
        layouts = self.layouts(kernel, target)(schedule)
        tasks, last = spec.tasks(schedule, target), spec.last(schedule, target)
        scratch = spec.scratch(schedule, target)
        return KernelCode(symbol, compile_kernel(k), dims, tasks, packing=layouts, scratch=scratch, last=last)


def matched(kernel: Function) -> Pattern:
    """The pattern of a kernel that ``match`` accepts."""
    found = find(kernel, refusal, skips=True)
    if isinstance(found, str):
        raise CodegenError(f"@{kernel.name} is no linear kernel behind a threshold: {found}")
    return found


def refusal(p: Pattern) -> str | None:
    """What of a pattern the kernels do not do."""
    if p.threshold is None:
        return "no threshold says which inputs to leave out"
    if p.weights[0].sparse:
        return "no inputs are left out: sparse weights have no columns"
    if p.x.scale or p.weights[0].compressed or p.weights[0].table or p.weights[0].data.dtype.value not in WEIGHTS:
        what = "x in codes" if p.x.scale else f"weights that are {'compressed' if p.weights[0].compressed else 'coded so'}"
        return f"no inputs are left out: no kernel for {what}; there are those for {', '.join(WEIGHTS)}"
    return _threshold_refusal(p.threshold) or linear_refusal(p)


def _threshold_refusal(op: ops.Threshold) -> str | None:
    shape = op.x.shape
    if op.by is not None and not (isinstance(op.by, Argument) and len(op.by.shape) == len(shape)
                                  and all(map(same_dim, op.by.shape, shape))):  # fmt: skip
        return f"no inputs are left out: x is {op.x.type}, what is compared {op.by.type}"
    known = isinstance(op.limits, Argument) or isinstance(op.limits.owner, ops.Full)
    if not known or not all(map(same_dim, op.result.shape, shape)) or len(op.result.shape) != len(shape):
        return f"no inputs are left out: x is {op.x.type}, limits {op.limits.type}"
    return None


def columns_of(p: Pattern) -> ColumnsSpec:
    """What kernels compute for a pattern."""
    return ColumnsSpec(spec_of(p), p.rows)


def packings(found: Pattern, schedule: ColumnsSchedule, target: CpuTarget) -> dict[Value, AnyPacking]:
    """The layouts in which weights and their scales must come."""
    spec = columns_of(found)
    layouts: dict[Value, AnyPacking] = {}
    for weight in found.weights:
        layouts[weight.data] = spec.packing(schedule)
        if weight.scale is not None:
            layouts[weight.scale] = spec.linear.group_packing(weight.scale.dtype.value, spec.dense(target), target)
    return layouts


def inputs_of(found: Pattern, buffers: Mapping[Value, Buffer]) -> Inputs:
    """x, and what decides which of its elements count."""
    op = found.threshold
    assert op is not None
    full = op.limits.owner
    limits = float(full.value) if isinstance(full, ops.Full) else buffers[op.limits]
    each = bool(op.limits.shape) and op.limits.shape[-1] != 1
    return Inputs(buffers[op.x], limits, buffers[op.by] if op.by else None, found.depth, each)


def emit_columns(kernel: Kernel, found: Pattern, spec: ColumnsSpec, schedule: ColumnsSchedule, buffers: dict[Value, Buffer],
                 own: tuple[Buffer, Buffer, Buffer]) -> None:  # fmt: skip
    """The tasks of one kernel; ``own`` are the result, the sums of tasks, and the copy of x."""
    y, sums, copy = own
    m, inputs = dim_value(found.rows, kernel.dims), inputs_of(found, buffers)
    parts = replace(roles(found, buffers, y), x=copy)
    many = ManyRows(kernel, spec, schedule, m, parts, Epilogue(found, buffers) if found.tail else None)
    few = FewRows(kernel, spec, schedule, m, inputs, parts.weights, parts.scales, sums)
    tasks = dim_value(spec.tasks(schedule, kernel.target), kernel.dims)
    begin, end = kernel.begin - tasks, kernel.end - tasks
    is_few, first = m <= schedule.rows, kernel.begin < tasks
    with kernel.when(is_few & first):
        few.emit(kernel.begin, kernel.end)
    with kernel.when(is_few & ~first):
        many.add_up(sums, begin, end)
    with kernel.when(~is_few & first):
        many.copy(inputs, kernel.begin, kernel.end)
    with kernel.when(~is_few & ~first):
        many.emit(begin, end)
