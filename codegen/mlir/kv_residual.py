"""Attention to what groups of tokens have beside their codes (see `ResidualLayout`); outliers are in kv_outliers.py.

For a query and a group, components' factors of keys come to as many numbers as there are columns, whose products with the
factors of its tokens are added to scores. Of values it is the other way round: the weights of a group's tokens come to as
many numbers, and these to something of every component.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from tilewright.codegen.cache_codes import CodeLayout
from tilewright.codegen.cache_residual import ResidualLayout
from tilewright.codegen.cache_slots import round_up
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.kv_outliers import Outliers
from tilewright.codegen.mlir.rows import Row
from tilewright.codegen.mlir.value import Val, constant, shuffle

Product = Callable[[Val, int, Val], tuple[Val, Val]]
"""Two vectors to be multiplied, of a row and a column, from a place on."""


class Vectors(Protocol):
    """What vectors are read from."""

    def load(self, index: Val | int, lanes: int = 0) -> Val: ...


class Residuals:
    """Of the ``rows`` rows of a task, whose blocks have ``keys`` keys; results have ``out_size`` components."""

    def __init__(self, kernel: Kernel, cache: CodeLayout, rows: int, keys: int, out_size: int) -> None:
        self.kernel, self.cache, self.lanes, self.ranks = kernel, cache, kernel.lanes, range(cache.rank)
        self.rows, self.keys, self.out_size = rows, keys, out_size
        self.at_once = max(min(self.lanes // max(cache.rank, 1), rows), 1)  # rows whose sums make a vector
        self.width = round_up(rows, self.at_once) * cache.rank
        self.q = kernel.scratch(rows * cache.k_residual.row, "f32")
        self.tokens = kernel.scratch(max(cache.rank, 1) * keys, "f32")  # factors of a block's
        self.products = kernel.scratch(keys // cache.group * self.width + self.lanes, "f32")  # [group][row][rank]
        self.sums = kernel.scratch(round_up(rows, self.lanes) * out_size, "f32")
        self.outliers = Outliers(kernel, cache, rows, keys, out_size) if cache.outliers else None

    def load_query(self, row: Val, source: Row) -> None:
        """Take the query of ``row``."""
        size = self.cache.k_residual.row
        for start in range(0, size, self.lanes):
            self.q.store(source.load(start).to("f32"), row * size + start)
        if self.outliers is not None:
            self.outliers.load_query(row, source)

    # --- keys ---------------------------------------------------------------------------------------------------------

    def keys_of(self, first: Val, k: Buffer, rows: Val, factor: float) -> None:
        """Take the keys of the run at ``k``, from key ``first`` of the block on; scores are ``factor`` times products."""
        layout = self.cache.k_residual
        if self.outliers is not None:
            self.outliers.keys_of(first, k, rows, factor)
        if not self.ranks:
            return
        self._load_tokens(first, k, layout)
        with self.kernel.loop(0, layout.groups) as groups:
            group = first // layout.group + groups.index

            def product(row: Val, j: int, start: Val) -> tuple[Val, Val]:
                return self.q.load(row * layout.row + start, self.lanes), self._component(k, layout, groups.index, j, start)

            self._sum_up(group, rows, constant(layout.row), product, factor)

    def score(self, scores: Sequence[Val], rows: Sequence[Val], start: Val) -> list[Val]:
        """Scores of rows with a vector of keys from ``start`` on, and what the factors add."""
        group, found = start // self.cache.group, list(scores)
        for j in self.ranks:
            token = self.tokens.load(start + j * self.keys, self.lanes)
            for r, row in enumerate(rows):
                product = self.products.load(group * self.width + row * self.cache.rank + j).splat(self.lanes)
                found[r] = token.fma(product, found[r])
        if self.outliers is None:
            return found
        return [self.outliers.score(score, row, start) for score, row in zip(found, rows)]

    # --- values -------------------------------------------------------------------------------------------------------

    def begin(self, rows: Val) -> None:
        """No values of the block have been seen."""
        with self.kernel.loop(0, rows * self.out_size, self.lanes) as loop:
            self.sums.store(constant(0.0, "f32", self.lanes), loop.index)
        if self.outliers is not None:
            self.outliers.begin()

    def finish(self, rows: Val) -> None:
        """All values of the block have been seen."""
        if self.outliers is not None:
            self.outliers.finish(self.sums, rows)

    def values_of(self, first: Val, v: Buffer, weights: Vectors, count: Val, rows: Val) -> None:
        """Add what the factors of the run at ``v`` make, from value ``first`` of the block on; ``count`` have weights."""
        layout = self.cache.v_residual
        seen = (count - first).min(constant(layout.run))
        if self.outliers is not None:
            self.outliers.values_of(first, v, weights, seen, rows)
        if not self.ranks:
            return
        self._load_tokens(first, v, layout)
        with self.kernel.loop(0, (seen + (layout.group - 1)) // layout.group) as groups:
            start = first + groups.index * layout.group

            def product(row: Val, j: int, token: Val) -> tuple[Val, Val]:
                weight = weights.load(row * self.keys + start + token, self.lanes)
                return weight, self.tokens.load(start + token + j * self.keys, self.lanes)

            self._sum_up(groups.index, rows, (count - start).min(constant(layout.group)), product, 1.0)
        self._add_components(v, layout, (seen + (layout.group - 1)) // layout.group, rows)

    def _add_components(self, v: Buffer, layout: ResidualLayout, groups: Val, rows: Val) -> None:
        """Of the first groups of a run, what weights came to times the factors of components."""
        last = rows - 1
        with (self.kernel.loop(0, self.out_size, self.lanes) as parts, self.kernel.loop(0, rows, self.at_once) as blocks):
            some = [(blocks.index + r).min(last) for r in range(self.at_once)]
            totals = [self.sums.load(row * self.out_size + parts.index, self.lanes) for row in some]
            with self.kernel.loop(0, groups, carry=totals) as loop:
                found = loop.values
                for j in self.ranks:
                    factor = self._component(v, layout, loop.index, j, parts.index)
                    for r, row in enumerate(some):
                        product = self.products.load(loop.index * self.width + row * self.cache.rank + j)
                        found[r] = factor.fma(product.splat(self.lanes), found[r])
                loop.next(*found)
            for row, total in zip(some, loop.results):
                self.sums.store(total, row * self.out_size + parts.index)

    def sum(self, place: Val) -> Val:
        """What a vector of the results' components gets of the block; ``place`` counts through rows."""
        return self.sums.load(place, self.lanes)

    # --- both ---------------------------------------------------------------------------------------------------------

    def _load_tokens(self, first: Val, memory: Buffer, layout: ResidualLayout) -> None:
        """The tokens' factors of a run as f32."""
        size = layout.stored.itemsize
        for j in self.ranks:
            with self.kernel.loop(0, layout.run, self.lanes) as loop:
                raw = memory.load((loop.index + j * layout.run) * size + layout.start, self.lanes * size)
                self.tokens.store(raw.bitcast(self.cache.scales).to("f32"), first + loop.index + j * self.keys)

    def _component(self, memory: Buffer, layout: ResidualLayout, group: Val, j: int, start: Val) -> Val:
        """A vector of components' factors of a group of the run at ``memory``."""
        size = layout.stored.itemsize
        place = (group * layout.rank + j) * layout.row + start
        return memory.load(place * size + layout.components, self.lanes * size).bitcast(self.cache.scales).to("f32")

    def _sum_up(self, group: Val, rows: Val, count: Val, product: Product, factor: float) -> None:
        """For all rows and columns the sums of products, ``product(row, column, place)``, over ``count`` places."""
        last, none = rows - 1, constant(0.0, "f32", self.lanes)
        pairs = [(r, j) for r in range(self.at_once) for j in self.ranks]
        with self.kernel.loop(0, rows, self.at_once) as blocks:
            some = [(blocks.index + r).min(last) for r in range(self.at_once)]
            with self.kernel.loop(0, count, self.lanes, [none] * len(pairs)) as loop:
                found = [product(some[r], j, loop.index) for r, j in pairs]
                loop.next(*(x.fma(y, total) for (x, y), total in zip(found, loop.values)))
            sums = sums_of(loop.results, self.lanes) * factor
            self.products.store(sums, group * self.width + blocks.index * self.cache.rank)


def sums_of(vectors: Sequence[Val], lanes: int) -> Val:
    """Lane i is the sum of all lanes of vector i: neighbours are added up, lane by lane, until one vector is left."""
    found = [*vectors, *[constant(0.0, "f32", lanes)] * (lanes - len(vectors))]
    bit = 1
    while bit < lanes:
        first = [lane if not lane & bit else lanes + lane - bit for lane in range(lanes)]
        second = [lane + bit if not lane & bit else lanes + lane for lane in range(lanes)]
        found = [shuffle(a, b, first) + shuffle(a, b, second) for a, b in zip(found[::2], found[1::2])]
        bit *= 2
    return found[0]
