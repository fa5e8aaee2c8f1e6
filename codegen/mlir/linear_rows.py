"""Weights looked up in a table of their row (SqueezeLLM, arXiv:2306.07629): vectors run along K, not over features.

A vector register is the table of one feature, from which an instruction picks the weights of as many k's as there are
lanes; the lanes' sums are added up at the end of a row. For many rows of x a block of weights is looked up, transposed and
kept as a panel of f32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tilewright.codegen.mlir.builder import Buffer, Function, Kernel
from tilewright.codegen.mlir.linear_floats import WidenFeed
from tilewright.codegen.mlir.microkernel import Tile, sum_steps
from tilewright.codegen.mlir.value import Val, constant, shuffle


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

    def weights(self, w: Buffer, place: Val | int, tail: bool = False) -> list[Val]:
        return super().weights(w, place)[:-(-self.rest // self.lanes) if tail else None]

    def inputs(self, x: Buffer, place: Val | int, tail: bool = False) -> list[Val]:
        count = self.rest if tail else self.step
        vectors = [x.load(place + i, self.lanes) for i in range(0, count - self.lanes + 1, self.lanes)]
        if beyond := count % self.lanes:
            mask = Kernel.current().mask(constant(beyond), self.lanes)
            vectors.append(x.load(place + (count - beyond), self.lanes, mask))
        return vectors


def emit_row_kernel(kernel: Kernel, name: str, feed: RowFeed, tile: Tile, buffers: Sequence[Buffer]) -> Function:
    """``sums[rows][features] = x[rows] @ features.T``, feature by feature over all of K, as the inner function ``name``.

    ``buffers`` are x (f32), the codes, the sums and the tables. Numbers of a call: first element of x, of the codes and of
    the sums, the first feature, and their count.
    """
    with kernel.function(name, buffers, numbers=5) as micro:
        x, w, sums, tables = micro.buffers
        x_at, w_at, sums_at, first, count = micro.numbers
        x, steps = x.at(x_at), feed.k // feed.step
        size = -(-feed.k // feed.step) * feed.stride
        chains = max(tile.unroll, 1)
        with kernel.loop(0, count) as loop:
            row, codes = feed.looking_up(tables, first + loop.index), w.at(w_at + loop.index * size)
            totals = [constant(0.0, "f32", feed.lanes)] * tile.rows
            totals = sum_steps(kernel, row, tile, (x, codes), constant(steps), totals, chains)
            if feed.rest:
                weights = row.weights(codes, steps * feed.stride, tail=True)
                for r in range(tile.rows):
                    inputs = row.inputs(x, steps * feed.step + r * tile.x_stride, tail=True)
                    totals[r] = row.accumulate(totals[r], weights, inputs)
            for r, total in enumerate(totals):
                sums.store(total.reduce("sum"), sums_at + loop.index + r * tile.sums_stride)
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
