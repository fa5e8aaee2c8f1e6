"""Biases of attention scores over a cache: ``[.., H, S, T]`` for the tokens at hand, from what is known by position.

Three forms, the cheapest that is exact (up to one constant a query, which softmax does not see):
a row for all queries (``[1, H, 1, length]``, ALiBi), a function of the distance (T5), a full table of both positions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tilewright.ir import Builder, DType, Value, as_dim, ops
from tilewright.passes.kv_mask import Sight, masked, square
from tilewright.passes.kv_rows import Rows
from tilewright.passes.kv_shapes import Array, ShapeValues, refuse

MAX_TABLE = 1 << 24
"""Elements of the largest table of both positions that is put into a module."""


class Biases:
    """Makes, and shares, the biases of the attentions in one function."""

    def __init__(self, shapes: ShapeValues, rows: Rows) -> None:
        self.shapes, self.rows = shapes, rows
        self.made: dict[tuple[Value, Sight], Value | None] = {}
        self.numbers: dict[Value, Array] = {}

    def square_numbers(self, bias: Value | None) -> Array | None:
        """The numbers of a bias over both positions, at the length of the cache."""
        if bias is None or len(self.shapes.seq_axes(bias)) < 2:
            return None
        if bias not in self.numbers:
            self.shapes.check_batch(bias)
            self.numbers = {bias: square(self.shapes, bias, self.shapes.length)}
        return self.numbers[bias]

    def place(self, op: ops.Attention, sight: Sight, builder: Builder) -> Value | None:
        """The bias that a cached attention needs for that of ``op``."""
        if op.bias is None or not self.shapes.varies(op.bias):
            return op.bias
        if (op.bias, sight) not in self.made:
            self.made[op.bias, sight] = self._make(op, op.bias, sight, builder)
        return self.made[op.bias, sight]

    def _make(self, op: ops.Attention, bias: Value, sight: Sight, builder: Builder) -> Value | None:
        self.shapes.check_batch(bias)
        full = self.square_numbers(bias)
        if full is None and not self.shapes.seq_axes(bias):
            return self._constant(op, bias)
        if full is None:
            return self._by_key(op, bias, sight, builder)
        keep = sight.keep(self.shapes.length)
        if not full[..., keep].any():
            return None
        exact = op.sinks is not None
        self._check_shorter(bias, full, sight, exact)
        row = full[:, :, -1:, :]
        if same_rows(full, row, keep, exact):
            return self.rows.constant(np.ascontiguousarray(row))
        near = np.where(masked(row), 0, row)[0, :, 0, ::-1].astype(full.dtype)  # [H, length] by distance
        if self._is_by_distance(full, near, keep):
            return self._gathered(near, lambda: self._distances(builder), 1, builder)
        if full.size > MAX_TABLE:
            raise refuse(bias, f"is a bias of {full.size} numbers without a rule; give kv-layout a smaller length")
        return self._gathered(full[0], lambda: self.rows.positions, 1, builder)

    def _constant(self, op: ops.Attention, bias: Value) -> Value:
        if not self.shapes.is_constant(bias):
            raise refuse(bias, "depends on how many tokens there are")
        return bias

    def _by_key(self, op: ops.Attention, bias: Value, sight: Sight, builder: Builder) -> Value | None:
        """A bias with one axis of positions: that of the keys, or that of the queries, which softmax does not see."""
        shapes = self.shapes
        rank = bias.tensor.rank
        axes = shapes.seq_axes(bias)
        if axes not in ([rank - 1], [rank - 2]):
            raise refuse(bias, f"is a bias with positions on axis {axes[0]} of {bias.type}")
        if axes == [rank - 2]:
            if op.sinks is not None:
                raise refuse(bias, "adds to all scores of a query, which matters to an attention with sinks")
            return None
        row = shapes.at(bias, shapes.length)
        row = row.reshape((1,) * (4 - rank) + row.shape)
        if masked(row).any():
            raise refuse(bias, "hides the same keys from all queries")
        for n in shapes.probes:
            if not same_rows(square(shapes, bias, n), row[..., :n], sight.keep(n), op.sinks is not None):
                raise refuse(bias, f"changes when more tokens follow ({n} and {shapes.length} compared)")
        return self.rows.constant(row) if row.any() else None

    def _check_shorter(self, bias: Value, full: Array, sight: Sight, exact: bool) -> None:
        for n in self.shapes.probes:
            if not same_rows(square(self.shapes, bias, n), full[:, :, :n, :n], sight.keep(n), exact):
                raise refuse(bias, f"changes when more tokens follow ({n} and {self.shapes.length} compared)")

    def _is_by_distance(self, full: Array, near: Array, keep: Array) -> bool:
        n = len(keep)
        at = np.arange(n)
        for i in range(n):
            row = full[0, :, i, : i + 1] - near[:, i - at[: i + 1]]
            if np.abs(row[:, keep[i, : i + 1]]).max(initial=0.0) > 1e-6 * max(1.0, float(np.abs(near).max())):
                return False
        return True

    def _distances(self, builder: Builder) -> Value:
        """i64 ``[B, S, length]``: how far before each token a slot is; zero for those that it does not see."""
        positions, n = self.rows.positions, self.shapes.length

        def make() -> Value:
            column = builder(ops.Reshape, positions, (*positions.shape, 1))
            distance = builder(ops.Sub, column, builder(ops.Iota, as_dim(n), DType.i64))
            return builder(ops.Maximum, distance, builder.full(0, distance))

        return self.rows.once(("distances",), make)

    def _gathered(self, table: Array, index: Callable[[], Value], axis: int, builder: Builder) -> Value:
        """``[H, ...]`` picked along ``axis`` by a value ``[B, S, ..]`` -> ``[B, H, S, length]``."""
        picked = builder(ops.Gather, self.rows.constant(table), index(), axis)
        return builder(ops.Transpose, picked, (1, 0, 2, 3))


def same_rows(a: Array, b: Array, keep: Array, exact: bool) -> bool:
    """Equal where ``keep``, up to a constant for each query unless ``exact``; ``[1, H, n, n]``, b may broadcast."""
    with np.errstate(invalid="ignore"):  # of hidden keys, which may hold infinities
        difference = np.where(keep, a.astype(np.float32) - b.astype(np.float32), np.nan)
    seen = np.where(keep, np.broadcast_to(b, a.shape).astype(np.float32), 0)
    limit = 1e-5 * max(1.0, float(np.abs(seen).max(initial=0.0)))
    if exact:
        return bool(np.nanmax(np.abs(difference), initial=0.0) <= limit)
    spread = np.nanmax(difference, axis=-1) - np.nanmin(difference, axis=-1)
    return bool(spread.max(initial=0.0) <= limit)
