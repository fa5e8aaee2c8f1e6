"""Some of the heads of a value ``[B, S, H, D]``, taken as near to where they are made as can be.

    rope(reshape(slice(x)))   ->   rope(reshape(slice'(x)))

so that attention kernels still read queries, keys and values where a projection left them.
"""

from __future__ import annotations

from tilewright.ir import Builder, Dim, Value, ops
from tilewright.passes.match import same_shape

HEADS = 2
_THROUGH = (ops.Rope, ops.RmsNorm, ops.LayerNorm, ops.Cast)
"""What treats each head of its first operand alone."""


def heads_of(b: Builder, value: Value, start: int, stop: int) -> Value:
    """The heads ``[start, stop)`` of ``value`` ``[B, S, H, D]``."""
    op = value.owner
    if (start, stop) == (0, value.shape[HEADS]):
        return value
    if isinstance(op, _THROUGH):
        return b.insert(op.clone({op.x: heads_of(b, op.x, start, stop)})).results[0]
    if isinstance(op, ops.Reshape) and op.x.tensor.rank == 3 and same_shape(op.x.shape[:2], op.shape[:2]):
        size = int(value.shape[3])
        columns = along(b, op.x, 2, start * size, stop * size)
        return b(ops.Reshape, columns, (*op.shape[:2], stop - start, size))
    return along(b, value, HEADS, start, stop)


def along(b: Builder, value: Value, axis: int, start: int, stop: int) -> Value:
    """``[start, stop)`` of one axis; of a slice, what it is of the slice's operand."""
    op, inner = value.owner, 0
    if isinstance(op, ops.Slice) and _cuts_only(op, axis):
        value, inner = op.x, int(op.starts[axis])
    rank = value.tensor.rank
    starts: list[Dim] = [inner + start if i == axis else 0 for i in range(rank)]
    stops: list[Dim] = [inner + stop if i == axis else d for i, d in enumerate(value.shape)]
    return b(ops.Slice, value, tuple(starts), tuple(stops), (1,) * rank)


def _cuts_only(op: ops.Slice, axis: int) -> bool:
    """Whether a slice takes a run of one axis and all of the others."""
    before, after = (shape[:axis] + shape[axis + 1 :] for shape in (op.x.shape, op.result.shape))
    return same_shape(before, after) and op.steps[axis] == 1 and isinstance(op.starts[axis], int)
