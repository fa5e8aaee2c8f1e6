"""Attention over blocks of codes (see `CodeLayout`) with integer products.

A row's query becomes one or two signed digits of 8 bits under a scale of its own, so scores are exact sums of i32. What a
key's weight and the scale of its value make together, p, becomes unsigned digits of 8 bits under the scale of the largest
p of a block; a block's sums of i32 then join the row's sums in f32. One digit of each is the precision of SageAttention
(arXiv:2410.02367), two leave errors below those of bf16. Zeros take no products: that of a key adds its multiple of the
query's sum to a score, those of values are summed for themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from tilewright.codegen.cache import value_panels
from tilewright.codegen.cache_codes import CodeLayout
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.flash_rows import Adjust, Shape, Visible
from tilewright.codegen.mlir.kv_code_channels import ChannelKeys, TableFeed
from tilewright.codegen.mlir.kv_code_feeds import ValueFeed
from tilewright.codegen.mlir.kv_code_rows import ONE_DIGIT as ONE_DIGIT
from tilewright.codegen.mlir.kv_code_rows import CodeRows, Digits
from tilewright.codegen.mlir.linear_codes import DotFeed
from tilewright.codegen.mlir.microkernel import AnyFeed, Tile, emit_micro_kernel
from tilewright.codegen.mlir.value import Val, constant
from tilewright.codegen.schedule import AttentionSchedule

LINE = 64  # bytes that memory gives at a time
_PAGE = 64  # lines along which the hardware fetches by itself
_LEAD = 4  # of them set it going
_FEW_PRODUCTS = 4  # of vectors, with one line: it is done before the few requests that a core may have open bring another


def _shares(first: int, count: int, parts: int) -> list[tuple[int, int]]:
    """First and count of the parts of a range, nearly equal."""
    ends = [first + count * i // parts for i in range(parts + 1)]
    return [(start, end - start) for start, end in itertools.pairwise(ends)]


class CodeFlash(CodeRows):
    """The rows of one task over a cache of codes."""

    def __init__(self, kernel: Kernel, shape: Shape, schedule: AttentionSchedule, cache: CodeLayout,
                 memory: tuple[Buffer, Buffer], digits: Digits) -> None:
        """``memory`` are the buffers (not offset) of keys and values, bytes."""
        super().__init__(kernel, shape, schedule, cache, digits)
        self.memory = memory
        self.channels = ChannelKeys(kernel, cache) if cache.channels else None
        self.q_heights, self.p_heights = self._heights(self.rows * digits.q), self._heights(self.rows * digits.p)
        self.value_panels = value_panels(self.out_size, cache.panel)
        self.k_lines, self.v_lines = -(-cache.k_run // LINE), -(-cache.v_run // LINE)
        self.k_early, self.v_late = self.k_lines * 2 // 3, self.v_lines // 3
        self.led = self.rows * max(digits.q, digits.p) * 8 <= _FEW_PRODUCTS * cache.bits
        self.told = self.exact and not self.led  # micro-kernels how far to fetch ahead
        self.one_run = self.keys <= cache.run  # in a block: then products start from zero by themselves
        self._build_micro_kernels(schedule.prefetch)

    # --- micro-kernels ------------------------------------------------------------------------------------------------

    def _build_micro_kernels(self, prefetch: int) -> None:
        cache, (k, v), vnni = self.cache, self.memory, self.kernel.target.has_vnni
        self.looks_up = self._looks_up()
        self.expands = self.channels is not None and not self.looks_up
        self.k_told = self.told and not self.expands
        k = self.channels.block if self.channels and self.expands else k
        sizes = cache.key_panel, self.lanes, cache.key_size, vnni
        self.key_feed = DotFeed("i8" if self.channels else cache.dtype, *sizes)
        if self.looks_up:
            self.key_feed = TableFeed(cache.dtype, *sizes)
        self.score_kernels, self.value_kernels = {}, {}
        for height in sorted(set(self.q_heights)):
            strides = self.q_stride, self.keys
            tile = self._tile(height, self._score_width(height), strides, prefetch, True, self.k_told)
            buffers = self.q, k, self.dots, *self._tables()
            self.score_kernels[height] = self._micro_kernel("scores", self.key_feed, tile, buffers)
        for height in sorted(set(self.p_heights)):
            for panel, width in sorted({(p, w) for _, p in self.value_panels for w in self._widths(height, p)}):
                tile = self._tile(height, width, (self.keys, self.out_size), prefetch, self.one_run, self.told)
                feed = ValueFeed(cache.dtype, panel, self.lanes, cache.run, vnni)
                made = self._micro_kernel("values", feed, tile, (self.p, v, self.products))
                self.value_kernels[height, panel, width] = made

    def _micro_kernel(self, name: str, feed: AnyFeed, tile: Tile, buffers: Sequence[Buffer]):
        name = f"coded_{name}{tile.rows}x{tile.vectors}of{feed.panel}"
        opened = feed.opened if isinstance(feed, TableFeed) else None
        return emit_micro_kernel(self.kernel, name, feed, tile, feed.step, buffers, opened)

    def _looks_up(self) -> bool:
        """Whether products look up their keys: where these take part in those of one tile only, and in whole groups."""
        if self.channels is None or not self.kernel.target.has_vnni or not self.exact or len(self.q_heights) > 1:
            return False
        return self.cache.group % (self._score_width(self.q_heights[0]) * self.lanes) == 0

    def _tables(self) -> tuple[Buffer, ...]:
        return (*self.channels.tables, self.channels.at) if self.channels and self.looks_up else ()

    def _tile(self, height: int, width: int, strides: tuple[int, int], prefetch: int, fresh: bool = False,
              told: bool = False) -> Tile:
        columns = tuple(vector * self.lanes * 4 for vector in range(width))
        return Tile(height, columns, *strides, max(1, 4 // height), prefetch if self.exact else 0, fresh, told)

    def _score_width(self, height: int) -> int:
        """Vectors of keys of a tile: a whole part of a panel."""
        return min(1 << (self._widest(height).bit_length() - 1), self.cache.key_panel // self.lanes)

    def _widths(self, height: int, panel: int) -> list[int]:
        """Vectors of components of each tile in a panel, nearly equal."""
        vectors = panel // self.lanes
        parts = -(-vectors // self._widest(height))
        return [vectors // parts + (i < vectors % parts) for i in range(parts)]

    # --- a task -------------------------------------------------------------------------------------------------------

    def block(self, runs: Callable[[Val], tuple[Val, Val]], key: Val, count: Val, rows: Val,
              visible: Callable[[Val], Visible], adjust: Adjust | None = None) -> None:
        """Attend to ``count`` keys from ``key`` on, the first of a run.

        ``runs(i)`` gives the places of the keys and of the values of the block's i-th run. ``visible(query)`` gives the
        keys that the rows of a query see, ``query`` counting from 0 in this task.
        """
        run = self.cache.run
        number = (count + (run - 1)) // run
        with self.kernel.loop(0, number) as loop:
            k, v = runs(loop.index)
            self._load_scales(loop.index * run, k, v)
            if self.channels:
                self.channels.prepare(self.memory[0].at(k), self.scales["k"].at(loop.index * run))
                if not self.looks_up:
                    self.channels.expand(self.memory[0].at(k))
            if self.residuals is not None:
                of_run = loop.index * run, self.memory[0].at(k)
                self.residuals.keys_of(*of_run, rows, self._unit(self._plain(adjust)))
            self._score(loop.index * run, k, runs(loop.index + number)[0], rows)
        step = 4 * self.lanes
        keys = (count + (step - 1)) // step * step
        self._scores(rows, keys, self._plain(adjust))
        with self.kernel.loop(0, rows // self.shape.group) as queries:
            seen = visible(queries.index)
            with self.kernel.loop(0, self.shape.group) as heads:
                self._mask(queries.index * self.shape.group + heads.index, key, keys, seen, adjust)
        with self.kernel.loop(0, rows) as loop:
            if self.exact:
                self._fetch_share(loop.index, runs, number)
            self._weigh(loop.index, keys)
        self._settle(rows)
        if not self.one_run:
            self._clear_products()
        if self.residuals is not None:
            self.residuals.begin(rows)
        with self.kernel.loop(0, number) as loop:
            first = loop.index * run
            places = runs(loop.index)[1], runs(loop.index + number)[1]
            self._add_values(first, *places, (count - first).min(constant(run)), rows)
            if self.residuals is not None:
                self.residuals.values_of(first, self.memory[1].at(places[0]), self.scores, keys, rows)
        if self.residuals is not None:
            self.residuals.finish(rows)
        with self.kernel.loop(0, rows) as loop:
            self._flush(loop.index)

    def _fetch_share(self, row: Val, runs: Callable[[Val], tuple[Val, Val]], number: Val) -> None:
        """A row's share of the lines that are not asked for beside products: the last of the keys, the first of the values.

        Micro-kernels that are told where to ask do so for all codes; scales and zeros are left.
        """
        cache = self.cache
        k = (cache.k_codes // LINE if self.k_told else self.k_early, self.k_lines)
        v = (cache.v_codes // LINE, self.v_lines) if self.told else (0, self.v_late)
        with self.kernel.loop(number, number * 2) as loop:
            for memory, place, (start, end) in zip(self.memory, runs(loop.index), (k, v)):
                lines = -(-(end - start) // self.rows)
                self._fetch(memory, place + row * (lines * LINE), start, lines)

    def _fetch(self, memory: Buffer, place: Val, first: int, lines: int) -> None:
        """Ask for lines of the next block, some at a time, so that memory is busy all the time.

        Where memory can never be fast enough the hardware is better at it, once it knows where to go on.
        """
        for line in range(first, first + lines):
            if not self.led or line % _PAGE < _LEAD:
                memory.prefetch(place + line * LINE, locality=2)

    def _load_scales(self, first: Val, k: Val, v: Val) -> None:
        """The scales and zeros of a run as f32."""
        cache = self.cache
        for name in self.scales:
            if name == "k" and self.channels:
                continue
            codes, place = (cache.k_codes, k) if name[0] == "k" else (cache.v_codes, v)
            place = place + (codes + cache.run * cache.scale_size * name.endswith("zero"))
            for start in range(0, cache.run, self.lanes):
                raw = self.memory[name[0] == "v"].load(place + start * cache.scale_size, self.lanes * cache.scale_size)
                self.store_scales(name, raw.bitcast(cache.scales).to("f32"), first + start)

    def _score(self, first: Val, place: Val, following: Val, rows: Val) -> None:
        cache, feed = self.cache, self.key_feed
        expanded = self.channels if self.expands else None
        memory, bits = (expanded.block, 8) if expanded else (self.memory[0], cache.bits)
        panel_size = cache.key_panel * cache.key_size * bits // 8
        place = constant(0) if expanded else place

        calls = sum(cache.run // self.lanes // self._score_width(height) for height in self.q_heights)
        shares = iter(_shares(0, self.k_early, calls))

        def call(height: int, row: Val) -> None:
            for panel in range(cache.run // cache.key_panel):
                for vector in range(0, cache.key_panel // self.lanes, self._score_width(height)):
                    if self.exact and not self.k_told:
                        self._fetch(self.memory[0], following, *next(shares))
                    at = place + (panel * panel_size + vector * self.lanes * 4)
                    to = row * self.keys + first + (panel * cache.key_panel + vector * self.lanes)
                    numbers = (row * self.q_stride, at, to, cache.key_size // feed.step, 0)
                    if self.k_told:
                        numbers = (*numbers, following - place)
                    if self.channels:
                        group = (panel * cache.key_panel + vector * self.lanes) // cache.group
                        self.channels.at.store(constant(group * self.channels.size, "i64"), 0)
                    self.score_kernels[height]((self.q, memory, self.dots, *self._tables()), numbers)

        self._walk_digits(self.q_heights, self.digits.q, rows, call)

    def _add_values(self, first: Val, place: Val, following: Val, count: Val, rows: Val) -> None:
        calls = sum(len(self._widths(height, panel)) for height in self.p_heights for _, panel in self.value_panels)
        shares = iter(_shares(self.v_late, self.v_lines - self.v_late, calls))
        steps = (count + (self.cache.pair - 1)) // self.cache.pair

        def call(height: int, row: Val) -> None:
            for start, panel in self.value_panels:
                column = 0
                for width in self._widths(height, panel):
                    if self.exact and not self.told:
                        self._fetch(self.memory[1], following, *next(shares))
                    at = place + (start * self.cache.run * self.cache.bits // 8 + column * 4)
                    numbers = (row * self.keys + first, at, row * self.out_size + (start + column), steps, 0)
                    if self.told:
                        numbers = (*numbers, following - place)
                    self.value_kernels[height, panel, width]((self.p, self.memory[1], self.products), numbers)
                    column += width * self.lanes

        self._walk_digits(self.p_heights, self.digits.p, rows, call)

    def _walk_digits(self, heights: list[int], digits: int, rows: Val, call: Callable[[int, Val], None]) -> None:
        """As `_walk`, for all digits of the rows: in one go when the rows of one follow those of another at once."""
        if self.exact:
            self._walk(heights, rows * digits, call)
            return
        for digit in range(digits):
            self._walk(heights, rows, lambda height, row, first=digit * self.rows: call(height, row + first))
