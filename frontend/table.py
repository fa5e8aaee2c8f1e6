"""The table of ATen operations and what their entries build with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from tilewright.frontend.locate import source_line
from tilewright.frontend.symbols import FloatSize, NotADim, SymbolTable, dtype_of
from tilewright.ir.builder import Builder
from tilewright.ir.core import Module, Op, Value, Weight
from tilewright.ir.errors import UnsupportedError
from tilewright.ir.ops import (
    Add,
    Broadcast,
    Cast,
    Concat,
    Div,
    Full,
    Iota,
    Log,
    Mul,
    Pow,
    Reshape,
    SizeOf,
    Slice,
    Sqrt,
    Transpose,
)
from tilewright.ir.sources import ArraySource, ComputedSource
from tilewright.ir.types import Dim, DType, TensorType, as_dim, product, same_dim

Lower = Callable[..., Any]
TABLE: dict[Any, Lower] = {}
LAZY: set[Any] = set()


def lowers(*targets: Any, lazy: bool = False) -> Callable[[Lower], Lower]:
    """Enter the decorated function for ``targets``. It is called with the :class:`Context` and the node's arguments:
    tensors as Values, sizes as Dims, element types as DTypes. ``lazy``: it also takes masks that are not built yet."""

    def enter(fn: Lower) -> Lower:
        for target in targets:
            if target in TABLE:
                raise TypeError(f"{target} is entered twice")
            TABLE[target] = fn
            if lazy:
                LAZY.add(target)
        return fn

    return enter


_SIZE_OPS: dict[str, type[Op]] = {
    "Add": Add,
    "Mul": Mul,
    "Pow": Pow,
    "FloatPow": Pow,
    "IntTrueDiv": Div,
    "FloatTrueDiv": Div,
    "OpaqueUnaryFn_sqrt": Sqrt,
    "OpaqueUnaryFn_log": Log,
}


class Context:
    """What an entry of the table works with: the builder, the node, small helpers that skip what changes nothing."""

    def __init__(self, module: Module, builder: Builder, symbols: SymbolTable) -> None:
        self.module, self.b, self.symbols = module, builder, symbols
        self.node: fx.Node = None  # type: ignore[assignment]

    def __call__(self, kind: type[Op], *args: Any, **fields: Any) -> Value:
        """Add one operation with one result."""
        return self.b(kind, *args, **fields)

    def fail(self, message: str) -> NoReturn:
        """Refuse the node, showing the user's line."""
        line = source_line(self.b.loc)
        raise UnsupportedError(f"{self.node.target}: {message}{f'{chr(10)}  {line}' if line else ''}", self.b.loc)

    # -- what torch says about the node --------------------------------------------------------------------------

    @property
    def out(self) -> TensorType:
        """Type of the node's (first) result."""
        value = self.node.meta["val"]
        return self.type_of(value[0] if isinstance(value, (list, tuple)) else value)

    def type_of(self, value: torch.Tensor) -> TensorType:
        try:
            return self.symbols.tensor(value)
        except NotADim as error:
            self.fail(str(error))

    def promoted(self, *positions: int) -> DType:
        """The element type in which torch computes with the arguments at ``positions``."""
        values = [self._given(self.node.args[p]) for p in positions]
        return dtype_of(torch.result_type(*values))

    @staticmethod
    def _given(arg: Any) -> Any:
        return arg.meta["val"] if isinstance(arg, fx.Node) else arg

    # -- values ----------------------------------------------------------------------------------------------------

    def value(self, x: Any, dtype: DType) -> Value:
        """``x`` (a Value, a number, a Dim) as a value of ``dtype``."""
        if isinstance(x, Value):
            return self.cast(x, dtype)
        if isinstance(x, (bool, int, float)):
            return self(Full, (), _as_python(x, dtype), dtype)
        if isinstance(x, FloatSize):
            return self.cast(self._of_sizes(x.expr), dtype)
        return self.cast(self(SizeOf, as_dim(x)), dtype)

    def _of_sizes(self, e: Any) -> Value:
        """An expression over sizes as an f64 scalar that the program computes."""
        if e.is_Number:
            return self.value(float(e), DType.f64)
        if e.is_Symbol:
            return self.value(self.symbols.rewrite(e), DType.f64)
        name, kind = type(e).__name__, _SIZE_OPS.get(type(e).__name__)
        if name == "ToFloat":
            return self._of_sizes(e.args[0])
        if kind is None:
            return self.value(self.symbols.rewrite(e), DType.f64)
        first, *rest = map(self._of_sizes, e.args)
        for other in rest:
            first = self(kind, first, other)
        return first if rest else self(kind, first)

    def full(self, shape: Sequence[Dim], x: Any, dtype: DType) -> Value:
        """A tensor filled with ``x``."""
        if isinstance(x, (bool, int, float)):
            return self(Full, tuple(shape), _as_python(x, dtype), dtype)
        return self.broadcast(self.value(x, dtype), shape)

    def cast(self, x: Value, dtype: DType) -> Value:
        return x if x.dtype == dtype else self(Cast, x, dtype)

    def constant(self, array: np.ndarray, name: str) -> Weight:
        """A tensor known now, kept as a weight."""
        return self.module.constant(array, name)

    def derived(
        self, name: str, shape: Sequence[Dim], given: Sequence[Value | None], make: Callable[..., np.ndarray]
    ) -> Weight:
        """An f32 weight that ``make`` computes, when it is loaded, from the weights ``given`` (as f32; None stays)."""
        sources = tuple(w.source for w in given if isinstance(w, Weight) and w.source is not None)

        def compute(*arrays: np.ndarray) -> np.ndarray:
            left = iter(arrays)
            wide = [None if w is None else next(left).astype(np.float32) for w in given]
            return np.asarray(make(*wide), np.float32)

        if name not in self.module.weights:
            self.module.weight(name, TensorType(tuple(shape), DType.f32), ComputedSource(sources, compute))
        return self.module.weights[name]

    # -- moving elements -------------------------------------------------------------------------------------------

    def reshape(self, x: Value, shape: Sequence[Dim]) -> Value:
        """``x`` under another shape; one size may be -1. A reshape of a reshape becomes one."""
        shape = self._filled(x, list(shape))
        x = x.owner.x if isinstance(x.owner, Reshape) else x
        if len(shape) == x.tensor.rank and all(map(same_dim, shape, x.shape)):
            return x
        return self(Reshape, x, tuple(shape))

    def _filled(self, x: Value, shape: list[Dim]) -> list[Dim]:
        if -1 not in shape:
            return shape
        at = shape.index(-1)
        known = product([d for i, d in enumerate(shape) if i != at])
        total: Any = x.tensor.elements
        shape[at] = total // known if isinstance(total, int) and isinstance(known, int) else _quotient(total, known)
        return shape

    def transpose(self, x: Value, perm: Sequence[int]) -> Value:
        """Axes in the order ``perm``; a transpose of a transpose becomes one."""
        perm = tuple(perm)
        if isinstance(x.owner, Transpose):
            perm = tuple(x.owner.perm[p] for p in perm)
            x = x.owner.x
        return x if perm == tuple(range(len(perm))) else self(Transpose, x, perm)

    def swap(self, x: Value, a: int, b: int) -> Value:
        perm = list(range(x.tensor.rank))
        perm[a], perm[b] = perm[b], perm[a]
        return self.transpose(x, perm)

    def transposed(self, w: Value) -> Value:
        """The last two axes of ``w`` swapped; of a weight when it is loaded, not when the program runs."""
        perm = (*range(w.tensor.rank - 2), w.tensor.rank - 1, w.tensor.rank - 2)
        if not isinstance(w, Weight) or w.source is None:
            return self.transpose(w, perm)
        name = f"{w.name}.T"
        if name not in self.module.weights:
            shape = tuple(w.shape[p] for p in perm)
            source = ComputedSource((w.source,), lambda a: np.ascontiguousarray(np.swapaxes(a, -1, -2)))
            self.module.weight(name, w.tensor.with_shape(shape), source)
        return self.module.weights[name]

    def broadcast(self, x: Value, shape: Sequence[Dim]) -> Value:
        same = len(shape) == x.tensor.rank and all(map(same_dim, shape, x.shape))
        return x if same else self(Broadcast, x, tuple(shape))

    def unsqueeze(self, x: Value, axis: int) -> Value:
        """A size-1 axis inserted at ``axis`` (may be negative)."""
        axis %= x.tensor.rank + 1
        return self.reshape(x, (*x.shape[:axis], 1, *x.shape[axis:]))

    def slice(self, x: Value, axis: int, start: Dim, size: Dim, step: int = 1) -> Value:
        """``size`` elements along ``axis`` from ``start`` on, every ``step``-th."""
        stop = as_dim(start + (size - 1) * step + 1)
        if step == 1 and same_dim(start, 0) and same_dim(stop, x.shape[axis]):
            return x
        rank = x.tensor.rank
        starts, stops, steps = [0] * rank, list(x.shape), [1] * rank
        starts[axis], stops[axis], steps[axis] = start, stop, step
        return self(Slice, x, tuple(starts), tuple(stops), tuple(steps))

    def concat(self, xs: Sequence[Value], axis: int) -> Value:
        return xs[0] if len(xs) == 1 else self(Concat, tuple(xs), axis)

    def iota(self, length: Dim, axis: int, rank: int, start: Dim = 0) -> Value:
        """``start, start + 1, ...`` (i64) along ``axis`` of a tensor of ``rank`` axes whose others are 1."""
        shape = [1] * rank
        shape[axis] = length
        return self.reshape(self(Iota, length, DType.i64, start), shape)


def _quotient(total: Any, known: Any) -> Dim:
    import sympy

    return as_dim(sympy.floor(sympy.cancel(sympy.sympify(total) / known)))


def _as_python(x: Any, dtype: DType) -> Any:
    if dtype is DType.bool:
        return bool(x)
    return float(x) if dtype.is_float else int(x)


def is_exact(x: Any, dtype: DType) -> bool:
    """Whether the number ``x`` is not rounded by ``dtype``."""
    return not dtype.is_float or dtype in (DType.f32, DType.f64) or x != x or float(dtype.np.type(x)) == float(x)


def axis_of(x: Value, axis: int) -> int:
    return axis % max(x.tensor.rank, 1)


def axes_of(x: Value, axes: int | Sequence[int] | None) -> tuple[int, ...]:
    """``axes`` counted from the front; none given means all."""
    if axes is None or (not isinstance(axes, int) and not axes):
        return tuple(range(x.tensor.rank))
    return tuple(sorted(axis_of(x, a) for a in ((axes,) if isinstance(axes, int) else axes)))


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as an array, without a copy where it is contiguous."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def source_of(tensor: torch.Tensor) -> ArraySource | None:
    """The tensor's numbers; none for a fake, which stands for a weight that the checkpoint lacks."""
    return None if isinstance(tensor, FakeTensor) else ArraySource(numpy_of(tensor))
