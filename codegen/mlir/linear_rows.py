"""Weights looked up in a table of their row (SqueezeLLM, arXiv:2306.07629): vectors run along K, not over features.

A vector register is the table of one feature, from which an instruction picks the weights of as many k's as there are
lanes; the lanes' sums are added up at the end of a row. For many rows of x a block of weights is looked up, transposed and
kept as a panel of f32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

from tilewright.codegen.mlir.builder import Buffer, Function, Kernel
from tilewright.codegen.mlir.linear_floats import WidenFeed
from tilewright.codegen.mlir.microkernel import Tile
from tilewright.codegen.mlir.value import Val, constant, fma, shuffle


@dataclass(frozen=True)
class RowFeed(WidenFeed):
    """The codes of one row, packed as `RowPacking` says; ``k`` is the length of the row. x is f32."""

    @property
    def step(self) -> int:
        return self.pair * self.lanes

    @property
    def parts(self) -> int:
        return self.pair

    def place(self, i: int) -> tuple[int, int]:
        return i // 4, i % 4

    def looking_up(self, table: Buffer, row: Val) -> RowFeed:
        """The feed of one row, with its table in registers."""
        count = 1 << self.bits
        return replace(self, entries=self.widest(table.load(row * count, count).to("f32")))

    def add_step(self, totals: Sequence[Val], x: Buffer, w: Buffer, step: Val, tile: Tile, tail: bool = False) -> list[Val]:
        """``totals`` plus one step; those of a row of x take turns. One vector after the other, since there are many."""
        words, sums, count = self.load(w, step * self.stride), list(totals), self.rest if tail else self.step
        for i, start in enumerate(range(0, count, self.lanes)):
            weight, beyond = self.number(words, i), count - start
            mask = Kernel.current().mask(constant(beyond), self.lanes) if beyond < self.lanes else None
            for r in range(tile.rows):
                at = r * tile.unroll + i % tile.unroll
                sums[at] = fma(weight, x.load(step * self.step + (start + r * tile.x_stride), self.lanes, mask), sums[at])
        return sums


def emit_row_kernel(kernel: Kernel, name: str, feed: RowFeed, tile: Tile, buffers: Sequence[Buffer]) -> Function:
    """``sums[rows][features] = x[rows] @ features.T``, feature by feature over all of K, as the inner function ``name``.

    ``tile.unroll`` sums of a row take turns, for the time that an addition takes.

    ``buffers`` are x (f32), the codes, the sums and the tables. Numbers of a call: first element of x, of the codes and of
    the sums, the first feature, and their count.
    """
    with kernel.function(name, buffers, numbers=5) as micro:
        x, w, sums, tables = micro.buffers
        x_at, w_at, sums_at, first, count = micro.numbers
        x, steps = x.at(x_at), feed.k // feed.step
        size = -(-feed.k // feed.step) * feed.stride
        with kernel.loop(0, count) as loop:
            row, codes = feed.looking_up(tables, first + loop.index), w.at(w_at + loop.index * size)
            zero = constant(0.0, "f32", feed.lanes)
            with kernel.loop(0, steps, carry=[zero] * (tile.rows * tile.unroll)) as inner:
                inner.next(*row.add_step(inner.values, x, codes, inner.index, tile))
            totals = inner.results
            if feed.rest:
                totals = row.add_step(totals, x, codes, constant(steps), tile, tail=True)
            for r in range(tile.rows):
                own = totals[r * tile.unroll:(r + 1) * tile.unroll]
                sums.store(reduce(Val.__add__, own).reduce("sum"), sums_at + loop.index + r * tile.sums_stride)
    return micro


def look_up_rows(kernel: Kernel, feed: RowFeed, w: Buffer, tables: Buffer, first: Val, features: Val, count: Val,
                 rows: Buffer, block: Buffer, panel: int) -> None:  # fmt: skip
    """``count`` k's of ``features`` rows at ``w``, the first row being ``first``, into ``block`` [count][panel] as f32.

    ``rows`` is scratch for ``[lanes][count]``, whole steps. Columns of features beyond are left as they are or undefined.
    """
    lanes, size = feed.lanes, -(-feed.k // feed.step) * feed.stride
    steps = (count + (feed.step - 1)) // feed.step
    with kernel.loop(0, features, lanes) as loop:
        with kernel.loop(0, (features - loop.index).min(constant(lanes))) as feature:
            row = loop.index + feature.index
            found = feed.looking_up(tables, first + row)
            with kernel.loop(0, steps) as step:
                at = feature.index * (steps * feed.step) + step.index * feed.step
                for i, weights in enumerate(found.weights(w, row * size + step.index * feed.stride)):
                    rows.store(weights, at + i * lanes)
        with kernel.loop(0, steps * feed.step, lanes) as at:
            vectors = [rows.load(i * (steps * feed.step) + at.index, lanes) for i in range(lanes)]
            for i, vector in enumerate(transposed(vectors)):
                block.store(vector, (at.index + i) * panel + loop.index)


def transposed(vectors: Sequence[Val]) -> list[Val]:
    """As many vectors as they have lanes, lane ``i`` of vector ``j`` becoming lane ``j`` of vector ``i``."""
    lanes = len(vectors)
    half, out = lanes // 2, list(vectors)
    low = [i // 2 + (lanes if i % 2 else 0) for i in range(lanes)]
    for _ in range(half.bit_length()):
        pairs = [(out[i], out[i + half]) for i in range(half)]
        out = [shuffle(a, b, [i + start for i in low]) for a, b in pairs for start in (0, half)]
    return out
