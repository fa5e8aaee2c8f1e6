"""``f(transpose(x))`` -> ``transpose(f(x))``: transposes sink towards each other, where two of them cancel.

Only sinking, never both ways: rewriting ends, and a transpose that meets no partner stands before what needs it.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilewright.ir import Op, Pattern, Rewriter, Value, ops
from tilewright.passes.match import made_by, padded, replace, same_shape, used_once

Perm = tuple[int, ...]


def inverse(perm: Sequence[int]) -> Perm:
    return tuple(perm.index(i) for i in range(len(perm)))


def _moves_only_ones(shape: Sequence[object], perm: Sequence[int]) -> bool:
    """Whether the axes of a size other than one keep their order."""
    order = [p for p in perm if shape[p] != 1]
    return order == sorted(order)


def transposes(op: ops.Transpose, rw: Rewriter) -> None:
    """Of nothing -> the operand; of a transpose -> one transpose; of axes of size one -> a reshape."""
    inner = made_by(op.x, ops.Transpose)
    if op.perm == tuple(range(len(op.perm))):
        replace(rw, op, op.x)
    elif inner is not None:
        replace(rw, op, ops.Transpose(inner.x, tuple(inner.perm[p] for p in op.perm)))
    elif _moves_only_ones(op.x.shape, op.perm):
        replace(rw, op, ops.Reshape(op.x, op.result.shape))


def untransposed(value: Value, perm: Perm, rw: Rewriter, at: Op) -> Value | None:
    """What gives ``value`` when transposed by ``perm``, if it costs nothing to have."""
    source, repeat = made_by(value, ops.Transpose), made_by(value, ops.Broadcast)
    if source is not None and source.perm == perm:
        return source.x
    if repeat is not None and len(repeat.x.shape) == len(perm):
        inner = untransposed(repeat.x, perm, rw, at)
        back = inverse(perm)
        return inner and rw.before(at).add(ops.Broadcast(inner, tuple(repeat.shape[p] for p in back)))
    shape = padded(value.shape, len(perm))
    back = inverse(perm)
    if not _moves_only_ones(shape, back):
        return None
    moved = tuple(shape[p] for p in back)
    if not value.shape or same_shape(padded(value.shape, len(perm)), moved):
        return value
    return rw.before(at).add(ops.Reshape(value, moved))


def sinking(values: Sequence[Value]) -> ops.Transpose | None:
    """The first transpose among ``values`` that has no other user."""
    found = [made_by(v, ops.Transpose) for v in values if used_once(v)]
    return next((t for t in found if t is not None), None)


def sink_elementwise(op: ops.Elementwise, rw: Rewriter) -> None:
    """``add(transpose(x), transpose(y))`` -> ``transpose(add(x, y))``; constants along one axis are regrouped."""
    source = sinking(op.operands)
    if source is None or len(source.perm) != op.result.tensor.rank:
        return
    mapping: dict[Value, Value] = {}
    for value in op.operands:
        moved = untransposed(value, source.perm, rw, op)
        if moved is None:
            return
        mapping[value] = moved
    early = rw.before(op).insert(op.clone(mapping)).result
    replace(rw, op, ops.Transpose(early, source.perm))


def sink_last_axis(op: ops.RmsNorm | ops.LayerNorm | ops.Linear | ops.GatedLinear, rw: Rewriter) -> None:
    """Layers that look along the last axis alone do not see the order of the others."""
    source = sinking([op.x])
    if source is not None and source.perm[-1] == len(source.perm) - 1:
        early = rw.before(op).insert(op.clone({op.x: source.x})).result
        replace(rw, op, ops.Transpose(early, source.perm))


def sink_softmax(op: ops.Softmax | ops.CumSum, rw: Rewriter) -> None:
    source = sinking([op.x])
    if source is not None:
        early = rw.before(op).add(type(op)(source.x, source.perm[op.axis]))
        replace(rw, op, ops.Transpose(early, source.perm))


def sink_reduce(op: ops.Reduce, rw: Rewriter) -> None:
    """``reduce(transpose(x))`` -> ``transpose(reduce(x))`` over the axes' old places."""
    source = sinking([op.x])
    if source is None:
        return
    axes = tuple(sorted(source.perm[a] for a in op.axes))
    early = rw.before(op).add(ops.Reduce(source.x, op.fn, axes, op.keepdim))
    kept = [p for i, p in enumerate(source.perm) if op.keepdim or i not in op.axes]
    left = sorted(kept)
    replace(rw, op, ops.Transpose(early, tuple(left.index(p) for p in kept)))


def sink_slice(op: ops.Slice, rw: Rewriter) -> None:
    """``slice(transpose(x))`` -> ``transpose(slice(x))``, also when others use the transpose: slices move less."""
    source = made_by(op.x, ops.Transpose)
    if source is None or not all(isinstance(u, ops.Slice) for u in source.result.users):
        return
    back = inverse(source.perm)
    starts, stops, steps = (tuple(what[p] for p in back) for what in (op.starts, op.stops, op.steps))
    early = rw.before(op).add(ops.Slice(source.x, starts, stops, steps))
    replace(rw, op, ops.Transpose(early, source.perm))


def sink_concat(op: ops.Concat, rw: Rewriter) -> None:
    """``concat(transpose(x), transpose(y))`` -> ``transpose(concat(x, y))``; other parts may have to be regrouped."""
    source = sinking(op.xs)
    if source is None or any(isinstance(x.owner, ops.Transpose) and not used_once(x) for x in op.xs):
        return
    moved = [untransposed(x, source.perm, rw, op) for x in op.xs]
    parts = tuple(x for x in moved if x is not None)
    if len(parts) == len(moved):
        early = rw.before(op).add(ops.Concat(parts, source.perm[op.axis]))
        replace(rw, op, ops.Transpose(early, source.perm))


def sink_broadcast(op: ops.Broadcast, rw: Rewriter) -> None:
    """``broadcast(transpose(x))`` -> ``transpose(broadcast(x))``: less is moved if the transpose cancels further on."""
    source = sinking([op.x])
    if source is not None and len(source.perm) == len(op.shape):
        early = rw.before(op).add(ops.Broadcast(source.x, tuple(op.shape[p] for p in inverse(source.perm))))
        replace(rw, op, ops.Transpose(early, source.perm))


def early_outer(op: ops.Transpose, rw: Rewriter) -> None:
    """``transpose(mul(a[M, 1], b[1, N]))`` -> ``mul(a[1, M], b[N, 1])``: nothing moves when operands only regroup."""
    inner = op.x.owner
    if not isinstance(inner, ops.Binary) or not used_once(op.x):
        return
    perm, shapes = op.perm, [padded(v.shape, len(op.perm)) for v in inner.operands]
    if len(inner.operands) != 2 or not all(_moves_only_ones(s, perm) for s in shapes):
        return
    b = rw.before(op)
    moved = [b.add(ops.Reshape(v, tuple(s[p] for p in perm))) for v, s in zip(inner.operands, shapes)]
    replace(rw, op, type(inner)(*moved))


PATTERNS: tuple[Pattern, ...] = (
    transposes,
    sink_elementwise,
    sink_last_axis,
    sink_softmax,
    sink_reduce,
    sink_slice,
    sink_concat,
    sink_broadcast,
    early_outer,
)
