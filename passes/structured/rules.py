"""How each operation ties the indices of its operands to those of its results, and its sizes once some are gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tilewright.ir import Dim, Op, Value, ops, same_dim
from tilewright.ir.types import product
from tilewright.passes.calibration.data import Array
from tilewright.passes.structured.axes import Axis, Rule, Ties

RULES: dict[type[Op], Rule] = {}
HEADS = 2
"""The axis of heads of q, k, v and the result of an attention."""


def rule_of(op: Op) -> Rule | None:
    """The rule of the operation's class, or of the nearest base that has one."""
    return next((RULES[kind] for kind in type(op).__mro__ if kind in RULES), None)


def ties(*kinds: type[Op]) -> Callable[[Any], Any]:
    """Registers a rule for ``kinds``."""

    def register(rule: Any) -> Any:
        RULES.update(dict.fromkeys(kinds, rule))
        return rule

    return register


@ties(ops.Linear, ops.GatedLinear)
def layer(t: Ties, op: ops.Linear | ops.GatedLinear) -> None:
    """What a column reads may go alone with it: that changes the layer's results, and pruning is just that."""
    out = op.result
    for axis in range(out.tensor.rank - 1):
        t.same(op.x, axis, out, axis)
    pairs = [(op.weight, op.bias)] if isinstance(op, ops.Linear) else [(op.gate, op.gate_bias), (op.up, op.up_bias)]
    for weight, bias in pairs:
        t.same(op.x, -1, weight, 1)
        t.same(weight, 0, out, -1)
        if bias is not None:
            t.same(bias, 0, out, -1)


@ties(ops.Elementwise, ops.Broadcast)
def elementwise(t: Ties, op: Op) -> None:
    out = op.results[0]
    for axis in range(out.tensor.rank):
        t.free(out, axis)
    for x in op.operands:
        lead = out.tensor.rank - x.tensor.rank
        for axis in range(x.tensor.rank):
            t.same(x, axis, out, lead + axis)


@ties(ops.Full)
def full(t: Ties, op: ops.Full) -> None:
    for axis in range(op.result.tensor.rank):
        t.free(op.result, axis)


@ties(ops.Transpose)
def transpose(t: Ties, op: ops.Transpose) -> None:
    for axis, source in enumerate(op.perm):
        t.same(op.x, source, op.result, axis)


@ties(ops.Reshape)
def reshape(t: Ties, op: ops.Reshape) -> None:
    """An axis that is cut into several goes by whole pieces: its indices are tied to the first of the axes they make."""
    for before, after in regrouped(op.x.shape, op.shape):
        if len(before) == len(after) == 1:
            t.same(op.x, before[0], op.result, after[0])
        elif len(before) == 1:
            _cut(t, (op.x, before[0]), op.result, after)
        elif len(after) == 1:
            _cut(t, (op.result, after[0]), op.x, before)


def _cut(t: Ties, flat: Axis, value: Value, axes: Sequence[int]) -> None:
    whole = value.shape[axes[0]]
    if not isinstance(flat[0].shape[flat[1]], int) or not isinstance(whole, int):
        return
    nodes, pieces = t.free(*flat), t.free(value, axes[0])
    t.axes.tie(nodes, pieces[np.arange(nodes.size) // (nodes.size // whole)])


def regrouped(before: Sequence[Dim], after: Sequence[Dim]) -> Iterator[tuple[list[int], list[int]]]:
    """The axes of two shapes of equally many elements in the shortest groups of equal size; axes of size one have none."""
    left, right = ([i for i, d in enumerate(shape) if not same_dim(d, 1)] for shape in (before, after))
    while left and right:
        i = j = 1
        while not same_dim(a := product([before[k] for k in left[:i]]), b := product([after[k] for k in right[:j]])):
            if i == len(left) and j == len(right):
                return
            behind = isinstance(a, int) and isinstance(b, int) and a > b
            if j < len(right) and (behind or i == len(left) or _divides(a, b)):
                j += 1
            else:
                i += 1
        yield left[:i], right[:j]
        left, right = left[i:], right[j:]


def _divides(a: Dim, b: Dim) -> bool:
    """Whether ``a`` is a multiple of ``b`` for all values of its symbols."""
    quotient: Any = a / b
    return not isinstance(quotient, float) and bool(quotient.is_integer)


@ties(ops.Slice)
def cut(t: Ties, op: ops.Slice) -> None:
    for axis, (start, stop, step) in enumerate(zip(op.starts, op.stops, op.steps)):
        if step != 1 or not isinstance(start, int) or not isinstance(stop, int):
            continue
        nodes, part = t.free(op.x, axis), t.free(op.result, axis)
        if part.size:
            t.axes.tie(nodes[start:stop], part)
        elif nodes.size:
            t.known.discard((op.x, axis))  # one index is taken: it has to stay where it is


@ties(ops.Concat)
def concat(t: Ties, op: ops.Concat) -> None:
    along, first = op.axis % op.result.tensor.rank, 0
    for x in op.xs:
        for axis in range(x.tensor.rank):
            if axis != along:
                t.same(x, axis, op.result, axis)
    if not all(isinstance(x.shape[along], int) and x.shape[along] > 1 for x in op.xs):
        return
    whole = t.free(op.result, along)
    for x in op.xs:
        part = t.free(x, along)
        t.axes.tie(part, whole[first : first + part.size])
        first += part.size


@ties(ops.Pad)
def pad(t: Ties, op: ops.Pad) -> None:
    for axis, (low, high) in enumerate(zip(op.low, op.high)):
        if same_dim(low, 0) and same_dim(high, 0):
            t.same(op.x, axis, op.result, axis)


@ties(ops.RmsNorm, ops.LayerNorm, ops.Softmax)
def normalized(t: Ties, op: ops.RmsNorm | ops.LayerNorm | ops.Softmax) -> None:
    along = op.axis % op.x.tensor.rank if isinstance(op, ops.Softmax) else op.x.tensor.rank - 1
    for axis in range(op.x.tensor.rank):
        if axis != along:
            t.same(op.x, axis, op.result, axis)


@ties(ops.Reduce)
def reduce(t: Ties, op: ops.Reduce) -> None:
    gone = {axis % op.x.tensor.rank for axis in op.axes}
    left = [axis for axis in range(op.x.tensor.rank) if op.keepdim or axis not in gone]
    for to, axis in enumerate(left):
        if axis not in gone:
            t.same(op.x, axis, op.result, to)


@ties(ops.Rope)
def rope(t: Ties, op: ops.Rope) -> None:
    for axis in range(3):
        t.same(op.x, axis, op.result, axis)


@ties(ops.Attention)
def attention(t: Ties, op: ops.Attention) -> None:
    """Queries with keys of their own take these along. Where several share a head of keys it is :func:`grouped`."""
    shared = op.q.shape[HEADS] != op.k.shape[HEADS]
    _heads(t, op)
    for value in (op.k, op.v):
        if not shared:
            t.same(value, HEADS, op.q, HEADS)


def grouped(t: Ties, op: ops.Attention) -> None:
    """A head of keys and values goes with all of its queries."""
    _heads(t, op)
    queries = t.free(op.q, HEADS)
    for value in (op.k, op.v):
        keys = t.free(value, HEADS)
        heads = keys if keys.size else queries[:1]  # a single head of keys stays, and all queries with it
        t.axes.tie(queries, heads[np.arange(queries.size) // (queries.size // max(heads.size, 1))])


def _heads(t: Ties, op: ops.Attention) -> None:
    """Heads of queries, of what is added for each of them, and of the result. Sizes of heads stay."""
    t.same(op.q, HEADS, op.result, HEADS)
    for extra in (op.mask, op.bias):
        if extra is not None and extra.tensor.rank >= 3:
            t.same(extra, -3, op.q, HEADS)
    if op.sinks is not None:
        t.same(op.sinks, 0, op.q, HEADS)


def resized(op: Op, kept: Mapping[Axis, Array]) -> dict[str, Any]:
    """The attributes of ``op`` that say sizes, when of axes only what is true in ``kept`` stays."""
    if isinstance(op, (ops.Reshape, ops.Broadcast, ops.Full)):
        masks = [kept.get((op.result, axis)) for axis in range(op.result.tensor.rank)]
        return {"shape": tuple(d if m is None else int(m.sum()) for d, m in zip(op.shape, masks))}
    if isinstance(op, ops.Slice):
        masks = [kept.get((op.x, axis)) for axis in range(op.x.tensor.rank)]
        return {"starts": _moved(op.starts, masks), "stops": _moved(op.stops, masks)}
    return {}


def _moved(bounds: Sequence[Dim], masks: Sequence[Array | None]) -> tuple[Dim, ...]:
    return tuple(b if m is None else int(m[: int(b)].sum()) for b, m in zip(bounds, masks))
