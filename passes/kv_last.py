"""Only the logits of a sequence's last token: ``x[B, S, ..]`` -> ``x[b, last[b]]`` as early as possible.

Every operation that no cache needs is repeated for one row alone; attention reads the cache for one query. What a
cache does need is computed for all rows, and the row taken from it.
"""

from __future__ import annotations

from collections.abc import Mapping

from tilewright.ir import Builder, DType, Function, Op, Return, State, TensorType, Value, ops
from tilewright.passes.kv_axes import Axes, has
from tilewright.passes.kv_clone import clone_op


class LastRow:
    """Rewrites the end of ``function`` so that it computes row ``last[b]`` of sequence b."""

    def __init__(self, function: Function, axes: Mapping[Value, Axes], positions: Value, last: Value) -> None:
        self.axes, self.last, self.seq = axes, last, positions.shape[1]
        self.builder = Builder(function, function.terminator)
        self.kept = _feeding_caches(function)
        self.batch: Value | None = None
        start = next(a for a in function.args if a.name == "start")
        at = self.builder(ops.Add, start, last)
        self.known: dict[Value, Value] = {start: at, positions: self.builder(ops.Reshape, at, (at.shape[0], 1))}

    def logits(self, value: Value) -> Value:
        """``[B, V]`` for the logits ``[B, S, V]``."""
        row = self.row(value)
        return self.builder(ops.Reshape, row, (row.shape[0], row.shape[2]))

    def row(self, value: Value) -> Value:
        """``value`` with one position, that of the last token, where it has all of them."""
        if value not in self.known:
            self.known[value] = self._make(value)
        return self.known[value]

    def _make(self, value: Value) -> Value:
        axes, op = self.axes.get(value), value.owner
        if axes is None and (op is None or not isinstance(value.type, TensorType) or not self._sized(value)):
            return value
        if op is None or (axes is not None and axes.is_plain and op in self.kept):
            return self._take(value)
        return self._repeat(op, value)

    def _sized(self, value: Value) -> bool:
        """Whether a value that no token takes part in has as many rows as there are tokens (they are all alike)."""
        return any(has(d, self.seq) for d in value.shape)

    def _repeat(self, op: Op, value: Value) -> Value:
        """``op`` for one position."""
        mapping = {v: self.row(v) for v in op.operands if not isinstance(v, State)}
        with self.builder.at(op.loc):
            copies = self.builder.add_all(clone_op(op, mapping, {self.seq: 1}))
        self.known.update(zip(op.results, copies))
        return self.known[value]

    def _take(self, value: Value) -> Value:
        if self.batch is None:
            self.batch = self.builder(ops.Iota, value.shape[0], DType.i64)
        row = self.builder(ops.GatherND, value, (self.batch, self.last))
        return self.builder(ops.Reshape, row, (value.shape[0], 1, *value.shape[2:]))


def _feeding_caches(function: Function) -> set[Op]:
    """The operations whose results end in a cache, or change one: they run for all rows."""
    kept: set[Op] = set(function.walk(ops.Retain))
    todo: list[Value] = [v for op in function.walk(ops.Append, ops.Retain) for v in op.operands]
    while todo:
        op = todo.pop().owner
        if op is not None and op not in kept:
            kept.add(op)
            todo.extend(op.operands)
    return kept


def take_last(function: Function, axes: Mapping[Value, Axes], positions: Value, last: Value) -> None:
    """Make ``function`` return ``[B, V]`` instead of ``[B, S, V]``; ``positions`` ``[B, S]`` are where tokens stand."""
    end = function.terminator
    rows = LastRow(function, axes, positions, last).logits(end.values[0])
    end.drop()
    Builder(function).insert(Return((rows,), loc=end.loc))
