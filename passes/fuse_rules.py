"""What may share a kernel. The emitters can lower every group that these rules allow."""

from __future__ import annotations

from collections.abc import Collection

from tilewright.ir import Op, ops, same_dim
from tilewright.ir.types import Shape

_ANCHORS = (
    ops.Linear,
    ops.GatedLinear,
    ops.Matmul,
    ops.Attention,
    ops.Attend,
    ops.Append,
    ops.Select,
    ops.Choose,
    ops.Conv,
    ops.Experts,
    ops.MaxPool,
    ops.AvgPool,
    ops.AdaptiveAvgPool,
    ops.Resize,
    ops.Sort,
    ops.TopK,
    ops.CumSum,
    ops.ScatterND,
    ops.ScatterAlong,
)
_CREATION = (ops.Full, ops.Iota, ops.SizeOf)
_ROW = (ops.Softmax, ops.LayerNorm, ops.RmsNorm, ops.GroupNorm)
_REDUCING = (*_ROW, ops.Reduce, ops.ArgMax, ops.Quantize)
_LAYERS = (ops.Linear, ops.GatedLinear)
_MOVES = (ops.Transpose, ops.Broadcast, ops.Slice, ops.Gather, ops.GatherND, ops.TakeAlong, ops.Embedding)
_LONGEST_ROW = 16384
DECODING = (ops.Dequantize, ops.Lookup, ops.Expand, ops.Decompress, ops.SparseExpand)
"""What makes numbers of the parts of a quantized tensor."""


def is_anchor(op: Op) -> bool:
    """Operations with an emitter of their own; others only trail them."""
    return isinstance(op, _ANCHORS)


def is_creation(op: Op) -> bool:
    """Constants and index ranges: cheaper to make again than to load."""
    return isinstance(op, _CREATION)


def is_copied(op: Op, user: Op) -> bool:
    """Whether ``user`` takes its own copy of ``op`` into its kernel: a weight or an input that it dequantizes itself, an
    input whose small elements it leaves out."""
    if isinstance(op, ops.Expand):
        return isinstance(user, ops.Dequantize)
    if isinstance(op, ops.SparseExpand) and isinstance(user, ops.Dequantize):
        return True
    if isinstance(op, ops.Threshold):
        return isinstance(user, _LAYERS) and user.operands[0] is op.result and list(user.operands).count(op.result) == 1
    return isinstance(op, DECODING) and isinstance(user, (*_LAYERS, ops.Embedding))


def leads(op: Op) -> bool:
    """Whether ``op`` makes elements zero for linear layers alone, each of which takes it into its kernel."""
    return isinstance(op, ops.Threshold) and all(is_copied(op, user) for user in op.result.users)


def is_rotated_by(op: Op, user: Op) -> bool:
    """Whether the attention kernel of ``user`` does the rotation ``op`` on the way: of queries, and of keys to append."""
    if not isinstance(op, ops.Rope) or len(op.result.users) != 1:
        return False
    turned = user.k if isinstance(user, ops.Append) else user.q if isinstance(user, (ops.Attend, ops.Attention)) else None
    return turned is op.result and list(user.operands).count(op.result) == 1


def may_trail(anchor: Op, op: Op) -> bool:
    """Whether ``op`` can run on each result tile of a linear layer before it is stored."""
    if not isinstance(anchor, _LAYERS) or not isinstance(op, ops.Elementwise) or leads(op):
        return False
    if isinstance(op, (ops.Where, ops.Compare)) or not op.result.dtype.is_float:
        return False
    shape = anchor.result.shape
    return _same(op.result.shape, shape) and all(_column_or_full(v.shape, shape) for v in op.operands)


def _same(a: Shape, b: Shape) -> bool:
    return len(a) == len(b) and all(map(same_dim, a, b))


def _column_or_full(shape: Shape, full: Shape) -> bool:
    """A scalar, one value a column, or one value an element."""
    lead, last = shape[:-1], shape[-1:]
    return _same(shape, full) or (all(d == 1 for d in lead) and (last in ((), (1,)) or same_dim(last[0], full[-1])))


def may_pull(op: Op, group: Collection[Op]) -> bool:
    """Whether a loop kernel may compute ``op`` where a member of ``group`` reads it."""
    users = [u for r in op.results for u in r.users]
    if any(isinstance(u, (ops.Concat, ops.Pad)) for u in users):
        return isinstance(op, (ops.Elementwise, ops.Broadcast, ops.Slice))
    if isinstance(op, _ROW):
        shape = op.result.shape
        plain = all(isinstance(m, (ops.Elementwise, ops.Quantize)) and _same(m.results[0].shape, shape) for m in group)
        return plain and _short_row(op)
    if not isinstance(op, (ops.Elementwise, *_MOVES)):
        return False
    reducers = [m for m in group if isinstance(m, _REDUCING)]
    return not reducers or (isinstance(op, (ops.Elementwise, ops.Broadcast, ops.Slice)) and all(map(_short_row, reducers)))


def _short_row(op: Op) -> bool:
    """A static last axis that fits a buffer on the stack."""
    last = op.operands[0].shape[-1:]
    return bool(last) and isinstance(last[0], int) and last[0] <= _LONGEST_ROW


def is_view_of_columns(op: Op) -> bool:
    """A slice of whole columns, or the reshape that splits it into heads: attention kernels read through it."""
    if isinstance(op, ops.Reshape):
        source = op.x.owner
        return source is not None and isinstance(source, ops.Slice) and is_view_of_columns(source)
    if not isinstance(op, ops.Slice) or any(s != 1 for s in op.steps):
        return False
    whole = zip(op.starts[:-1], op.stops[:-1], op.x.shape[:-1])
    return all(a == 0 and same_dim(b, n) for a, b, n in whole) and isinstance(op.x.shape[-1], int)
