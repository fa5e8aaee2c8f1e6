"""Attention over blocks of keys with running softmax statistics (Milakov & Gimelshein 2018, Dao et al. 2022).

A task owns some rows, each one query of one head, that share a stream of keys and values. For every block of keys:
scores = q k^T (micro-kernels on registers), softmax with the statistics kept per row, sums += p v. Blocks come as
`CacheLayout` describes, whether they are a cache or were packed on the spot.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from tilewright.codegen.cache import value_panels
from tilewright.codegen.cache_slots import SLOT_STEP, round_up
from tilewright.codegen.mlir.builder import Buffer, Function, Kernel
from tilewright.codegen.mlir.flash_rows import LOG2E, Adjust, Shape, SoftRows, Visible, power_of_two
from tilewright.codegen.mlir.flash_sources import Picked, Scattered, Source, Straight
from tilewright.codegen.mlir.flash_turned import Turned
from tilewright.codegen.mlir.kv_runs import Runs, emit_runs_kernel
from tilewright.codegen.mlir.microkernel import Feed, Tile, emit_micro_kernel
from tilewright.codegen.mlir.rows import Row
from tilewright.codegen.mlir.value import SIZES, Val, constant
from tilewright.codegen.schedule import AttentionSchedule, registers

_TRANSLATED = 4096  # bytes with one address to translate, as far as can be counted on; before, nothing there is fetched
_BLOCKS = 3  # whose runs are known: one at work, one fetched, one touched


class Watch(Protocol):
    """Sees the weights of blocks go by."""

    def put(self, weights: Val, row: Val, key: Val) -> None:
        """Weights (a vector, f32) of a row from ``key`` on, relative to its top at hand."""

    def top(self, top: Val, row: Val, key: Val, keys: Val) -> None:
        """That top, for ``keys`` keys, whole runs of SLOT_STEP, from ``key`` on."""


class Flash(SoftRows):
    """The rows of one task, held in scratch memory."""

    watch: Watch | None = None
    """What else is done with weights, in the tasks that are being emitted."""

    def __init__(self, kernel: Kernel, shape: Shape, schedule: AttentionSchedule,
                 blocks: tuple[Buffer, Buffer], shared: SoftRows | None = None) -> None:
        """``blocks`` are the buffers (not offset) that keys and values will be read from."""
        super().__init__(kernel, shape, schedule, shared)
        self.split = shape.dtype == "bf16" and not shape.dot
        self.heights = self._heights(self.at_once)
        self.first = constant(0)  # of the rows that are at work
        self.compute = "bf16" if shape.dot else "f32"
        self.q_size = round_up(shape.dim, 2 if shape.dtype == "bf16" else 1)
        self.value_panels = value_panels(self.out_size, shape.panel)
        self.key_panel = min(shape.panel, shape.run or shape.panel)
        self.q = kernel.scratch(self.rows * self.q_size, self.compute)
        self.p = kernel.scratch(self.at_once * self.keys, self.compute)
        self.ahead = self.keys // shape.run if shape.run else 0  # from a run to that in the same place of the next block
        self.runs = kernel.scratch(_BLOCKS * self.ahead + 1, "i64") if shape.run else None
        sizes = self.q_size, self.out_size
        self.turned = Turned(kernel, shape, self.keys, sizes, blocks[0]) if shape.turned else None
        self._build_micro_kernels(blocks, schedule.prefetch)

    @property
    def fetches(self) -> bool:
        """Whether runs of the next block are asked for meanwhile: few rows are done before memory answers."""
        return self.exact and self.runs is not None

    # --- micro-kernels ------------------------------------------------------------------------------------------------

    def _build_micro_kernels(self, blocks: tuple[Buffer, Buffer], prefetch: int) -> None:
        shape, (k, v) = self.shape, blocks
        self.pair = 2 if shape.dtype == "bf16" else 1
        self.score_kernels, self.value_kernels = {}, {}
        feed = self._feed(self.key_panel)
        self.step = feed.step
        for height in sorted(set(self.heights)):
            width = self._score_width(height)
            tile = self._tile(height, width, (self.q_size, self.keys), prefetch, fresh=True)
            self.score_kernels[height] = emit_micro_kernel(
                self.kernel, f"scores{height}x{width}", feed, tile, self.step, (self.q, k, self.scores))
            for panel, width in sorted({(p, w) for _, p in self.value_panels for w in self._widths(height, p)}):
                tile = self._tile(height, width, (self.keys, self.out_size), prefetch)
                self.value_kernels[height, panel, width] = self._value_kernel(panel, tile, v)

    def _value_kernel(self, panel: int, tile: Tile, v: Buffer) -> Function:
        name, feed = f"values{tile.rows}x{tile.vectors}of{panel}", self._feed(panel)
        if self.turned is not None:
            feed, buffers = replace(feed, w_dtype=self.compute), (self.p, self.turned.block, self.sums)
            columns = tuple(vector * self.lanes * feed.pair for vector in range(tile.vectors))
            tile = replace(tile, columns=columns, prefetch=0)
            return emit_micro_kernel(self.kernel, name, feed, tile, feed.step, buffers)
        if self.runs is None:
            return emit_micro_kernel(self.kernel, name, feed, tile, self.step, (self.p, v, self.sums))
        size = panel if self.shape.picked else self.out_size
        runs = Runs(self.shape.run, self.shape.run * size, self.ahead if self.fetches else 0)
        return emit_runs_kernel(self.kernel, name, feed, tile, runs, (self.p, v, self.sums, self.runs))

    def _feed(self, panel: int) -> Feed:
        return Feed(self.compute, self.shape.dtype, panel, self.lanes, self.shape.dot)

    def _tile(self, height: int, width: int, strides: tuple[int, int], prefetch: int, fresh: bool = False) -> Tile:
        columns = tuple(vector * self.lanes * self.pair for vector in range(width))
        # Only low tiles wait for memory: in taller ones there is enough arithmetic for the hardware to keep up.
        ahead = prefetch if self.exact and not self.fetches else 0
        told = fresh and self.fetches
        return Tile(height, columns, *strides, max(1, 4 // height), ahead, fresh, told, in_order=not self.exact)

    def _widest(self, height: int) -> int:
        """Vectors that a tile of so many rows has registers for; bf16 without a dot product takes two for each."""
        count = registers(self.kernel.target)
        return max((count // 2 if self.split else count * 3 // 4) // height, 1)

    def _score_width(self, height: int) -> int:
        """Vectors of keys of a tile: a whole part of a panel."""
        return min(1 << (self._widest(height).bit_length() - 1), self.key_panel // self.lanes)

    def _widths(self, height: int, panel: int) -> list[int]:
        """Vectors of components of each tile in a panel, nearly equal."""
        vectors = panel // self.lanes
        parts = -(-vectors // self._widest(height))
        return [vectors // parts + (i < vectors % parts) for i in range(parts)]

    # --- a task -------------------------------------------------------------------------------------------------------

    def load_query(self, row: Val, source: Row) -> None:
        """Take the query of ``row``."""
        for start in range(0, self.q_size, self.lanes):
            # The scratch ends with the last row: write no more than belongs to it.
            keep = self.q_size - start
            inside = None if keep >= self.lanes else self.kernel.mask(constant(keep), self.lanes)
            self.q.store(source.load(start).to(self.compute), row * self.q_size + start, inside)

    def block(self, source: Source, key: Val, count: Val, rows: Val,
              visible: Callable[[Val], Visible], adjust: Adjust | None = None) -> None:
        """Attend to ``count`` keys from ``key`` on.

        ``visible(query)`` gives the keys that the rows of a query see, ``query`` counting from 0 in this task.
        """
        if not isinstance(source, Straight):
            self._find_runs(source, count)
        if self.shape.together == 1:
            self._attend(source, key, count, rows, visible, adjust)
            return
        with self.kernel.loop(0, rows // self.shape.group) as sequences:
            self.first, group = sequences.index * self.shape.group, constant(self.shape.group)
            self._attend(source, key, count, group, lambda query: visible(sequences.index + query),
                         adjust and (lambda score, row, *place: adjust(score, self.first + row, *place)))
        self.first = constant(0)

    def _attend(self, source: Source, key: Val, count: Val, rows: Val,
                visible: Callable[[Val], Visible], adjust: Adjust | None) -> None:
        self.weigh(source, key, count, rows, visible, adjust)
        self._add_values(source, count, rows)

    def weigh(self, source: Source, key: Val, count: Val, rows: Val,
              visible: Callable[[Val], Visible], adjust: Adjust | None = None) -> None:
        """The weights of a block in one piece, and the rows' statistics, without the values."""
        keys, group = (count + (SLOT_STEP - 1)) // SLOT_STEP * SLOT_STEP, self.shape.group
        self._score(source, count, rows)
        with self.kernel.loop(0, rows // group) as queries:
            seen, first = visible(queries.index), queries.index * group
            # Two loops: a row waits for its top, and others hide that.
            with self.kernel.loop(0, group) as heads:
                self._lift(first + heads.index, key, keys, seen, adjust)
            with self.kernel.loop(0, group) as heads:
                self._soften(first + heads.index, key, keys, self._factor(adjust))

    def score(self, source: Source, count: Val, rows: Val) -> None:
        """Only the products of the rows with ``count`` keys, in ``scores``."""
        if not isinstance(source, Straight):
            self._find_runs(source, count)
        self._score(source, count, rows)

    def _find_runs(self, source: Scattered | Picked, count: Val) -> None:
        """The runs of the block, and of those that are fetched or touched meanwhile."""
        run = self.shape.run
        runs = constant(_BLOCKS * self.ahead) if self.fetches else (count + (run - 1)) // run
        with self.kernel.loop(0, runs) as loop:
            self.runs.store(source.run_of(loop.index * run).to("i64"), loop.index)
        if not self.fetches:
            return
        keys, values = run * self.q_size, 0 if self.turned else run * self.out_size
        with self.kernel.loop((_BLOCKS - 1) * self.ahead, runs) as loop:
            number = self.runs.load(loop.index).to("index")
            for memory, start, size in ((source.k, source.keys_of(number), keys), (source.v, number * values, values)):
                for place in range(0, size, _TRANSLATED // SIZES[memory.dtype]):
                    memory.prefetch(start + place, locality=2)

    def _score(self, source: Source, count: Val, rows: Val) -> None:
        steps, run = self.q_size // self.step, self.shape.run or SLOT_STEP
        whole = self.key_panel // self.lanes

        def call(height: int, row: Val) -> None:
            with self.kernel.loop(0, (count + (run - 1)) // run) as loop:
                start, more = self._start_of_keys(source, loop.index)
                for vector in range(0, run // self.lanes, self._score_width(height)):
                    inside = vector // whole * self.key_panel * self.q_size + vector % whole * self.lanes * self.pair
                    score_at = row * self.keys + loop.index * run + vector * self.lanes
                    numbers = ((self.first + row) * self.q_size, start + inside, score_at, steps, 0, *more)
                    self.score_kernels[height]((self.q, source.k, self.scores), numbers)

        self._walk(self.heights, rows, call)

    def _start_of_keys(self, source: Source, number: Val) -> tuple[Val, list[Val]]:
        """Where a run of the block starts, and how many bytes on from there to fetch ahead."""
        if isinstance(source, Straight):
            return source.keys + number * (SLOT_STEP * self.q_size), []
        start = source.keys_of(self.runs.load(number).to("index"))
        if not self.fetches:
            return start, []
        following = source.keys_of(self.runs.load(number + self.ahead).to("index"))
        return start, [(following - start) * SIZES[source.k.dtype]]

    def _add_values(self, source: Source, count: Val, rows: Val) -> None:
        if self.turned is not None:
            self._add_turned(self.turned, source, count, rows)
            return
        steps = (count + (self.step - 1)) // self.step

        def call(height: int, row: Val) -> None:
            for start, panel in self.value_panels:
                column = 0
                for width in self._widths(height, panel):
                    micro = self.value_kernels[height, panel, width]
                    sums_at = (self.first + row) * self.out_size + (start + column)
                    if isinstance(source, Straight):
                        at = source.values + source.first * panel + (start * source.slots + column * self.pair)
                        micro((self.p, source.v, self.sums), (row * self.keys, at, sums_at, steps, 0))
                    else:
                        at = self._start_of_values(source, start, panel) + column * self.pair
                        micro((self.p, source.v, self.sums, self.runs), (row * self.keys, at, sums_at, steps, 0))
                    column += width * self.lanes

        self._walk(self.heights, rows, call)

    def _add_turned(self, turned: Turned, source: Source, count: Val, rows: Val) -> None:
        """Panel by panel, each for all rows."""
        pair, run = (2 if self.shape.dot else 1), self.shape.run or SLOT_STEP
        steps = (count + (pair - 1)) // pair

        def call(height: int, row: Val) -> None:
            column = 0
            for width in self._widths(height, panel[2]):
                sums_at = (self.first + row) * self.out_size + loop.index + column
                self.value_kernels[height, panel[2], width](
                    (self.p, turned.block, self.sums), (row * self.keys, constant(column * pair), sums_at, steps, 0))
                column += width * self.lanes

        for panel in turned.panels():
            with self.kernel.loop(*panel) as loop:
                turned.fill(source.k, loop.index, panel, count, run, lambda n: self._start_of_keys(source, n)[0])
                self._walk(self.heights, rows, call)

    def _start_of_values(self, source: Scattered | Picked, start: int, panel: int) -> Val:
        """Where the values of a run numbered 0 would have their components from ``start`` on."""
        if isinstance(source, Scattered):
            return constant(start * self.shape.run)
        return source.lane * (source.slots * (self.out_size - panel)) + start * source.slots

    def _factor(self, adjust: Adjust | None) -> float:
        """What scores only want to be multiplied with, which may follow their top; or else 1, when they are final."""
        plain = not self.shape.softcap and adjust is None and self.shape.scale > 0
        return self.shape.scale * LOG2E if plain else 1.0

    def _lift(self, row: Val, key: Val, keys: Val, seen: Visible, adjust: Adjust | None) -> None:
        """Mask one row of scores; its top follows."""
        kept, at, factor = self.first + row, row * self.keys, self._factor(adjust)
        plain, lowest = factor != 1.0, constant(float("-inf"), "f32", self.lanes)
        partly = seen.high < key + keys
        if seen.low is not None:
            partly = partly | (seen.low > key)
        with self.kernel.when(partly if plain else constant(True, "bool")):
            self._adjust(row, key, keys, seen, adjust, plain)
        with self._vectors(keys, lowest) as (loop, starts):
            (top,) = loop.values
            for start in starts:
                top = top.max(self.scores.load(at + start, self.lanes))
            loop.next(top)
        old = self.top.load(kept)
        new = old.max(loop.results[0].reduce("max") * factor)
        with self.kernel.when(new > old):
            self._rescale(kept, old, new)

    def _soften(self, row: Val, key: Val, keys: Val, factor: float) -> None:
        """One row of scores becomes one row of p; its weight follows."""
        kept, at, new = self.first + row, row * self.keys, self.top.load(self.first + row)
        if self.watch is not None:
            self.watch.top(new, row, key, keys)
        with self._vectors(keys, self.weight.load(kept * self.lanes, self.lanes)) as (loop, starts):
            (total,) = loop.values
            for start in starts:
                score = self.scores.load(at + start, self.lanes)
                p = power_of_two(score.fma(factor, -new), rough=self.shape.dot)
                total = total + p
                if self.watch is not None:
                    self.watch.put(p, row, key + start)
                self.p.store(p.to(self.compute), at + start)
            loop.next(total)
        self.weight.store(loop.results[0], kept * self.lanes)
