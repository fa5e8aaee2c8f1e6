"""ATen: looking up and writing by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tilewright.frontend.table import Context, axis_of, lowers
from tilewright.ir import ops
from tilewright.ir.core import Value, Weight
from tilewright.ir.sources import ArraySource
from tilewright.ir.types import DType

aten = torch.ops.aten

_KEEPS_SIGN = (ops.Cast, ops.Reshape, ops.Broadcast, ops.Slice, ops.Transpose, ops.Gather)
_OF_PARTS = (ops.Add, ops.Mul, ops.FloorDiv, ops.Mod, ops.Minimum, ops.Concat)


def never_negative(x: Value) -> bool:
    """Whether an index surely counts from the front. torch lets an index count from the end, the IR does not."""
    if isinstance(x, Weight):
        return isinstance(x.source, ArraySource) and bool(np.all(x.source.array >= 0))
    op = x.owner
    if x.dtype is DType.bool or isinstance(op, (ops.ArgMax, ops.SizeOf)):
        return True
    if isinstance(op, (ops.TopK, ops.Sort)):
        return x is op.results[1] or never_negative(op.x)
    if isinstance(op, ops.Iota):
        return isinstance(op.start, int) and op.start >= 0 and op.step > 0
    if isinstance(op, ops.Full):
        return op.value >= 0
    if isinstance(op, ops.Maximum):
        return never_negative(op.a) or never_negative(op.b)
    if isinstance(op, (*_KEEPS_SIGN, ops.CumSum)):
        return never_negative(op.x)
    return isinstance(op, _OF_PARTS) and all(map(never_negative, op.operands))


def _index(c: Context, i: Value, size: Any) -> Value:
    """``i`` as an integer index from the front into an axis of ``size``."""
    if i.dtype in (DType.bool, DType.u8):
        c.fail("the result's size depends on data; use torch.where instead of a boolean mask")
    i = i if i.dtype in (DType.i64, DType.i32) else c.cast(i, DType.i64)
    if never_negative(i):
        return i
    below = c(ops.Lt, i, c.value(0, i.dtype))
    return c(ops.Where, below, c(ops.Add, i, c.value(size, i.dtype)), i)


@lowers(aten.embedding.default)
def embedding(c: Context, table: Value, indices: Value, *_: Any) -> Value:
    indices = indices if indices.dtype in (DType.i64, DType.i32) else c.cast(indices, DType.i64)
    return c(ops.Embedding, indices, table)


@lowers(aten.index_select.default)
def index_select(c: Context, x: Value, dim: int, index: Value) -> Value:
    return c(ops.Gather, x, index, axis_of(x, dim))


@lowers(aten.gather.default)
def gather(c: Context, x: Value, dim: int, index: Value, *, sparse_grad: bool = False) -> Value:
    return c(ops.TakeAlong, x, index, axis_of(x, dim))


@lowers(aten.take_along_dim.default)
def take_along_dim(c: Context, x: Value, index: Value, dim: int | None = None) -> Value:
    if dim is None:
        c.fail("without a dim; give one")
    axis = axis_of(x, dim)
    common = [a if i == axis or a != 1 else b for i, (a, b) in enumerate(zip(index.shape, x.shape))]
    source = [b if i == axis or b != 1 else a for i, (a, b) in enumerate(zip(common, x.shape))]
    return c(ops.TakeAlong, c.broadcast(x, source), c.broadcast(index, common), axis)


def _arranged(c: Context, x: Value, indices: Sequence[Value | None]) -> tuple[list[int], list[Value], int]:
    """The axes that are indexed, their indices, and where the indices' own axes stand in the result."""
    axes = [a for a, i in enumerate(indices) if i is not None]
    found = [_index(c, i, x.shape[a]) for a, i in enumerate(indices) if i is not None]
    together = axes == list(range(axes[0], axes[-1] + 1))
    return axes, found, axes[0] if together else 0


@lowers(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(c: Context, x: Value, indices: Sequence[Value | None]) -> Value:
    axes, found, at = _arranged(c, x, indices)
    if len(axes) == 1:
        return c(ops.Gather, x, found[0], axes[0])
    rest = [a for a in range(x.tensor.rank) if a not in axes]
    picked = c(ops.GatherND, c.transpose(x, axes + rest), tuple(found))
    own = picked.tensor.rank - len(rest)  # axes of the indices: first in ``picked``, at ``at`` in the result
    order = [*range(own, own + at), *range(own), *range(own + at, picked.tensor.rank)]
    return c.transpose(picked, order)


@lowers(aten.index_put.default)
def index_put(c: Context, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False) -> Value:
    if len(indices) == 1 and indices[0] is not None and indices[0].dtype is DType.bool and values.tensor.rank == 0:
        return _masked_put(c, x, indices[0], c.cast(values, x.dtype))
    axes, found, at = _arranged(c, x, indices)
    if at != 0 or axes[0] != 0:
        c.fail("writes at indices behind a full slice; index the leading axes (transpose first)")
    rest = [a for a in range(x.tensor.rank) if a not in axes]
    done = c(ops.ScatterND, c.transpose(x, axes + rest), tuple(found), c.cast(values, x.dtype), accumulate)
    return c.transpose(done, [(axes + rest).index(a) for a in range(x.tensor.rank)])


def _masked_put(c: Context, x: Value, mask: Value, value: Value) -> Value:
    mask = c.reshape(mask, (*mask.shape, *[1] * (x.tensor.rank - mask.tensor.rank)))
    return c(ops.Where, mask, value, x)


@lowers(aten.scatter.src)
def scatter(c: Context, x: Value, dim: int, index: Value, src: Value) -> Value:
    return c(ops.ScatterAlong, x, index, c.cast(src, x.dtype), axis_of(x, dim))


@lowers(aten.scatter.value)
def scatter_value(c: Context, x: Value, dim: int, index: Value, value: Any) -> Value:
    return scatter(c, x, dim, index, c.full(index.shape, value, x.dtype))


@lowers(aten.scatter_add.default)
def scatter_add(c: Context, x: Value, dim: int, index: Value, src: Value) -> Value:
    axis, rank = axis_of(x, dim), x.tensor.rank
    places = tuple(index if a == axis else c.iota(index.shape[a], a, rank) for a in range(rank))
    part = src
    for a in range(rank):
        part = c.slice(part, a, 0, index.shape[a])
    return c(ops.ScatterND, x, places, c.cast(part, x.dtype), True)


@lowers(aten.index_add.default)
def index_add(c: Context, x: Value, dim: int, index: Value, source: Value, *, alpha: Any = 1) -> Value:
    if axis_of(x, dim) != 0 or alpha != 1:
        c.fail("only along axis 0 and with alpha=1")
    return c(ops.ScatterND, x, (index,), c.cast(source, x.dtype), True)


@lowers(aten.one_hot.default)
def one_hot(c: Context, x: Value, classes: int = -1) -> Value:
    if classes == -1:
        c.fail("the number of classes depends on data; give num_classes")
    rank = x.tensor.rank + 1
    return c.cast(c(ops.Eq, c.unsqueeze(x, -1), c.iota(classes, rank - 1, rank)), DType.i64)
