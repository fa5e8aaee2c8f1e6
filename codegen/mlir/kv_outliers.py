"""Attention to the outliers beside codes (see `ResidualLayout`): what each adds goes to all rows of a task at once.

So queries, what scores get, weights and what results get lie here by rows, vectors of which one outlier takes at a place of
its own, and are turned over where they meet what lies by keys and components.
"""

from __future__ import annotations

from tilewright.codegen.cache_codes import CodeLayout
from tilewright.codegen.cache_residual import ResidualLayout
from tilewright.codegen.cache_slots import round_up
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.kv_blocks import transpose
from tilewright.codegen.mlir.rows import Row
from tilewright.codegen.mlir.value import Val, constant

_LEAST = 4
"""Lanes of the smallest vector."""


class Outliers:
    """Of the ``rows`` rows of a task, whose blocks have ``keys`` keys; results have ``out_size`` components."""

    def __init__(self, kernel: Kernel, cache: CodeLayout, rows: int, keys: int, out_size: int) -> None:
        self.kernel, self.cache, self.rows, self.keys = kernel, cache, rows, keys
        self.lanes = min(max(_LEAST, 1 << (rows - 1).bit_length()), kernel.lanes)  # rows of a vector
        self.both, self.out_size, self.width = range(2 * cache.outliers), out_size, round_up(rows, self.lanes)
        self.q = kernel.scratch(cache.k_residual.row * self.width, "f32")
        self.by_key = kernel.scratch(keys * self.width, "f32")  # what scores get, then weights
        self.scores = kernel.scratch(self.width * keys, "f32")
        self.sums = kernel.scratch(out_size * self.width, "f32")
        sides = cache.k_residual, cache.v_residual
        count = max(layout.lines * layout.line for layout in sides) * len(self.both)
        self.places, self.lack = kernel.scratch(count, "i32"), kernel.scratch(count, "f32")

    def load_query(self, row: Val, source: Row) -> None:
        """Take the query of ``row``."""
        for start in range(0, self.cache.k_residual.row, self.kernel.lanes):
            x = source.load(start).to("f32")
            for lane in range(self.kernel.lanes):
                self.q.store(x.lane(lane), row + (start + lane) * self.width)

    # --- keys ---------------------------------------------------------------------------------------------------------

    def keys_of(self, first: Val, k: Buffer, rows: Val, factor: float) -> None:
        """Take those of the run of keys at ``k``, from key ``first`` of the block on; scores are products by ``factor``."""
        layout = self.cache.k_residual
        self._clear(self.by_key.at(first * self.width), layout.run)
        self._load(k, layout)
        self._add_keys(first, layout, rows)
        with self.kernel.loop(0, rows, self.lanes) as some, self.kernel.loop(0, layout.run, self.lanes) as loop:
            place = first + loop.index
            square = [self.by_key.load((place + i) * self.width + some.index, self.lanes) for i in range(self.lanes)]
            for row, numbers in enumerate(transpose(square)[:self.rows]):
                self.scores.store(numbers * factor, (some.index + row) * self.keys + place)

    def _add_keys(self, first: Val, layout: ResidualLayout, rows: Val) -> None:
        """Queries' components times what outliers lack, where each is.

        Of a channel those of one group after those of another: so a sum is seldom wanted while it is being stored.
        """
        count = layout.size if layout.channels else layout.run
        with self.kernel.loop(0, rows, self.lanes) as some, self.kernel.loop(0, count) as loop:
            own, base = loop.index * self.width, first * self.width + some.index
            for number in range(layout.lines * len(self.both)):
                place, lack = self._outlier(layout, number, loop.index)
                component, token = (own, place) if layout.channels else (place, own)
                group = number // len(self.both) * layout.group
                query = self.q.load(component + some.index, self.lanes)
                self._add(query, lack, self.by_key, base + token + group * self.width)

    def score(self, score: Val, row: Val, start: Val) -> Val:
        """Scores of a row with a vector of keys from ``start`` on, and what outliers add."""
        return score + self.scores.load(row * self.keys + start, self.kernel.lanes)

    # --- values -------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """No values of the block have been seen."""
        self._clear(self.sums, self.out_size)

    def values_of(self, first: Val, v: Buffer, weights: Buffer, count: Val, rows: Val) -> None:
        """Take those of the run of ``count`` values at ``v``, from value ``first`` of the block on."""
        layout, last = self.cache.v_residual, rows - 1
        self._load(v, layout)
        with self.kernel.loop(0, rows, self.lanes) as some, self.kernel.loop(0, count, self.lanes) as loop:
            place = first + loop.index
            found = [weights.load((some.index + row).min(last) * self.keys + place, self.lanes)
                     for row in range(min(self.lanes, self.rows))]  # fmt: skip
            found += [constant(0.0, "f32", self.lanes)] * (self.lanes - len(found))
            for i, numbers in enumerate(transpose(found)):
                self.by_key.store(numbers, (place + i) * self.width + some.index)
        with self.kernel.loop(0, rows, self.lanes) as some, self.kernel.loop(0, count) as loop:
            weight = self.by_key.load((first + loop.index) * self.width + some.index, self.lanes)
            for number in self.both:
                component, lack = self._outlier(layout, number, loop.index)
                self._add(weight, lack, self.sums, component + some.index)

    def finish(self, sums: Buffer, rows: Val) -> None:
        """Add what the block's outliers make to ``sums [rows][out_size]``."""
        with self.kernel.loop(0, rows, self.lanes) as some, self.kernel.loop(0, self.out_size, self.lanes) as loop:
            square = [self.sums.load((loop.index + i) * self.width + some.index, self.lanes) for i in range(self.lanes)]
            for row, numbers in enumerate(transpose(square)[:self.rows]):
                place = (some.index + row) * self.out_size + loop.index
                sums.store(sums.load(place, self.lanes) + numbers, place)

    # --- both ---------------------------------------------------------------------------------------------------------

    def _load(self, memory: Buffer, layout: ResidualLayout) -> None:
        """The outliers of the run at ``memory``: where the vectors of their rows begin, and what they lack."""
        size, lanes = layout.stored.itemsize, self.kernel.lanes
        with self.kernel.loop(0, layout.lines * len(self.both) * layout.line, lanes) as loop:
            places = memory.load(loop.index + layout.places, lanes).to("i32")
            self.places.store(places * self.width, loop.index)
            lack = memory.load(loop.index * size + layout.lack, lanes * size).bitcast(self.cache.scales)
            self.lack.store(lack.to("f32"), loop.index)

    def _outlier(self, layout: ResidualLayout, number: int, index: Val) -> tuple[Val, Val]:
        """Where the vector of rows of one begins, and what it lacks in every lane."""
        at = index + number * layout.line
        return self.places.load(at).to("index"), self.lack.load(at).splat(self.lanes)

    def _add(self, numbers: Val, factor: Val, memory: Buffer, place: Val) -> None:
        memory.store(numbers.fma(factor, memory.load(place, self.lanes)), place)

    def _clear(self, memory: Buffer, count: int) -> None:
        with self.kernel.loop(0, count * self.width, self.kernel.lanes) as loop:
            memory.store(constant(0.0, "f32", self.kernel.lanes), loop.index)
