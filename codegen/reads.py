"""Where each operation reads its operands: index of a result -> operands and their indices. Emits nothing.

Both the planner (to see what the accesses of a loop nest look like) and the evaluator (to emit them) follow these
rules. Operations that choose between operands or loop over them are left out; the two walkers handle those themselves.
"""

from __future__ import annotations

from collections.abc import Callable

from tilewright.codegen.index import Index, Poly, floor_div, modulo
from tilewright.codegen.index_shapes import delinear, linear, size
from tilewright.ir import Dim, Function, Op, Shape, Value, ops

Read = tuple[Value, Index]
Pick = Callable[[Value, Index, Dim], Poly]
"""Turns data into an index: (the tensor of indices, where to read it, the size it must lie in) -> index."""

ROWS = (ops.Softmax, ops.LayerNorm, ops.RmsNorm, ops.GroupNorm)
FOLDS = (ops.Reduce, ops.ArgMax)
CREATION = (ops.Full, ops.Iota, ops.SizeOf)
PIECES = (ops.Concat, ops.Pad)
DECODING = (ops.Dequantize, ops.Lookup, ops.Expand)


def broadcast_index(index: Index, shape: Shape) -> Index:
    """Where a broadcast operand of ``shape`` is read for a result's ``index``."""
    tail = index[len(index) - len(shape):]
    return tuple(Poly() if dim == 1 else i for i, dim in zip(tail, shape))


def _elementwise(op: Op, index: Index, pick: Pick) -> list[Read]:
    return [(v, broadcast_index(index, v.shape)) for v in op.operands]


def _reshape(op: ops.Reshape, index: Index, pick: Pick) -> list[Read]:
    return [(op.x, delinear(linear(index, op.result.shape), op.x.shape))]


def _transpose(op: ops.Transpose, index: Index, pick: Pick) -> list[Read]:
    return [(op.x, tuple(index[op.perm.index(axis)] for axis in range(len(index))))]


def _slice(op: ops.Slice, index: Index, pick: Pick) -> list[Read]:
    return [(op.x, tuple(size(start) + i * step for i, start, step in zip(index, op.starts, op.steps)))]


def _gather(op: ops.Gather, index: Index, pick: Pick) -> list[Read]:
    rank = len(op.indices.shape)
    place = index[op.axis:op.axis + rank]
    chosen = pick(op.indices, place, op.x.shape[op.axis])
    return [(op.x, (*index[:op.axis], chosen, *index[op.axis + rank:]))]


def _take_along(op: ops.TakeAlong, index: Index, pick: Pick) -> list[Read]:
    chosen = pick(op.indices, index, op.x.shape[op.axis])
    return [(op.x, (*index[:op.axis], chosen, *index[op.axis + 1:]))]


def _gather_nd(op: ops.GatherND, index: Index, pick: Pick) -> list[Read]:
    rank = len(index) - (len(op.x.shape) - len(op.indices))
    chosen = [pick(v, broadcast_index(index[:rank], v.shape), n) for v, n in zip(op.indices, op.x.shape)]
    return [(op.x, (*chosen, *index[rank:]))]


def _embedding(op: ops.Embedding, index: Index, pick: Pick) -> list[Read]:
    return [(op.table, (pick(op.indices, index[:-1], op.table.shape[0]), index[-1]))]


def _dequantize(op: ops.Dequantize | ops.Expand, index: Index, pick: Pick) -> list[Read]:
    return [(op.codes, index), *((v, _group(op.codes, v, index)) for v in op.operands[1:])]


def _lookup(op: ops.Lookup, index: Index, pick: Pick) -> list[Read]:
    row = Poly() if op.table.shape[0] == 1 else index[-2]
    found = [(op.table, (row, pick(op.codes, index, op.table.shape[1])))]
    return found if op.scale is None else [*found, (op.scale, _group(op.codes, op.scale, index))]


def _group(codes: Value, scale: Value, index: Index) -> Index:
    """Where the scale of an element is."""
    *lead, at = index
    groups = scale.shape[-1]
    return (*lead, Poly() if groups == 1 else floor_div(at, int(codes.shape[-1]) // int(groups)))


_RULES: dict[type[Op], Callable[..., list[Read]]] = {
    ops.Reshape: _reshape,
    ops.Transpose: _transpose,
    ops.Broadcast: _elementwise,
    ops.Slice: _slice,
    ops.Gather: _gather,
    ops.TakeAlong: _take_along,
    ops.GatherND: _gather_nd,
    ops.Embedding: _embedding,
    ops.Dequantize: _dequantize,
    ops.Expand: _dequantize,
    ops.Lookup: _lookup,
}


def is_move(op: Op) -> bool:
    """Whether the op hands on one element of one operand."""
    return type(op) in _RULES and not isinstance(op, DECODING)


def only_moves(kernel: Function) -> bool:
    """Whether a kernel computes nothing: elements go from arguments to results as they are."""
    return all(is_move(op) or isinstance(op, (*PIECES, ops.Full)) for op in kernel.body[:-1])


def is_plain(op: Op) -> bool:
    """Whether ``reads`` knows the operation."""
    return type(op) in _RULES or isinstance(op, ops.Elementwise)


def reads(op: Op, index: Index, pick: Pick) -> list[Read]:
    """The elements that element ``index`` of the op's result is made of; ``pick`` turns data into an index."""
    return _RULES.get(type(op), _elementwise)(op, index, pick)


def picks_data(op: Op) -> bool:
    """Whether an operand tells where to read."""
    return isinstance(op, (ops.Gather, ops.TakeAlong, ops.GatherND, ops.Embedding))


def tables(op: Op) -> tuple[Value, ...]:
    """Operands that are read at places found in data."""
    if not picks_data(op):
        return ()
    return (op.table,) if isinstance(op, ops.Embedding) else (op.operands[0],)


def quantize_group(op: ops.Quantize, at: Poly) -> Poly:
    """The number of the group that element ``at`` of a row belongs to."""
    return floor_div(at, op.group) if op.group else Poly()


# --- rope ---------------------------------------------------------------------------------------------------------


def rotated(op: ops.Rope) -> int:
    """Elements that turn; a multiple of 2."""
    return int(op.cos.shape[2])


def rope_angle(op: ops.Rope, index: Index) -> Index:
    """Where cos and sin are read."""
    return (Poly() if op.cos.shape[0] == 1 else index[0], index[1], index[3])


def rope_partner(op: ops.Rope, index: Index, low: bool) -> Index:
    """The other element of the pair of ``index``; ``low`` says which of them ``index`` is (``half`` only)."""
    d = index[3]
    if op.style == "half":
        other = d + (rotated(op) // 2 if low else -(rotated(op) // 2))
    else:
        other = d + 1 - modulo(d, 2) * 2
    return (*index[:3], other)


# --- rows and folds -----------------------------------------------------------------------------------------------


def without(index: Index, axes: tuple[int, ...]) -> Index:
    return tuple(i for axis, i in enumerate(index) if axis not in axes)


def fold_axes(op: Op) -> tuple[int, ...]:
    """Axes of the operand that an operation loops over for one value."""
    match op:
        case ops.Reduce(axes=axes):
            return tuple(sorted(axes))
        case ops.ArgMax(axis=axis) | ops.Softmax(axis=axis):
            return (axis,)
        case ops.GroupNorm():
            return tuple(range(1, len(op.x.shape)))
    return (len(op.operands[0].shape) - 1,)


def is_trailing(op: Op) -> bool:
    """Whether the loop runs along the contiguous axis."""
    return fold_axes(op)[-1] == len(op.operands[0].shape) - 1


def fold_extents(op: Op) -> list[Dim]:
    """Sizes of the loops over one row of ``op``."""
    shape = op.operands[0].shape
    if isinstance(op, ops.GroupNorm):
        return [int(shape[1]) // op.groups, *shape[2:]]
    return [shape[axis] for axis in fold_axes(op)]


def row_of(op: Op, index: Index) -> Index:
    """What tells the row apart that the result at ``index`` belongs to."""
    if isinstance(op, ops.GroupNorm):
        return (index[0], floor_div(index[1], int(op.x.shape[1]) // op.groups))
    if isinstance(op, FOLDS):
        if not op.keepdim:
            return index
        return without(index, fold_axes(op))
    return without(index, fold_axes(op))


def row_element(op: Op, row: Index, at: Index) -> Index:
    """The operand's index of element ``at`` of a row."""
    if isinstance(op, ops.GroupNorm):
        channels = int(op.x.shape[1]) // op.groups
        return (row[0], row[1] * channels + at[0], *at[1:])
    axes, out, rest = fold_axes(op), [], list(row)
    for axis in range(len(op.operands[0].shape)):
        out.append(at[axes.index(axis)] if axis in axes else rest.pop(0))
    return tuple(out)


def row_weights(op: Op, index: Index) -> list[Read]:
    """Scale and shift of a normalisation at ``index``."""
    axis = 1 if isinstance(op, ops.GroupNorm) else len(index) - 1
    return [(v, (index[axis],)) for v in op.operands[1:]]


# --- pieces -------------------------------------------------------------------------------------------------------


def concat_pieces(op: ops.Concat, index: Index) -> list[tuple[Poly, Poly, Read]]:
    """Each operand with the range of the axis it covers, and where it is read."""
    out, start = [], Poly()
    for x in op.xs:
        stop = start + size(x.shape[op.axis])
        place = (*index[:op.axis], index[op.axis] - start, *index[op.axis + 1:])
        if x.shape[op.axis] != 0:
            out.append((start, stop, (x, place)))
        start = stop
    return out


def pad_ranges(op: ops.Pad, index: Index) -> list[tuple[Poly, Poly, Poly]]:
    """(index, first, past the last) of each axis that is padded."""
    out = []
    for i, low, high, n in zip(index, op.low, op.high, op.x.shape):
        if low != 0 or high != 0:
            out.append((i, size(low), size(low) + size(n)))
    return out


def pad_read(op: ops.Pad, index: Index) -> Read:
    return op.x, tuple(i - size(low) for i, low in zip(index, op.low))
