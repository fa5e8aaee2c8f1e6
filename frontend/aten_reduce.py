"""ATen: reductions and ordering."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from tilewright.frontend.aten_core import binary
from tilewright.frontend.table import Context, axes_of, axis_of, lowers
from tilewright.ir import ops
from tilewright.ir.core import Value
from tilewright.ir.types import Dim, DType, as_dim, product

aten = torch.ops.aten

# ---- reduction -----------------------------------------------------------------------------------------------------


def reduce(c: Context, x: Value, fn: str, axes: int | Sequence[int] | None, keepdim: bool = False) -> Value:
    if x.tensor.rank == 0:
        return x
    return c(ops.Reduce, x, fn, axes_of(x, axes), keepdim)


@lowers(aten.sum.default, aten.sum.dim_IntList)
def sum_(c: Context, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    return reduce(c, c.cast(x, c.out.dtype), "sum", dim, keepdim)


@lowers(aten.mean.default, aten.mean.dim)
def mean(c: Context, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    return reduce(c, c.cast(x, c.out.dtype), "mean", dim, keepdim)


@lowers(aten.prod.default)
def prod(c: Context, x: Value, dtype: Any = None) -> Value:
    return reduce(c, c.cast(x, c.out.dtype), "prod", None)


@lowers(aten.prod.dim_int)
def prod_dim(c: Context, x: Value, dim: int, keepdim: bool = False, dtype: Any = None) -> Value:
    return reduce(c, c.cast(x, c.out.dtype), "prod", dim, keepdim)


@lowers(aten.amax.default, aten.max.default)
def amax(c: Context, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return reduce(c, x, "max", dim, keepdim)


@lowers(aten.amin.default, aten.min.default)
def amin(c: Context, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return reduce(c, x, "min", dim, keepdim)


@lowers(aten.any.default, aten.any.dim, aten.any.dims)
def any_(c: Context, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return reduce(c, c.cast(x, DType.bool), "any", dim, keepdim)


@lowers(aten.all.default, aten.all.dim, aten.all.dims)
def all_(c: Context, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
    return reduce(c, c.cast(x, DType.bool), "all", dim, keepdim)


@lowers(aten.argmax.default)
def argmax(c: Context, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    if dim is None:
        flat = c.reshape(x, (x.tensor.elements,))
        return c.reshape(c(ops.ArgMax, flat, 0), c.out.shape)
    return c(ops.ArgMax, x, axis_of(x, dim), keepdim)


@lowers(aten.argmin.default)
def argmin(c: Context, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    return argmax(c, c(ops.Neg, x), dim, keepdim)


@lowers(aten.max.dim)
def max_dim(c: Context, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    return reduce(c, x, "max", dim, keepdim), argmax(c, x, dim, keepdim)


@lowers(aten.min.dim)
def min_dim(c: Context, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    return reduce(c, x, "min", dim, keepdim), argmin(c, x, dim, keepdim)


def _variance(c: Context, x: Value, dim: Any, correction: Any, keepdim: bool) -> tuple[Value, Value]:
    axes = axes_of(x, dim)
    mean = reduce(c, x, "mean", axes, True)
    centred = c(ops.Sub, x, mean)
    total = reduce(c, c(ops.Mul, centred, centred), "sum", axes, keepdim)
    count = as_dim(product([x.shape[a] for a in axes]) - (1 if correction is None else int(correction)))
    return c(ops.Div, total, c.value(count, x.dtype)), mean


@lowers(aten.var.correction)
def var(c: Context, x: Value, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Value:
    return _variance(c, x, dim, correction, keepdim)[0]


@lowers(aten.std.correction)
def std(c: Context, x: Value, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Value:
    return c(ops.Sqrt, _variance(c, x, dim, correction, keepdim)[0])


@lowers(aten.var_mean.correction)
def var_mean(
    c: Context, x: Value, dim: Any = None, *, correction: Any = None, keepdim: bool = False
) -> tuple[Value, Value]:
    variance, mean = _variance(c, x, dim, correction, keepdim)
    return variance, c.reshape(mean, variance.shape)


@lowers(aten.linalg_vector_norm.default)
def vector_norm(c: Context, x: Value, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    x = c.cast(x, c.out.dtype)
    if ord == 2:
        return c(ops.Sqrt, reduce(c, c(ops.Mul, x, x), "sum", dim, keepdim))
    size = c(ops.Abs, x)
    if ord == 1:
        return reduce(c, size, "sum", dim, keepdim)
    if ord == math.inf:
        return reduce(c, size, "max", dim, keepdim)
    total = reduce(c, binary(c, ops.Pow, size, ord), "sum", dim, keepdim)
    return binary(c, ops.Pow, total, 1 / ord)


# ---- ordering ------------------------------------------------------------------------------------------------------


@lowers(aten.cumsum.default)
def cumsum(c: Context, x: Value, dim: int, dtype: Any = None) -> Value:
    x = c.cast(x, c.out.dtype)
    return x if x.tensor.rank == 0 else c(ops.CumSum, x, axis_of(x, dim))


@lowers(aten.sort.default)
def sort(c: Context, x: Value, dim: int = -1, descending: bool = False) -> Any:
    return c.b.add_all(ops.Sort(x, axis_of(x, dim), descending, loc=c.b.loc))


@lowers(aten.sort.stable)
def sort_stable(c: Context, x: Value, *, stable: Any = None, dim: int = -1, descending: bool = False) -> Any:
    return sort(c, x, dim, descending)


@lowers(aten.argsort.default)
def argsort(c: Context, x: Value, dim: int = -1, descending: bool = False) -> Value:
    return sort(c, x, dim, descending)[1]


@lowers(aten.topk.default)
def topk(c: Context, x: Value, k: Dim, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if not isinstance(k, int):
        c.fail(f"k is {k}, which varies; it must be a constant")
    return c.b.add_all(ops.TopK(x, k, axis_of(x, dim), largest, loc=c.b.loc))
