"""ATen: views, joins, splits, padding. The IR has no strides, so a view is a reshape and a copy is nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tilewright.frontend.table import Context, axes_of, axis_of, lowers
from tilewright.ir import ops
from tilewright.ir.core import Value
from tilewright.ir.types import Dim, DType, as_dim, same_dim

aten = torch.ops.aten

# ---- shape ---------------------------------------------------------------------------------------------------------


@lowers(
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.view_as.default,
)
def reshape(c: Context, x: Value, *_: Any) -> Value:
    return c.reshape(x, c.out.shape)


@lowers(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def expand(c: Context, x: Value, *_: Any, **__: Any) -> Value:
    return c.broadcast(x, c.out.shape)


@lowers(aten.transpose.int)
def transpose(c: Context, x: Value, a: int, b: int) -> Value:
    return x if x.tensor.rank == 0 else c.swap(x, axis_of(x, a), axis_of(x, b))


@lowers(aten.t.default, aten.numpy_T.default)
def reverse_axes(c: Context, x: Value) -> Value:
    return c.transpose(x, range(x.tensor.rank)[::-1])


@lowers(aten.mT.default)
def matrix_transpose(c: Context, x: Value) -> Value:
    return c.swap(x, x.tensor.rank - 2, x.tensor.rank - 1)


@lowers(aten.permute.default)
def permute(c: Context, x: Value, dims: Sequence[int]) -> Value:
    return c.transpose(x, [axis_of(x, d) for d in dims])


@lowers(aten.movedim.intlist)
def movedim(c: Context, x: Value, source: Sequence[int], target: Sequence[int]) -> Value:
    taken = dict(zip((axis_of(x, t) for t in target), (axis_of(x, s) for s in source)))
    rest = iter(a for a in range(x.tensor.rank) if a not in taken.values())
    return c.transpose(x, [taken[i] if i in taken else next(rest) for i in range(x.tensor.rank)])


# ---- parts ---------------------------------------------------------------------------------------------------------


def _from_front(x: Value, axis: int, index: Dim) -> Dim:
    """``index`` counted from the front where it is a negative number."""
    return as_dim(x.shape[axis] + index) if isinstance(index, int) and index < 0 else index


@lowers(aten.slice.Tensor)
def slice_(c: Context, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    """Bounds outside of the axis are clamped by torch; the size that it found is the one that counts."""
    axis = axis_of(x, dim)
    size, total = c.out.shape[axis], x.shape[axis]
    if same_dim(size, total) and step == 1:
        return x
    first = _from_front(x, axis, 0 if start is None else start)
    if isinstance(first, int) and first < 0:
        first = 0  # further to the front than the axis is long
    elif not isinstance(first, int) and isinstance(start, int):
        first = as_dim(total - size) if step == 1 and end in (None, torch.iinfo(torch.int64).max) else first
    return c.slice(x, axis, first, size, step)


@lowers(aten.narrow.default)
def narrow(c: Context, x: Value, dim: int, start: Dim, length: Dim) -> Value:
    axis = axis_of(x, dim)
    return c.slice(x, axis, _from_front(x, axis, start), length)


@lowers(aten.select.int)
def select(c: Context, x: Value, dim: int, index: Dim) -> Value:
    axis = axis_of(x, dim)
    return c.reshape(c.slice(x, axis, _from_front(x, axis, index), 1), c.out.shape)


@lowers(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.tensor_split.sections)
def split(c: Context, x: Value, _: Any, dim: int = 0) -> list[Value]:
    """Into pieces as long as torch found them to be."""
    axis, at, out = axis_of(x, dim), as_dim(0), []
    for piece in c.node.meta["val"]:
        size = c.type_of(piece).shape[axis]
        out.append(c.slice(x, axis, at, size))
        at = as_dim(at + size)
    return out


@lowers(aten.unbind.int)
def unbind(c: Context, x: Value, dim: int = 0) -> list[Value]:
    axis = axis_of(x, dim)
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    return [c.reshape(c.slice(x, axis, i, 1), shape) for i in range(len(c.node.meta["val"]))]


@lowers(aten.diff.default)
def diff(
    c: Context, x: Value, n: int = 1, dim: int = -1, prepend: Value | None = None, append: Value | None = None
) -> Value:
    axis = axis_of(x, dim)
    x = c.concat([v for v in (prepend, x, append) if v is not None], axis)
    for _ in range(n):
        size = as_dim(x.shape[axis] - 1)
        x = c(ops.Sub, c.slice(x, axis, 1, size), c.slice(x, axis, 0, size))
    return x


# ---- joins and copies ----------------------------------------------------------------------------------------------


@lowers(aten.cat.default, aten.concat.default, aten.concatenate.default)
def cat(c: Context, xs: Sequence[Value], dim: int = 0) -> Value:
    rank, dtype = c.out.rank, c.out.dtype
    kept = [c.cast(x, dtype) for x in xs if x.tensor.rank == rank]  # torch lets empty vectors join anything
    return c.concat(kept, dim % rank)


@lowers(aten.stack.default)
def stack(c: Context, xs: Sequence[Value], dim: int = 0) -> Value:
    axis = dim % c.out.rank
    return c.concat([c.unsqueeze(c.cast(x, c.out.dtype), axis) for x in xs], axis)


@lowers(aten.repeat.default, aten.tile.default)
def repeat(c: Context, x: Value, repeats: Sequence[Dim]) -> Value:
    """Each axis as a pair (copy, element), broadcast and joined."""
    repeats = [1] * (x.tensor.rank - len(repeats)) + list(repeats)
    shape = [1] * (len(repeats) - x.tensor.rank) + list(x.shape)
    pairs = [(r, n) for r, n in zip(repeats, shape)]
    spread = c.reshape(x, [d for _, n in pairs for d in (1, n)])
    return c.reshape(c.broadcast(spread, [d for pair in pairs for d in pair]), c.out.shape)


@lowers(aten.repeat_interleave.self_int)
def repeat_interleave(c: Context, x: Value, repeats: Dim, dim: int | None = None, output_size: Any = None) -> Value:
    if dim is None:
        x, dim = c.reshape(x, (x.tensor.elements,)), 0
    axis = axis_of(x, dim)
    spread = c.unsqueeze(x, axis + 1)
    wide = c.broadcast(spread, (*x.shape[: axis + 1], repeats, *x.shape[axis + 1 :]))
    return c.reshape(wide, c.out.shape)


@lowers(aten.flip.default)
def flip(c: Context, x: Value, dims: Sequence[int]) -> Value:
    for axis in axes_of(x, dims):
        size = x.shape[axis]
        index = c(ops.Iota, size, DType.i64, as_dim(size - 1), -1)
        x = c(ops.Gather, x, index, axis)
    return x


@lowers(aten.roll.default)
def roll(c: Context, x: Value, shifts: Sequence[int], dims: Sequence[int] = ()) -> Value:
    if not dims:
        flat = _rolled(c, c.reshape(x, (x.tensor.elements,)), 0, shifts[0])
        return c.reshape(flat, x.shape)
    for shift, dim in zip(shifts, dims):
        x = _rolled(c, x, axis_of(x, dim), shift)
    return x


def _rolled(c: Context, x: Value, axis: int, shift: int) -> Value:
    size = x.shape[axis]
    if isinstance(size, int):
        shift %= size
    elif shift < 0:
        c.fail(f"rolls an axis of varying size {size} by {shift}; make that axis static")
    rest = as_dim(size - shift)
    return c.concat([c.slice(x, axis, rest, shift), c.slice(x, axis, 0, rest)], axis)


@lowers(aten.copy.default)
def copy(c: Context, x: Value, source: Value, *_: Any) -> Value:
    return c.broadcast(c.cast(source, x.dtype), x.shape)


@lowers(aten.slice_scatter.default)
def slice_scatter(
    c: Context, x: Value, src: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    """What stands before the slice, the new part, what stands behind."""
    axis = axis_of(x, dim)
    if step != 1:
        c.fail(f"writes every {step}th element of a slice; write whole ranges")
    first = _from_front(x, axis, 0 if start is None else start)
    return _replaced(c, x, c.cast(src, x.dtype), axis, first, src.shape[axis])


@lowers(aten.select_scatter.default)
def select_scatter(c: Context, x: Value, src: Value, dim: int, index: Dim) -> Value:
    axis = axis_of(x, dim)
    row = c.unsqueeze(c.cast(src, x.dtype), axis)
    return _replaced(c, x, row, axis, _from_front(x, axis, index), 1)


def _replaced(c: Context, x: Value, part: Value, axis: int, first: Dim, size: Dim) -> Value:
    after = as_dim(first + size)
    rest = as_dim(x.shape[axis] - after)
    pieces = [] if same_dim(first, 0) else [c.slice(x, axis, 0, first)]
    pieces.append(part)
    pieces += [] if same_dim(rest, 0) else [c.slice(x, axis, after, rest)]
    return c.concat(pieces, axis)


# ---- padding -------------------------------------------------------------------------------------------------------


@lowers(aten.constant_pad_nd.default)
def constant_pad(c: Context, x: Value, pad: Sequence[Dim], value: Any = 0) -> Value:
    """``pad`` lists (before, after) from the last axis on; a negative pad cuts off."""
    for i in range(0, len(pad), 2):
        x = _padded(c, x, x.tensor.rank - 1 - i // 2, pad[i], pad[i + 1], value)
    return x


def _padded(c: Context, x: Value, axis: int, before: Dim, after: Dim, value: Any) -> Value:
    cut = [-p if isinstance(p, int) and p < 0 else 0 for p in (before, after)]
    if any(cut):
        x = c.slice(x, axis, cut[0], as_dim(x.shape[axis] - sum(cut)))
    low, high = (0 if isinstance(p, int) and p < 0 else p for p in (before, after))
    if same_dim(low, 0) and same_dim(high, 0):
        return x
    none = [0] * x.tensor.rank
    value = bool(value) if x.dtype is DType.bool else float(value) if x.dtype.is_float else int(value)
    return c(ops.Pad, x, (*none[:axis], low, *none[axis + 1 :]), (*none[:axis], high, *none[axis + 1 :]), value)


@lowers(aten.pad.default)
def pad(c: Context, x: Value, pad: Sequence[Dim], mode: str = "constant", value: Any = None) -> Value:
    if mode == "constant":
        return constant_pad(c, x, pad, 0 if value is None else value)
    for i in range(0, len(pad), 2):
        axis = x.tensor.rank - 1 - i // 2
        x = c(ops.Gather, x, _border(c, x, axis, pad[i], pad[i + 1], mode), axis)
    return x


@lowers(aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default)
def reflection_pad(c: Context, x: Value, padding: Sequence[Dim]) -> Value:
    return pad(c, x, padding, "reflect")


@lowers(aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default)
def replication_pad(c: Context, x: Value, padding: Sequence[Dim]) -> Value:
    return pad(c, x, padding, "replicate")


def _border(c: Context, x: Value, axis: int, before: Dim, after: Dim, mode: str) -> Value:
    """For each place of the padded axis, which element of ``x`` stands there."""
    size = x.shape[axis]
    place = c(ops.Iota, as_dim(size + before + after), DType.i64, as_dim(-before))
    zero, last = c.value(0, DType.i64), c.value(as_dim(size - 1), DType.i64)
    if mode == "replicate":
        return c(ops.Minimum, c(ops.Maximum, place, zero), last)
    if mode == "circular":
        return c(ops.Mod, place, c.value(size, DType.i64))
    if mode != "reflect":
        c.fail(f"padding mode {mode!r}; there are constant, replicate, circular, reflect")
    inside = c(ops.Abs, place)
    return c(ops.Sub, last, c(ops.Abs, c(ops.Sub, last, inside)))
