"""ATen: tensors made from nothing, and parts of matrices."""

from __future__ import annotations

from typing import Any

import torch

from tilewright.frontend.table import Context, lowers
from tilewright.ir import ops
from tilewright.ir.core import Op, Value
from tilewright.ir.types import Dim, DType, as_dim

aten = torch.ops.aten


@lowers(aten.full.default, aten.new_full.default)
def full(c: Context, *args: Any, **_: Any) -> Value:
    return c.full(c.out.shape, args[-1], c.out.dtype)


@lowers(aten.full_like.default, aten.fill.Scalar, aten.fill.Tensor)
def full_like(c: Context, x: Value, value: Any, **_: Any) -> Value:
    return c.full(c.out.shape, value, c.out.dtype)


@lowers(
    aten.zeros.default,
    aten.zeros_like.default,
    aten.new_zeros.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.empty_strided.default,
    aten.new_empty_strided.default,
)
def zeros(c: Context, *_: Any, **__: Any) -> Value:
    """Zeros; also for memory that torch leaves uninitialised."""
    return c.full(c.out.shape, 0, c.out.dtype)


@lowers(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def ones(c: Context, *_: Any, **__: Any) -> Value:
    return c.full(c.out.shape, 1, c.out.dtype)


@lowers(aten.scalar_tensor.default)
def scalar_tensor(c: Context, x: Any, **_: Any) -> Value:
    return c.value(x, c.out.dtype)


@lowers(aten.arange.default)
def arange(c: Context, end: Any, **_: Any) -> Value:
    return arange_step(c, 0, end)


@lowers(aten.arange.start, aten.arange.start_step)
def arange_step(c: Context, start: Any, end: Any, step: Any = 1, **_: Any) -> Value:
    length, dtype = c.out.shape[0], c.out.dtype
    whole = isinstance(step, int) and not isinstance(start, float)
    if whole and dtype.is_int:
        return c(ops.Iota, length, dtype, as_dim(start), step)
    index = c.cast(c(ops.Iota, length, DType.i64), DType.f64)
    scaled = c(ops.Mul, index, c.value(step, DType.f64))
    return c.cast(c(ops.Add, scaled, c.value(start, DType.f64)), dtype)


@lowers(aten.linspace.default)
def linspace(c: Context, start: float, end: float, steps: int, **_: Any) -> Value:
    step = (end - start) / (steps - 1) if steps > 1 else 0.0
    return arange_step(c, float(start), None, step)


@lowers(aten.eye.default, aten.eye.m)
def eye(c: Context, n: Dim, m: Dim | None = None, **_: Any) -> Value:
    rows, columns = c.out.shape
    return c.cast(c(ops.Eq, c.iota(rows, 0, 2), c.iota(columns, 1, 2)), c.out.dtype)


def _triangle(c: Context, x: Value, diagonal: int, kind: type[Op]) -> Value:
    rank, (rows, columns) = x.tensor.rank, x.shape[-2:]
    keep = c(kind, c.iota(columns, rank - 1, rank, as_dim(-diagonal)), c.iota(rows, rank - 2, rank))
    return c(ops.Where, keep, x, c.value(0, x.dtype))


@lowers(aten.tril.default)
def tril(c: Context, x: Value, diagonal: int = 0) -> Value:
    return _triangle(c, x, diagonal, ops.Le)


@lowers(aten.triu.default)
def triu(c: Context, x: Value, diagonal: int = 0) -> Value:
    return _triangle(c, x, diagonal, ops.Ge)
