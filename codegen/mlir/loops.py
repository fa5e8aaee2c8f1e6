"""The generic kernel emitter: elementwise operations, moves, gathers, reductions, norms and quantization in any mixture.

Each operation is a function from an index to a value (a scalar, or a vector along the innermost axis), so chains
compose without temporaries: the results' elements pull what they need. `loops_plan` decides the loop nest,
`reads` says where operations read, `loops_eval` and `loops_rows` emit.

Reductions and normalisations run as passes over a row inside of the task that owns it. Narrow floats are computed in
f32 and rounded when they are stored. An index out of range reads the nearest element: sessions check token ids before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from tilewright.codegen import reads as rd
from tilewright.codegen.features import log2
from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.mlir.loops_compute import refusal
from tilewright.codegen.mlir.loops_cost import grain, op_weight, result_sets, rows_on_stack
from tilewright.codegen.mlir.loops_plan import planner, shared_axes
from tilewright.codegen.schedule import Schedule, Space, knob
from tilewright.codegen.target import CpuTarget
from tilewright.ir import CodegenError, Function, KVType, Op, TensorType, Value, eval_dim, ops, product


@dataclass(frozen=True)
class LoopsSchedule(Schedule):
    """``width`` vectors of the target are one value; ``unroll`` such values a step, ``streams`` totals in a reduction.

    ``task`` is about the number of elements of one task.
    """

    name: ClassVar[str] = "loops"
    width: int = knob(1, (1, 2))
    unroll: int = knob(2, (1, 2, 4))
    streams: int = knob(4, (1, 2, 4, 8))
    task: int = knob(4096, (512, 1024, 2048, 4096, 8192, 16384, 65536))


class LoopsEmitter:
    """Lowers kernels without matrix products, attention, convolution or sorting."""

    name: ClassVar[str] = "mlir.loops"

    def match(self, kernel: Function, target: CpuTarget) -> str | None:
        """None when this emitter can lower ``kernel``, else why not."""
        if any(isinstance(value.type, KVType) for value in kernel.args):
            return "a cache is no plain tensor"
        for op in kernel.body[:-1]:
            if reason := _op_refusal(op):
                return reason
        if reason := _foreign(kernel):
            return reason
        if narrow := [v for v in kernel.returns if v.dtype.bits < 8 or v.dtype.is_narrow_float]:
            return f"a result of {narrow[0].dtype.value}"
        if len({0 in value.shape for value in kernel.returns}) > 1:
            return "some results are empty and some are not"
        if len(result_sets(kernel)) > 1 and all(dim == 1 for dim in shared_axes(kernel)) and not _quantizes(kernel):
            return "results share no leading axis"
        return rows_on_stack(kernel)[1]

    def default_schedule(self, kernel: Function, target: CpuTarget) -> LoopsSchedule:
        """A good schedule by rule: two vectors at a time where short elements only move, or AVX2 packs them in pairs."""
        short = all(v.dtype.size <= 2 for v in kernel.returns) or _quantizes(kernel)
        return LoopsSchedule(width=2 if short and (rd.only_moves(kernel) or target.vector_bits < 512) else 1)

    def space(self, kernel: Function, target: CpuTarget, sizes: Mapping[str, int]) -> Space:
        """Totals are of reductions."""
        default = self.default_schedule(kernel, target)
        sums = any(isinstance(op, (*rd.FOLDS, *rd.ROWS, ops.Quantize)) for op in kernel.body)
        return Space(LoopsSchedule, target, default, {} if sums else {"streams": (default.streams,)})

    def layouts(self, kernel: Function, target: CpuTarget) -> Callable[[Schedule], Mapping[int, str]]:
        return lambda schedule: {}

    def features(self, kernel: Function, target: CpuTarget, sizes: Mapping[str, int]
                 ) -> Callable[[Schedule], dict[str, float]]:  # fmt: skip
        count = max(eval_dim(product(v.shape), sizes) for v in kernel.returns)
        widest = max(v.dtype.bits for v in (*kernel.args, *kernel.returns))
        fixed = {
            "elements": log2(count), "row": log2(max(eval_dim((1, *v.shape)[-1], sizes) for v in kernel.returns)),
            "results": float(len(kernel.returns)), "bits": float(min(v.dtype.bits for v in kernel.returns)),
            "cost": float(sum(op_weight(op) for op in kernel.body[:-1])), "widest": float(widest),
            "moves": float(rd.only_moves(kernel)), "quantizes": float(_quantizes(kernel)),
            "folds": float(sum(isinstance(op, rd.FOLDS) for op in kernel.body)),
            "norms": float(sum(isinstance(op, rd.ROWS) for op in kernel.body)),
        }  # fmt: skip
        plan = planner(kernel)
        tasks_of = cache(lambda limit: float(eval_dim(plan(limit).tasks, sizes)))

        def describe(schedule: Schedule) -> dict[str, float]:
            assert isinstance(schedule, LoopsSchedule)
            tasks, step = tasks_of(schedule.task), float(target.lanes * schedule.width * schedule.unroll)
            return {**fixed, "tasks": tasks, "task_elements": log2(count / tasks), "step": step}

        return describe

    def emit(self, kernel: Function, schedule: Schedule, target: CpuTarget, symbol: str) -> KernelCode:
        """The code of ``kernel`` under the name ``symbol``. Raises CodegenError when ``match`` gives a reason."""
        if reason := self.match(kernel, target):
            raise CodegenError(f"loops cannot lower @{kernel.name}: {reason}")
        from tilewright.codegen.mlir.loops_emit import build
        from tilewright.codegen.mlir.lower import compile_kernel

        assert isinstance(schedule, LoopsSchedule)
        plan = planner(kernel)(schedule.task)
        built = build(kernel, plan, schedule, target, symbol)
        dims = tuple(kernel.symbols())
        return KernelCode(symbol, compile_kernel(built), dims, plan.tasks, grain(kernel, plan.work))


def _op_refusal(op: Op) -> str | None:
    known = (*rd.CREATION, *rd.FOLDS, *rd.ROWS, *rd.PIECES, ops.Rope, ops.Quantize)
    if not (rd.is_plain(op) or isinstance(op, known)):
        return f"{op.name} has no loop form"
    if isinstance(op, ops.Elementwise):
        return refusal(op)
    if isinstance(op, rd.ROWS) and not op.operands[0].dtype.is_float:
        return f"{op.name} of {op.operands[0].dtype.value}"
    if picked := [v for v in rd.tables(op) if v.owner is not None and not _is_cheap(v.owner)]:
        return f"{op.name} reads single elements of {picked[0].owner.name}"  # type: ignore[union-attr]
    return None


def _is_cheap(op: Op) -> bool:
    """Whether no loop is needed for one element."""
    if isinstance(op, (*rd.FOLDS, *rd.ROWS, ops.Quantize)):
        return False
    return all(v.owner is None or _is_cheap(v.owner) for v in op.operands)


def _quantizes(kernel: Function) -> bool:
    """Whether codes of quantized rows are among the results; without leading axes there is one row, one task."""
    return any(isinstance(op, ops.Quantize) for op in kernel.body)


def _foreign(kernel: Function) -> str | None:
    """A kernel function reads nothing but its arguments."""
    own: set[Value] = {*kernel.args, *(r for op in kernel.body for r in op.results)}
    for op in kernel.body:
        for value in op.operands:
            if value not in own or not isinstance(value.type, TensorType):
                return f"{op.name} reads {value!r}, which is no argument of the kernel"
    return None
