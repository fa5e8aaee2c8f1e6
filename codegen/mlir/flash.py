"""Attention over blocks of keys with running softmax statistics (Milakov & Gimelshein 2018, Dao et al. 2022).

A task owns some rows, each one query of one head, that share a stream of keys and values. For every block of keys:
scores = q k^T (micro-kernels on registers), softmax with the statistics kept per row, sums += p v. Blocks come as
`CacheLayout` describes, whether they are a cache or were packed on the spot. Scores are in units of log 2, which saves
a multiplication in every exponential.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tilewright.codegen.cache import SLOT_STEP, VALUE_STEP, round_up, value_panels
from tilewright.codegen.mlir import math
from tilewright.codegen.mlir.builder import Buffer, Kernel, Loop
from tilewright.codegen.mlir.microkernel import Feed, Tile, emit_micro_kernel
from tilewright.codegen.mlir.rows import Row
from tilewright.codegen.mlir.value import Val, constant, intrinsic, iota
from tilewright.codegen.schedule import AttentionSchedule, registers

LOWEST = -(2.0**100)  # below every real score, yet finite: differences of two of them are 0, not NaN
LOG2E = 1.4426950408889634
_HEIGHTS = (6, 3, 2, 1)  # of tiles, when the count of rows is only known at run time
_UNROLL = 4  # vectors of scores at a time


@dataclass(frozen=True)
class Shape:
    """Static facts: ``group`` heads share keys; sizes of a head; ``dtype`` and ``panel`` of the blocks.

    With ``dot`` the queries and p are rounded to bf16, as vdpbf16ps wants them: for bf16 queries and blocks only.
    """

    group: int
    dim: int
    vdim: int
    dtype: str
    panel: int
    dot: bool
    scale: float
    softcap: float
    queries: int | None = None  # of a sequence in one call, when known


# 2**f for 0 <= f < 1, within 7.5e-5 and 9e-8 of the exact value: least-squares fits with the greatest errors levelled.
_ROUGH = (0.07802419364452362, 0.2260672152042389, 0.6958337426185608, 0.9999251961708069)
_EXACT = (0.0018775742501020432, 0.008989345282316208, 0.05582631379365921, 0.24015361070632935, 0.6931530833244324,
          0.9999999403953552)


def power_of_two(x: Val, rough: bool) -> Val:
    """2**x for x <= 0 (-inf too), within 2e-7, or within 8e-5 when ``rough``: enough for what is rounded to bf16."""
    if x.lanes * 32 != 512:
        return math.exp2_of_negative(x)
    zero, every, current = constant(0.0, "f32", 16), constant(-1, "i16"), constant(4, "i32")
    floor = constant(9, "i32")  # the fraction is what the floor leaves; infinities leave 0
    fraction = intrinsic("llvm.x86.avx512.mask.reduce.ps.512", "f32", 16, x, floor, zero, every, current)
    value = math.polynomial(fraction, _ROUGH if rough else _EXACT)
    return intrinsic("llvm.x86.avx512.mask.scalef.ps.512", "f32", 16, value, x, zero, every, current)


Adjust = Callable[[Val, Val, Val, int], Val]
"""``(scores, row, key, lanes) -> scores``: add a bias to, or mask, the scores of ``lanes`` keys from ``key`` on."""


@dataclass(frozen=True)
class Keys:
    """Where a block of keys starts."""

    memory: Buffer
    place: Val


@dataclass(frozen=True)
class Values:
    """A block of values: its head's ``slots`` values start at ``place``, the block is from the ``first`` on."""

    memory: Buffer
    place: Val
    slots: int
    first: Val


@dataclass(frozen=True)
class Visible:
    """Keys ``low <= key < high`` that a row sees; ``low`` is None when it is always 0."""

    low: Val | None
    high: Val


class Flash:
    """The rows of one task, held in scratch memory."""

    def __init__(self, kernel: Kernel, shape: Shape, schedule: AttentionSchedule,
                 blocks: tuple[Buffer, Buffer]) -> None:
        """``blocks`` are the buffers (not offset) that keys and values will be read from."""
        self.kernel, self.shape, self.keys, self.lanes = kernel, shape, schedule.keys, kernel.lanes
        self.rows = max(schedule.rows // shape.group, 1) * shape.group
        self.exact = shape.queries == 1  # every task has the same few rows
        if self.exact:
            self.rows = shape.group
        self.split = shape.dtype == "bf16" and not shape.dot
        self.heights = self._even_heights() if self.exact else list(_HEIGHTS)
        self.compute = "bf16" if shape.dot else "f32"
        pair = 2 if shape.dtype == "bf16" else 1
        self.q_size, self.out_size = round_up(shape.dim, pair), round_up(shape.vdim, VALUE_STEP)
        self.value_panels = value_panels(self.out_size, shape.panel)
        self.q = kernel.scratch(self.rows * self.q_size, self.compute)
        self.scores = kernel.scratch(self.rows * self.keys, "f32")
        self.p = kernel.scratch(self.rows * self.keys, self.compute)
        self.top = kernel.scratch(self.rows, "f32")
        self.weight = kernel.scratch(self.rows * self.lanes, "f32")
        self.sums = kernel.scratch(self.rows * self.out_size, "f32")
        self._build_micro_kernels(blocks, schedule.prefetch)

    # --- micro-kernels ------------------------------------------------------------------------------------------------

    def _build_micro_kernels(self, blocks: tuple[Buffer, Buffer], prefetch: int) -> None:
        shape, (k, v) = self.shape, blocks
        self.pair = 2 if shape.dtype == "bf16" else 1
        self.score_kernels, self.value_kernels = {}, {}
        feed = self._feed(shape.panel)
        self.step = feed.step
        for height in sorted(set(self.heights)):
            width = self._score_width(height)
            tile = self._tile(height, width, (self.q_size, self.keys), prefetch, fresh=True)
            self.score_kernels[height] = emit_micro_kernel(
                self.kernel, f"scores{height}x{width}", feed, tile, self.step, (self.q, k, self.scores))
            for panel, width in sorted({(p, w) for _, p in self.value_panels for w in self._widths(height, p)}):
                tile = self._tile(height, width, (self.keys, self.out_size), prefetch)
                self.value_kernels[height, panel, width] = emit_micro_kernel(
                    self.kernel, f"values{height}x{width}of{panel}", self._feed(panel), tile, self.step,
                    (self.p, v, self.sums))

    def _feed(self, panel: int) -> Feed:
        return Feed(self.compute, self.shape.dtype, panel, self.lanes, self.shape.dot)

    def _tile(self, height: int, width: int, strides: tuple[int, int], prefetch: int, fresh: bool = False) -> Tile:
        columns = tuple(vector * self.lanes * self.pair for vector in range(width))
        # Only low tiles wait for memory: in taller ones there is enough arithmetic for the hardware to keep up.
        ahead = prefetch if self.exact else 0
        return Tile(height, columns, *strides, max(1, 4 // height), ahead, fresh)

    def _even_heights(self) -> list[int]:
        """All rows, in as few tiles as registers allow, nearly equal."""
        parts = -(-self.rows // max(self._widest(1) // 2, 4))
        return [self.rows // parts + (i < self.rows % parts) for i in range(parts)]

    def _widest(self, height: int) -> int:
        """Vectors that a tile of so many rows has registers for; bf16 without a dot product takes two for each."""
        count = registers(self.kernel.target)
        return max((count // 2 if self.split else count * 3 // 4) // height, 1)

    def _score_width(self, height: int) -> int:
        """Vectors of keys of a tile: a whole part of a panel."""
        return min(1 << (self._widest(height).bit_length() - 1), self.shape.panel // self.lanes)

    def _widths(self, height: int, panel: int) -> list[int]:
        """Vectors of components of each tile in a panel, nearly equal."""
        vectors = panel // self.lanes
        parts = -(-vectors // self._widest(height))
        return [vectors // parts + (i < vectors % parts) for i in range(parts)]

    def _walk(self, rows: Val, call: Callable[[int, Val], None]) -> None:
        """``call(height, first row)`` for tiles that cover all rows."""
        done = constant(0)
        if self.exact:
            for height in self.heights:
                call(height, done)
                done = done + height
            return
        for height in _HEIGHTS[:2]:
            start, done = done, done + (rows - done) // height * height
            with self.kernel.loop(start, done, height) as loop:
                call(height, loop.index)
        for height in _HEIGHTS[2:]:
            with self.kernel.when((rows - done).eq(height)):
                call(height, done)

    # --- a task -------------------------------------------------------------------------------------------------------

    def reset(self, rows: Val) -> None:
        """Forget everything: no key has been seen."""
        zero = constant(0.0, "f32", self.lanes)
        with self.kernel.loop(0, rows) as loop:
            self.top.store(constant(LOWEST, "f32"), loop.index)
            self.weight.store(zero, loop.index * self.lanes)
            for place in range(0, self.out_size, self.lanes):
                self.sums.store(zero, loop.index * self.out_size + place)

    def load_query(self, row: Val, source: Row) -> None:
        """Take the query of ``row``."""
        for start in range(0, self.q_size, self.lanes):
            # The scratch ends with the last row: write no more than belongs to it.
            keep = self.q_size - start
            inside = None if keep >= self.lanes else self.kernel.mask(constant(keep), self.lanes)
            self.q.store(source.load(start).to(self.compute), row * self.q_size + start, inside)

    def block(self, keys: Keys, values: Values, key: Val, count: Val, rows: Val,
              visible: Callable[[Val], Visible], adjust: Adjust | None = None) -> None:
        """Attend to ``count`` keys from ``key`` on.

        ``visible(query)`` gives the keys that the rows of a query see, ``query`` counting from 0 in this task.
        """
        runs = (count + (SLOT_STEP - 1)) // SLOT_STEP
        self._score(keys, runs, rows)
        with self.kernel.loop(0, rows // self.shape.group) as queries:
            seen = visible(queries.index)
            with self.kernel.loop(0, self.shape.group) as heads:
                row = queries.index * self.shape.group + heads.index
                self._soften(row, key, runs * SLOT_STEP, seen, adjust)
        self._add_values(values, count, rows)

    def _score(self, keys: Keys, runs: Val, rows: Val) -> None:
        steps = self.q_size // self.step
        whole = self.shape.panel // self.lanes

        def call(height: int, row: Val) -> None:
            with self.kernel.loop(0, runs) as loop:
                for vector in range(0, SLOT_STEP // self.lanes, self._score_width(height)):
                    inside = vector // whole * self.shape.panel * self.q_size + vector % whole * self.lanes * self.pair
                    at = keys.place + loop.index * (SLOT_STEP * self.q_size) + inside
                    score_at = row * self.keys + loop.index * SLOT_STEP + vector * self.lanes
                    numbers = (row * self.q_size, at, score_at, steps, 0)
                    self.score_kernels[height]((self.q, keys.memory, self.scores), numbers)

        self._walk(rows, call)

    def _add_values(self, values: Values, count: Val, rows: Val) -> None:
        steps = (count + (self.step - 1)) // self.step

        def call(height: int, row: Val) -> None:
            for start, panel in self.value_panels:
                column = 0
                for width in self._widths(height, panel):
                    at = values.place + values.first * panel + (start * values.slots + column * self.pair)
                    numbers = (row * self.keys, at, row * self.out_size + start + column, steps, 0)
                    self.value_kernels[height, panel, width]((self.p, values.memory, self.sums), numbers)
                    column += width * self.lanes

        self._walk(rows, call)

    def _soften(self, row: Val, key: Val, keys: Val, seen: Visible, adjust: Adjust | None) -> None:
        """One row of scores becomes one row of p; the row's statistics follow."""
        plain = not self.shape.softcap and adjust is None and self.shape.scale > 0
        factor = constant(self.shape.scale * LOG2E if plain else 1.0, "f32")
        partly = seen.high < key + keys
        if seen.low is not None:
            partly = partly | (seen.low > key)
        with self.kernel.when(partly if plain else constant(True, "bool")):
            self._adjust(row, key, keys, seen, adjust, plain)
        at, lowest = row * self.keys, constant(float("-inf"), "f32", self.lanes)
        with self._vectors(keys, lowest) as (loop, starts):
            (top,) = loop.values
            for start in starts:
                top = top.max(self.scores.load(at + start, self.lanes))
            loop.next(top)
        old = self.top.load(row)
        new = old.max(loop.results[0].reduce("max") * factor)
        with self.kernel.when(new > old):
            self._rescale(row, old, new)
        with self._vectors(keys, self.weight.load(row * self.lanes, self.lanes)) as (loop, starts):
            (total,) = loop.values
            for start in starts:
                score = self.scores.load(at + start, self.lanes)
                p = power_of_two(score.fma(factor, -new), rough=self.shape.dot)
                total = total + p
                self.p.store(p.to(self.compute), at + start)
            loop.next(total)
        self.weight.store(loop.results[0], row * self.lanes)

    @contextmanager
    def _vectors(self, keys: Val, *carry: Val) -> Iterator[tuple[Loop, list[Val]]]:
        """A loop over the scores of a row, with the starts of the vectors of each round."""
        with self.kernel.loop(0, keys, _UNROLL * self.lanes, carry) as loop:
            yield loop, [loop.index + i * self.lanes for i in range(_UNROLL)]

    def _adjust(self, row: Val, key: Val, keys: Val, seen: Visible, adjust: Adjust | None, plain: bool) -> None:
        """Mask the scores of a row and, unless ``plain``, bring them to their final value in units of log 2."""
        with self._vectors(keys) as (_, starts):
            for start in starts:
                place = row * self.keys + start
                score = self.scores.load(place, self.lanes)
                if not plain:
                    score = self._final(score, row, key + start, adjust)
                number = iota(self.lanes)
                keep = number < (seen.high - key - start).to("i32").splat(self.lanes)
                if seen.low is not None:
                    keep = keep & (number >= (seen.low - key - start).to("i32").splat(self.lanes))
                self.scores.store(keep.select(score, float("-inf")), place)

    def _final(self, score: Val, row: Val, key: Val, adjust: Adjust | None) -> Val:
        score = score * self.shape.scale
        if self.shape.softcap:
            score = math.tanh(score * (1 / self.shape.softcap)) * self.shape.softcap
        if adjust is not None:
            score = adjust(score, row, key, self.lanes)
        return score * LOG2E

    def _rescale(self, row: Val, old: Val, new: Val) -> None:
        factor = math.exp2_of_negative((old - new).splat(self.lanes))
        self.top.store(new, row)
        self.weight.store(self.weight.load(row * self.lanes, self.lanes) * factor, row * self.lanes)
        for start in range(0, self.out_size, self.lanes):
            place = row * self.out_size + start
            self.sums.store(self.sums.load(place, self.lanes) * factor, place)

    def store_part(self, row: Val, memory: Buffer, place: Val) -> None:
        """Keep what the row has seen: the sums, then the top and its weight, ``part_size`` elements from ``place`` on."""
        for start in range(0, self.out_size, self.lanes):
            memory.store(self.sums.load(row * self.out_size + start, self.lanes), place + start)
        memory.store(self.top.load(row), place + self.out_size)
        memory.store(self.weight.load(row * self.lanes, self.lanes).reduce("sum"), place + (self.out_size + 1))

    def finish(self, row: Val, out: Buffer, place: Val, sink: Val | None = None) -> None:
        """Store the row's result; ``sink`` is a further score that only counts in the denominator."""
        total = self.weight.load(row * self.lanes, self.lanes).reduce("sum")
        factor = (total > 0.0).select(1.0 / total, constant(0.0, "f32"))
        if sink is not None:
            top, sink = self.top.load(row), sink * LOG2E
            both = top.max(sink)
            share = math.exp2_of_negative(top - both)
            factor = share / (total * share + math.exp2_of_negative(sink - both))
        for start in range(0, self.out_size, self.lanes):
            left = self.shape.vdim - start
            if left <= 0:
                break
            mask = None if left >= self.lanes else self.kernel.mask(constant(left), self.lanes)
            value = self.sums.load(row * self.out_size + start, self.lanes) * factor
            out.store(value.to(out.dtype), place + start, mask)
