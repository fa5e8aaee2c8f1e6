"""Kernels without matrix products or attention: elementwise operations, moves, gathers, reductions, norms, quantization.

Where rows are folded a block owns a row: its threads find the row's statistics together and then share its elements.
Otherwise a thread owns elements, and folds, if any, are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tilewright.codegen import reads as rd
from tilewright.codegen.cuda.evaluate import Evaluator
from tilewright.codegen.cuda.source import Source
from tilewright.codegen.cuda.target import CudaTarget
from tilewright.codegen.features import log2
from tilewright.codegen.index import Poly, floor_div
from tilewright.codegen.index_shapes import as_dim, delinear, size
from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.schedule import Schedule, Space, knob
from tilewright.ir import CodegenError, Dim, DType, Function, KVType, Op, Shape, Value, eval_dim, ops, product

_FLOAT_ONLY = (ops.Exp, ops.Log, ops.Log1p, ops.Sqrt, ops.Rsqrt, ops.Reciprocal, ops.Sin, ops.Cos, ops.Tanh, ops.Sigmoid,
               ops.Erf, ops.Silu, ops.Gelu, ops.GeluTanh, ops.Softplus)  # fmt: skip


@dataclass(frozen=True)
class CudaLoopsSchedule(Schedule):
    """``threads`` a block; each takes ``elements``, a block's threads apart, where no rows are folded."""

    name: ClassVar[str] = "cuda_loops"
    threads: int = knob(256, (32, 64, 128, 256, 512, 1024))
    elements: int = knob(1, (1, 2, 4, 8))


class CudaLoopsEmitter:
    """Any mixture of operations that say where they read, and folds."""

    name: ClassVar[str] = "cuda.loops"

    def match(self, kernel: Function, target: CudaTarget) -> str | None:
        if any(isinstance(value.type, KVType) for value in kernel.args):
            return "a cache is no plain tensor"
        for op in kernel.body[:-1]:
            if reason := refusal(op):
                return reason
        narrow = [v for v in kernel.returns if v.dtype.bits < 8 or v.dtype.is_narrow_float]
        return f"a result of {narrow[0].dtype.value}" if narrow else None

    def default_schedule(self, kernel: Function, target: CudaTarget) -> CudaLoopsSchedule:
        row = rows_of(kernel)
        length = product(row.shape[-1:]) if row is not None else None
        if not isinstance(length, int):
            return CudaLoopsSchedule()
        return CudaLoopsSchedule(threads=next((t for t in (32, 64, 128) if t >= length), 256))

    def space(self, kernel: Function, target: CudaTarget, sizes: Mapping[str, int]) -> Space:
        default = self.default_schedule(kernel, target)
        return Space(CudaLoopsSchedule, target, default, {} if rows_of(kernel) is None else {"elements": (1,)})

    def layouts(self, kernel: Function, target: CudaTarget) -> Callable[[Schedule], Mapping[int, str]]:
        return lambda schedule: {}

    def features(self, kernel: Function, target: CudaTarget, sizes: Mapping[str, int]
                 ) -> Callable[[Schedule], dict[str, float]]:  # fmt: skip
        count = max(eval_dim(product(v.shape), sizes) for v in kernel.returns)
        return lambda schedule: {"elements": log2(count), "folds": float(rows_of(kernel) is not None)}

    def emit(self, kernel: Function, schedule: Schedule, target: CudaTarget, symbol: str) -> KernelCode:
        if reason := self.match(kernel, target):
            raise CodegenError(f"{self.name} cannot lower @{kernel.name}: {reason}")
        assert isinstance(schedule, CudaLoopsSchedule)
        source = Source(kernel, symbol, target)
        anchor = rows_of(kernel)
        if anchor is None or not by_rows(source, anchor.shape[:-1], schedule):
            by_elements(source, schedule)
        return source.code()


def refusal(op: Op) -> str | None:
    """Why an operation has no form here, or None."""
    known = (*rd.CREATION, *rd.FOLDS, *rd.ROWS, *rd.PIECES, ops.Rope, ops.Quantize)
    if not (rd.is_plain(op) or isinstance(op, known)):
        return f"{op.name} has no form as a CUDA loop"
    if isinstance(op, (*_FLOAT_ONLY, *rd.ROWS)) and not op.operands[0].dtype.is_float:
        return f"{op.name} of {op.operands[0].dtype.value}"
    if isinstance(op, (ops.Sub, ops.Div, ops.FloorDiv, ops.Mod, ops.Neg, ops.Pow)) and op.operands[0].dtype is DType.bool:
        return f"{op.name} of bool"
    return None


def rows_of(kernel: Function) -> Value | None:
    """The operand of the first fold, when all folds run along the last axis of tensors with as many rows."""
    folds = [op for op in kernel.body if isinstance(op, (*rd.FOLDS, *rd.ROWS, ops.Quantize))]
    if not folds or not all(isinstance(op, ops.Quantize) or rd.is_trailing(op) for op in folds):
        return None
    if any(isinstance(op, ops.GroupNorm) or len(rd.fold_axes(op)) > 1 for op in folds):
        return None
    return folds[0].operands[0]


def by_rows(source: Source, lead: Shape, schedule: CudaLoopsSchedule) -> bool:
    """A block for each row; False, with nothing written, where a thread would have to fold on its own."""
    returns = source.kernel.returns
    if any(tuple(v.shape[: len(lead)]) != tuple(lead) for v in returns):
        return False
    w = Evaluator(source.pointers)
    row = take_apart(w, w.variable(0, size(product(lead)) - 1, "(i64)blockIdx.x"), lead)
    groups: dict[tuple[Dim, ...], list[int]] = {}
    for i, v in enumerate(returns):
        groups.setdefault(tuple(v.shape[len(lead) :]), []).append(i)
    for shape, members in groups.items():
        with w.loop(size(product(shape)), "threadIdx.x", "blockDim.x") as at:
            for i in members:
                w.store(returns[i], f"r{i}", (*row, *delinear(at, shape)))
    if w.alone:
        return False
    source.function(w.lines, schedule.threads, (product(lead), 1, 1))
    return True


def by_elements(source: Source, schedule: CudaLoopsSchedule) -> None:
    """A thread for so many elements of each result."""
    returns = source.kernel.returns
    groups: dict[Dim, list[int]] = {}
    for i, v in enumerate(returns):
        groups.setdefault(product(v.shape), []).append(i)
    step = schedule.threads * schedule.elements
    for count, members in groups.items():
        w = Evaluator(source.pointers)
        start = w.keep_number(f"(i64)blockIdx.x * {step} + threadIdx.x")
        with w.block(f"for (int e = 0; e < {schedule.elements}; e++)"):
            at = w.variable(0, size(count) - 1, w.keep_number(f"{start} + e * {schedule.threads}"))
            with w.block(f"if ({w.number(at)} < {w.number(size(count))})"):
                shapes: dict[Shape, Sequence[Poly]] = {}
                for i in members:
                    shape = tuple(returns[i].shape)
                    if shape not in shapes:
                        shapes[shape] = take_apart(w, at, shape)
                    w.store(returns[i], f"r{i}", tuple(shapes[shape]))
        source.function(w.lines, schedule.threads, (as_dim(floor_div(size(count) + (step - 1), step)), 1, 1))


def take_apart(w: Evaluator, position: Poly, shape: Sequence[Dim]) -> tuple[Poly, ...]:
    """The index whose row-major position is ``position``, each part in a variable of its own range."""
    out = []
    for part, dim in zip(delinear(position, shape), shape):
        out.append(part if part.constant is not None else w.variable(0, size(dim) - 1, w.keep_number(w.number(part))))
    return tuple(out)


