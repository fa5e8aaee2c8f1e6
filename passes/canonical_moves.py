"""``reshape(reshape(x))`` -> ``reshape(x)``, ``slice(concat(a, b))`` -> ``a``: movement that moves nothing or twice."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from tilewright.ir import Dim, Pattern, Rewriter, Shape, Value, as_dim, ops, same_dim
from tilewright.passes.match import is_one, made_by, padded, replace, same_shape, scalar, used_once


def known_elements(op: ops.Reshape | ops.Transpose | ops.Broadcast | ops.Slice | ops.Cast, rw: Rewriter) -> None:
    """Any movement of a tensor of equal elements -> that tensor in the new shape."""
    number = scalar(op.x)
    if number is None:
        return
    with np.errstate(all="ignore"):
        number = np.asarray(number).astype(op.x.dtype.np).astype(op.result.dtype.np).item()
    replace(rw, op, ops.Full(op.result.shape, number, op.result.dtype))


def reshapes(op: ops.Reshape, rw: Rewriter) -> None:
    """A reshape to the same shape -> its operand; of a reshape -> one reshape."""
    inner = made_by(op.x, ops.Reshape)
    if same_shape(op.shape, op.x.shape):
        replace(rw, op, op.x)
    elif inner is not None:
        replace(rw, op, ops.Reshape(inner.x, op.shape))


def broadcasts(op: ops.Broadcast, rw: Rewriter) -> None:
    """A broadcast to the same shape -> its operand; to ones in front -> a reshape; of a broadcast -> one broadcast."""
    inner, regrouped = made_by(op.x, ops.Broadcast), made_by(op.x, ops.Reshape)
    lead = len(op.shape) - op.x.tensor.rank
    if same_shape(op.shape, op.x.shape):
        replace(rw, op, op.x)
    elif inner is not None:
        replace(rw, op, ops.Broadcast(inner.x, op.shape))
    elif all(map(is_one, op.shape[:lead])) and same_shape(op.shape[lead:], op.x.shape):
        replace(rw, op, ops.Reshape(op.x, op.shape))
    elif regrouped is not None and same_shape(padded(regrouped.x.shape, len(regrouped.shape)), regrouped.shape):
        replace(rw, op, ops.Broadcast(regrouped.x, op.shape))


def covers(op: ops.Slice) -> bool:
    """Whether a slice takes all of its operand."""
    ranges = zip(op.starts, op.stops, op.steps, op.x.shape)
    return all(is_zero(a) and same_dim(b, n) and s == 1 for a, b, s, n in ranges)


def is_zero(dim: Dim) -> bool:
    return isinstance(dim, int) and dim == 0


def slices(op: ops.Slice, rw: Rewriter) -> None:
    """A slice of everything -> its operand; of a slice -> one slice."""
    inner = made_by(op.x, ops.Slice)
    if covers(op):
        replace(rw, op, op.x)
    elif inner is not None and not any(map(is_zero, op.result.shape)):
        starts = [as_dim(a + b * s) for a, b, s in zip(inner.starts, op.starts, inner.steps)]
        steps = [a * b for a, b in zip(inner.steps, op.steps)]
        # the last element taken, plus one: a stop that overshoots by part of a step would leave the operand
        stops = [as_dim(a + (n - 1) * s + 1) for a, n, s in zip(starts, op.result.shape, steps)]
        replace(rw, op, ops.Slice(inner.x, tuple(starts), tuple(stops), tuple(steps)))


def slice_of_concat(op: ops.Slice, rw: Rewriter) -> None:
    """A slice that falls into one part of a concatenation -> a slice of that part."""
    concat = made_by(op.x, ops.Concat)
    if concat is None:
        return
    axis, offset = concat.axis, as_dim(0)
    for part in concat.xs:
        start, stop = as_dim(op.starts[axis] - offset), as_dim(op.stops[axis] - offset)
        if _inside(start, stop, part.shape[axis]):
            starts, stops = _with(op.starts, axis, start), _with(op.stops, axis, stop)
            replace(rw, op, ops.Slice(part, starts, stops, op.steps))
            return
        offset = as_dim(offset + part.shape[axis])


def _inside(start: Dim, stop: Dim, size: Dim) -> bool:
    low = isinstance(start, int) and start >= 0
    return low and (same_dim(stop, size) or (isinstance(stop, int) and isinstance(size, int) and stop <= size))


def _with(dims: Shape, axis: int, dim: Dim) -> Shape:
    return (*dims[:axis], dim, *dims[axis + 1 :])


def slice_of_broadcast(op: ops.Slice, rw: Rewriter) -> None:
    """A slice of repeated elements -> repeat less of them."""
    inner = made_by(op.x, ops.Broadcast)
    if inner is None:
        return
    lead = len(inner.shape) - inner.x.tensor.rank
    whole = [(is_zero(a) and same_dim(b, n) and s == 1) for a, b, s, n in zip(op.starts, op.stops, op.steps, inner.shape)]
    cut = [i for i in range(inner.x.tensor.rank) if not whole[lead + i] and not is_one(inner.x.shape[i])]
    x: Value = inner.x
    if cut:
        keep: list[Any] = [
            (op.starts[lead + i], op.stops[lead + i], op.steps[lead + i]) if i in cut else (0, n, 1)
            for i, n in enumerate(x.shape)
        ]
        starts, stops, steps = zip(*keep)
        x = rw.before(op).add(ops.Slice(x, starts, stops, steps))
    replace(rw, op, ops.Broadcast(x, op.result.shape))


def slice_of_unary(op: ops.Slice, rw: Rewriter) -> None:
    """``slice(exp(x))`` -> ``exp(slice(x))``: compute what is taken."""
    inner = op.x.owner
    if isinstance(inner, (ops.Unary, ops.Cast)) and used_once(op.x):
        part = rw.before(op).add(ops.Slice(inner.x, op.starts, op.stops, op.steps))
        replace(rw, op, inner.clone({inner.x: part}))


def concats(op: ops.Concat, rw: Rewriter) -> None:
    """A concatenation of one -> it; of concatenations along one axis -> one; of neighbouring slices -> one slice."""
    nested = [made_by(x, ops.Concat) for x in op.xs]
    filled = tuple(x for x in op.xs if not is_zero(x.shape[op.axis]))
    if len(op.xs) == 1:
        replace(rw, op, op.xs[0])
    elif 0 < len(filled) < len(op.xs):
        replace(rw, op, ops.Concat(filled, op.axis))
    elif any(n is not None and n.axis == op.axis for n in nested):
        flat = [n.xs if n is not None and n.axis == op.axis else (x,) for n, x in zip(nested, op.xs)]
        replace(rw, op, ops.Concat(tuple(x for xs in flat for x in xs), op.axis))
    else:
        join_slices(op, rw)


def join_slices(op: ops.Concat, rw: Rewriter) -> None:
    """``concat(x[a:b], x[b:c])`` -> ``x[a:c]``."""
    parts = [made_by(x, ops.Slice) for x in op.xs]
    first = parts[0]
    for left, right in pairwise(parts):
        if left is None or right is None or left.x is not right.x or not adjoin(left, right, op.axis):
            return
    last = parts[-1]
    if first is not None and last is not None:
        stops = _with(first.stops, op.axis, last.stops[op.axis])
        replace(rw, op, ops.Slice(first.x, first.starts, stops, first.steps))


def adjoin(left: ops.Slice, right: ops.Slice, axis: int) -> bool:
    """Whether ``right`` goes on along ``axis`` where ``left`` ends."""

    def same(i: int) -> bool:
        return same_dim(left.starts[i], right.starts[i]) and same_dim(left.stops[i], right.stops[i])

    others = all(same(i) for i in range(len(left.starts)) if i != axis)
    unit = left.steps == right.steps and left.steps[axis] == 1
    return others and unit and same_dim(left.stops[axis], right.starts[axis])


PATTERNS: tuple[Pattern, ...] = (
    known_elements,
    reshapes,
    broadcasts,
    slices,
    slice_of_concat,
    slice_of_broadcast,
    slice_of_unary,
    concats,
)
