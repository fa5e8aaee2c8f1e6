"""``core``: creation, reduction and ordering operations."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright.ir.core import Env, Op, Value
from tilewright.ir.ops import numerics as num
from tilewright.ir.ops.shapes import axis_of
from tilewright.ir.types import Dim, DType, TensorType, Type


class Full(Op):
    """A tensor whose elements all are ``value``; rank 0 is a scalar constant."""

    name = "core.full"
    shape: tuple[Dim, ...]
    value: float | int | bool
    dtype: DType

    def infer(self) -> tuple[Type, ...]:
        return (TensorType(self.shape, self.dtype),)

    def evaluate(self, env: Env) -> Any:
        return np.full(env.shape(self.shape), self.value, self.dtype.np)


class Iota(Op):
    """``[start, start + step, ...]`` of ``length`` elements."""

    name = "core.iota"
    length: Dim
    dtype: DType
    start: Dim = 0
    step: int = 1

    def infer(self) -> tuple[Type, ...]:
        return (TensorType((self.length,), self.dtype),)

    def evaluate(self, env: Env) -> Any:
        return (np.arange(env.dim(self.length)) * self.step + env.dim(self.start)).astype(self.dtype.np)


class SizeOf(Op):
    """A size as data: the scalar that holds ``value``."""

    name = "core.size_of"
    value: Dim
    dtype: DType = DType.i64

    def infer(self) -> tuple[Type, ...]:
        return (TensorType((), self.dtype),)

    def evaluate(self, env: Env) -> Any:
        return np.asarray(env.dim(self.value), self.dtype.np)


_REDUCERS: dict[str, Any] = {
    "sum": np.sum,
    "mean": np.mean,
    "max": np.max,
    "min": np.min,
    "prod": np.prod,
    "any": np.any,
    "all": np.all,
}


class Reduce(Op):
    """``fn`` (sum, mean, max, min, prod, any, all) over ``axes``, which stay as size 1 when ``keepdim``."""

    name = "core.reduce"
    x: Value
    fn: str
    axes: tuple[int, ...]
    keepdim: bool = False

    def infer(self) -> tuple[Type, ...]:
        self.expect(self.fn in _REDUCERS, f"unknown reduction {self.fn!r}; there are {', '.join(_REDUCERS)}")
        axes = {axis_of(self, a, self.x.tensor.rank) for a in self.axes}
        self.expect(len(axes) == len(self.axes), f"axes {self.axes} repeat")
        kept = [1 if i in axes else d for i, d in enumerate(self.x.shape) if self.keepdim or i not in axes]
        dtype = DType.bool if self.fn in ("any", "all") else self.x.dtype
        return (TensorType(tuple(kept), dtype),)

    def evaluate(self, env: Env, x: Any) -> Any:
        def reduce(v: Any) -> Any:
            return _REDUCERS[self.fn](v, axis=self.axes, keepdims=self.keepdim)

        return num.rounded(reduce, x, dtype=self.result.dtype)

    def flops(self) -> Dim:
        return self.x.tensor.elements


class ArgMax(Op):
    """Index (i64) of the first largest element along ``axis``."""

    name = "core.argmax"
    x: Value
    axis: int
    keepdim: bool = False

    def infer(self) -> tuple[Type, ...]:
        axis = axis_of(self, self.axis, self.x.tensor.rank)
        kept = [1 if i == axis else d for i, d in enumerate(self.x.shape) if self.keepdim or i != axis]
        return (TensorType(tuple(kept), DType.i64),)

    def evaluate(self, env: Env, x: Any) -> Any:
        return np.argmax(num.wide(x), axis=self.axis, keepdims=self.keepdim).astype(np.int64)

    def flops(self) -> Dim:
        return self.x.tensor.elements


class CumSum(Op):
    """Running sum along ``axis``."""

    name = "core.cumsum"
    x: Value
    axis: int

    def infer(self) -> tuple[Type, ...]:
        axis_of(self, self.axis, self.x.tensor.rank)
        return (self.x.tensor,)

    def evaluate(self, env: Env, x: Any) -> Any:
        return num.rounded(lambda v: np.cumsum(v, axis=self.axis), x)

    def flops(self) -> Dim:
        return self.x.tensor.elements


def _order(x: Any, axis: int, descending: bool) -> Any:
    """Indices (i64) of a stable sort; nan counts as the largest."""
    if not descending:
        return np.argsort(num.wide(x), axis=axis, kind="stable").astype(np.int64)
    back = np.argsort(np.flip(num.wide(x), axis), axis=axis, kind="stable")
    return x.shape[axis] - 1 - np.flip(back, axis).astype(np.int64)


class Sort(Op):
    """Stable sort along ``axis``: values and their indices (i64)."""

    name = "core.sort"
    x: Value
    axis: int
    descending: bool = False

    def infer(self) -> tuple[Type, ...]:
        axis_of(self, self.axis, self.x.tensor.rank)
        return (self.x.tensor, self.x.tensor.with_dtype(DType.i64))

    def evaluate(self, env: Env, x: Any) -> Any:
        index = _order(x, self.axis, self.descending)
        return np.take_along_axis(x, index, self.axis), index


class TopK(Op):
    """The ``k`` largest (or smallest) elements along ``axis``, best first, and their indices (i64)."""

    name = "core.topk"
    x: Value
    k: int
    axis: int
    largest: bool = True

    def infer(self) -> tuple[Type, ...]:
        axis = axis_of(self, self.axis, self.x.tensor.rank)
        size = self.x.shape[axis]
        self.expect(self.k >= 1 and not (isinstance(size, int) and self.k > size), f"k={self.k} of {size} elements")
        shape = (*self.x.shape[:axis], self.k, *self.x.shape[axis + 1 :])
        return (TensorType(shape, self.x.dtype), TensorType(shape, DType.i64))

    def evaluate(self, env: Env, x: Any) -> Any:
        index = np.take(_order(x, self.axis, self.largest), range(self.k), axis=self.axis)
        return np.take_along_axis(x, index, self.axis), index
