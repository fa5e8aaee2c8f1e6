"""``value[1, S, D]`` that depends on the position alone -> a table of all positions and a gather of the rows in use.

    %cos : [1, S, D]   ->   core.gather(@position_table, %positions) : [B, S, D]

``positions`` ``[B, S]`` holds where each token stands, so that sequences of one batch may be at different places. Equal
tables are kept once; tables that are rows of a weight are not copied: the weight itself is gathered. Where there are more
positions than a table could hold, rows are computed for the tokens at hand (:mod:`kv_computed`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright.ir import Builder, Module, Op, Value, Weight, dim_text, ops, same_dim
from tilewright.passes.kv_axes import Axes, has
from tilewright.passes.kv_computed import compute_rows
from tilewright.passes.kv_shapes import Array, ShapeValues, close, refuse


class Rows:
    """Makes, and shares, the rows of position tables in one function, for ``length`` positions."""

    def __init__(self, module: Module, shapes: ShapeValues, positions: Value, length: int) -> None:
        self.module, self.shapes, self.positions, self.length = module, shapes, positions, length
        self.tables: dict[str, Weight] = {}
        self.gathered: dict[tuple[Any, ...], Value] = {}
        self.rows_of: dict[Value, Value] = {}
        self.placed: dict[tuple[Value, Axes, int], Value] = {}

    def place(self, value: Value, user: Op, axes: Axes, offset: int) -> Value:
        """``value`` by position, as ``user`` can take it.

        ``axes`` are those of user's frame, in which axis i of ``value`` is axis ``i + offset``.
        """
        seq = self._seq_axis(value, user, axes, offset)
        key = (value, axes, offset)
        if key not in self.placed:
            self.placed[key] = self._place(value, seq, user, axes, offset)
        return self.placed[key]

    def _place(self, value: Value, seq: int, user: Op, axes: Axes, offset: int) -> Value:
        builder = Builder(user.parent, user, value.owner.loc if value.owner else user.loc)  # type: ignore[arg-type]
        self.shapes.check_batch(value)
        constant = self._if_uniform(value, seq, builder)
        if constant is not None:
            return constant
        rows = self.rows(value, builder)
        return self._arrange(rows, value, axes, offset, builder)

    def _seq_axis(self, value: Value, user: Op, axes: Axes, offset: int) -> int:
        found = self.shapes.seq_axes(value)
        if len(found) != 1:
            raise refuse(user, f"relates positions with positions: {value.type} is combined with values of tokens")
        seq = found[0]
        if not same_dim(value.shape[seq], self.shapes.seq):
            raise refuse(user, f"takes {value.type}: {dim_text(value.shape[seq])} rows for {self.shapes.seq} positions")
        if not (axes.seq.is_plain and axes.batch.is_plain) or seq + offset != axes.seq.axis:
            raise refuse(user, f"takes {value.type}, whose positions do not meet those of the tokens")
        if any(has(d, self.shapes.batch) and i + offset != axes.batch.axis for i, d in enumerate(value.shape)):
            raise refuse(user, f"takes {value.type}, whose sequences do not meet those of the tokens")
        return seq

    def _if_uniform(self, value: Value, seq: int, builder: Builder) -> Value | None:
        """The same row for every position needs no table."""
        if isinstance(value.owner, ops.Full):
            return value
        table = self.table(value, seq)
        if table.shape[0] > 1 and not (table == table[:1]).all():
            return None
        one = np.take(self.shapes.at(value, self.shapes.length), [0], axis=seq)
        return builder(ops.Broadcast, self.constant(one), value.shape)

    def table(self, value: Value, seq: int) -> Array:
        """All rows, ``[length, *rest]`` without axes of size one; refused when rows depend on how many there are."""
        shapes = self.shapes
        full = shapes.at(value, shapes.length)
        for n in shapes.probes:
            if not close(np.take(full, range(n), axis=seq), shapes.at(value, n)):
                raise refuse(
                    value,
                    f"gives position {n - 1} and those before other values when more tokens follow "
                    f"(compared {n} with {shapes.length} tokens): it cannot be taken from one table",
                )
        rest = [n for i, n in enumerate(full.shape) if i != seq and n != 1]
        return np.ascontiguousarray(np.moveaxis(full, seq, 0)).reshape(full.shape[seq], *rest)

    def rows(self, value: Value, builder: Builder) -> Value:
        """``[B, S, *rest]``: the rows of the tokens at hand, axes of size one left out."""
        value = self._peel(value)
        if value not in self.rows_of:
            self.rows_of[value] = self._from_weight(value, builder) or self._from_table(value, builder)
        return self.rows_of[value]

    def _peel(self, value: Value) -> Value:
        """Behind movements that add and drop nothing but axes of size one, or repeat for each sequence."""
        while isinstance(value.owner, (ops.Reshape, ops.Broadcast)) and self._rest(value) == self._rest(value.owner.x):
            value = value.owner.x
        return value

    def _rest(self, value: Value) -> list[Any]:
        return [d for d in value.shape if d != 1 and d != self.shapes.batch]

    def _from_table(self, value: Value, builder: Builder) -> Value:
        table = self.table(value, self.shapes.seq_axes(value)[0])
        if table.dtype == np.int64 and table.ndim == 1 and (np.diff(table) == 1).all():
            return self._shifted(int(table[0]), builder)
        if self.length > self.shapes.length:
            return compute_rows(value, self.positions, self.shapes, builder)
        return self._gather(self.constant(table), builder)

    def _shifted(self, by: int, builder: Builder) -> Value:
        """Position numbers themselves, counted from ``by`` (OPT counts from two)."""
        if by == 0:
            return self.positions
        if ("shift", by) not in self.gathered:
            self.gathered["shift", by] = builder(ops.Add, self.positions, builder.full(by, self.positions))
        return self.gathered["shift", by]

    def _from_weight(self, value: Value, builder: Builder) -> Value | None:
        """The rows of a weight that is indexed by position, with no copy of it."""
        op, length = value.owner, self.length
        if isinstance(op, ops.Embedding) and not self.shapes.varies(op.table):
            self._check_rows(value, op.table)
            return builder(ops.Embedding, self.rows(op.indices, builder), op.table)
        if isinstance(op, ops.Slice) and isinstance(op.x, Weight) and op.x.tensor.rank == 2:
            whole = same_dim(op.stops[1], op.x.shape[1]) and op.starts == (0, 0) and op.steps == (1, 1)
            size = op.x.shape[0]
            if whole and isinstance(size, int) and size >= length and op.stops[0] == self.shapes.seq:
                return self._gather(op.x, builder)
        return None

    def _check_rows(self, value: Value, table: Value) -> None:
        known = table.shape[0]
        if self.length > self.shapes.length and (not isinstance(known, int) or known < self.length):
            raise refuse(value, f"knows {dim_text(known)} positions of {self.length}; give kv-layout a smaller length")

    def _gather(self, table: Value, builder: Builder) -> Value:
        if ("rows", table) not in self.gathered:
            self.gathered["rows", table] = builder(ops.Gather, table, self.positions, 0)
        return self.gathered["rows", table]

    def constant(self, table: Array) -> Weight:
        """``table`` as a weight; equal tables are one."""
        key = hashlib.sha256(table.tobytes()).hexdigest() + f"{table.dtype}{table.shape}"
        if key not in self.tables:
            self.tables[key] = self.module.constant(table, "position_table")
        return self.tables[key]

    def _arrange(self, rows: Value, value: Value, axes: Axes, offset: int, builder: Builder) -> Value:
        """``rows`` with its axes where the user's frame wants them."""
        batch, seq = axes.batch.axis, axes.seq.axis
        rest = [i + offset for i, d in enumerate(value.shape) if d != 1 and i + offset not in (batch, seq)]
        first = min(offset, batch)
        order = sorted([batch, seq, *rest])
        perm = [[batch, seq, *rest].index(axis) for axis in order]
        if perm != sorted(perm):
            rows = self.once(("transpose", rows, *perm), lambda: builder(ops.Transpose, rows, perm))
        sizes = {batch: self.shapes.batch, seq: self.shapes.seq}
        top = offset + value.tensor.rank
        shape = [sizes.get(i, value.shape[i - offset] if i >= offset else 1) for i in range(first, top)]
        if len(shape) == rows.tensor.rank:
            return rows
        return self.once(("reshape", rows, *shape), lambda: builder(ops.Reshape, rows, shape))

    def once(self, key: tuple[Any, ...], make: Callable[[], Value]) -> Value:
        """The value known by ``key``, made the first time."""
        if key not in self.gathered:
            self.gathered[key] = make()
        return self.gathered[key]
