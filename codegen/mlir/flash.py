"""Attention over blocks of keys with running softmax statistics (Milakov & Gimelshein 2018, Dao et al. 2022).

A task owns some rows, each one query of one head, that share a stream of keys and values. For every block of keys:
scores = q k^T (micro-kernels on registers), softmax with the statistics kept per row, sums += p v. Blocks come as
`CacheLayout` describes, whether they are a cache or were packed on the spot.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tilewright.codegen.cache import PANEL, round_up
from tilewright.codegen.mlir import math
from tilewright.codegen.mlir.builder import Buffer, Function, Kernel
from tilewright.codegen.mlir.microkernel import Feed, Tile, emit_micro_kernel
from tilewright.codegen.mlir.value import Val, constant, iota
from tilewright.codegen.schedule import AttentionSchedule

_LOWEST = -1e30  # below every real score, yet finite: differences of two of them are 0, not NaN
_TALLEST = 6
_ROWS = (4, 2, 1)  # what is left of the rows after tallest tiles, in halves


@dataclass(frozen=True)
class Shape:
    """Static facts: ``group`` heads share keys; sizes of a head; ``dtype`` of the blocks of keys and values.

    With ``dot`` the queries and p are rounded to bf16, as vdpbf16ps wants them: for bf16 queries and blocks only.
    """

    group: int
    dim: int
    vdim: int
    dtype: str
    dot: bool
    scale: float
    softcap: float


Adjust = Callable[[Val, Val, Val, int], Val]
"""``(scores, row, key, lanes) -> scores``: add a bias to, or mask, the scores of ``lanes`` keys from ``key`` on."""


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
        self.compute = "bf16" if shape.dot else "f32"
        pair = 2 if shape.dtype == "bf16" else 1
        self.q_size, self.out_size = round_up(shape.dim, pair), round_up(shape.vdim, PANEL)
        self.q = kernel.scratch(self.rows * self.q_size, self.compute)
        self.scores = kernel.scratch(self.rows * self.keys, "f32")
        self.p = kernel.scratch(self.rows * self.keys, self.compute)
        self.top = kernel.scratch(self.rows, "f32")
        self.weight = kernel.scratch(self.rows * self.lanes, "f32")
        self.sums = kernel.scratch(self.rows * self.out_size, "f32")
        self._build_micro_kernels(blocks, schedule.prefetch)

    # --- micro-kernels ------------------------------------------------------------------------------------------------

    def _build_micro_kernels(self, blocks: tuple[Buffer, Buffer], prefetch: int) -> None:
        widest, shape = 4 if self.lanes == 16 else 2, self.shape
        k, v = blocks
        score_feed = Feed(self.compute, shape.dtype, PANEL, self.lanes, shape.dot)
        self.score_parts = _cut(self.keys // self.lanes, widest)
        self.score_kernels = {
            count: self._tiles(f"scores{count}", score_feed, self._key_columns(count), (self.q, k, self.scores),
                               (self.q_size, self.keys), prefetch, fresh=True)
            for count in set(self.score_parts)
        }
        value_feed = Feed(self.compute, shape.dtype, self.out_size, self.lanes, shape.dot)
        self.value_parts = _cut(self.out_size // self.lanes, widest)
        columns = tuple(i * self.lanes * value_feed.pair for i in range(widest))
        self.value_kernels = {
            count: self._tiles(f"values{count}", value_feed, columns[:count], (self.p, v, self.sums),
                               (self.keys, self.out_size), prefetch)
            for count in set(self.value_parts)
        }
        self.step, self.pair = value_feed.step, value_feed.pair

    def _tiles(self, name: str, feed: Feed, columns: tuple[int, ...], buffers: Sequence[Buffer],
               strides: tuple[int, int], prefetch: int, fresh: bool = False) -> dict[int, Function]:
        made = {}
        for rows in (_TALLEST, *_ROWS):
            tile = Tile(rows, columns, *strides, max(1, 4 // rows), prefetch, fresh)
            made[rows] = emit_micro_kernel(self.kernel, f"{name}_rows{rows}", feed, tile, feed.step, buffers)
        return made

    def _key_columns(self, vectors: int) -> tuple[int, ...]:
        """Where vectors of keys lie: panels of 16 keys, one or two vectors each."""
        per_panel, pair = PANEL // self.lanes, 2 if self.shape.dtype == "bf16" else 1
        return tuple(v // per_panel * PANEL * self.q_size + v % per_panel * self.lanes * pair for v in range(vectors))

    def _walk(self, tiles: dict[int, Function], rows: Val, call: Callable[[Function, Val], None]) -> None:
        """``call`` a tile function for all rows, the tallest tiles first."""
        full = rows // _TALLEST * _TALLEST
        with self.kernel.loop(0, full, _TALLEST) as loop:
            call(tiles[_TALLEST], loop.index)
        left = rows - full
        for count in _ROWS:
            with self.kernel.when((left & count).ne(0)):
                call(tiles[count], full + (left & ~(2 * count - 1)))

    # --- a task -------------------------------------------------------------------------------------------------------

    def reset(self, rows: Val) -> None:
        """Forget everything: no key has been seen."""
        zero = constant(0.0, "f32", self.lanes)
        with self.kernel.loop(0, rows) as loop:
            self.top.store(constant(_LOWEST, "f32"), loop.index)
            self.weight.store(zero, loop.index * self.lanes)
            for place in range(0, self.out_size, self.lanes):
                self.sums.store(zero, loop.index * self.out_size + place)

    def load_query(self, row: Val, source: Buffer, place: Val) -> None:
        """Take the query of ``row`` from ``dim`` elements of ``source``."""
        for start in range(0, self.q_size, self.lanes):
            left = self.shape.dim - start
            mask = None if left >= self.lanes else self.kernel.mask(constant(left), self.lanes)
            value = source.load(place + start, self.lanes, mask).to("f32").to(self.compute)
            # The scratch ends with the last row: write no more than belongs to it.
            keep = self.q_size - start
            inside = None if keep >= self.lanes else self.kernel.mask(constant(keep), self.lanes)
            self.q.store(value, row * self.q_size + start, inside)

    def block(self, k: tuple[Buffer, Val], v: tuple[Buffer, Val], key: Val, count: Val, rows: Val,
              visible: Callable[[Val], Visible], adjust: Adjust | None = None) -> None:
        """Attend to ``count`` keys from ``key`` on; ``k`` and ``v`` say where the block starts.

        ``visible(query)`` gives the keys that the rows of a query see, ``query`` counting from 0 in this task.
        """
        self._score(k, rows)
        with self.kernel.loop(0, rows // self.shape.group) as queries:
            seen = visible(queries.index)
            with self.kernel.loop(0, self.shape.group) as heads:
                self._soften(queries.index * self.shape.group + heads.index, key, seen, adjust)
        self._add_values(v, count, rows)

    def _score(self, k: tuple[Buffer, Val], rows: Val) -> None:
        memory, place = k
        steps = self.q_size // self.step
        done = 0
        for count in self.score_parts:
            start = done

            def call(micro: Function, row: Val, start: int = start) -> None:
                at = place + start // (PANEL // self.lanes) * PANEL * self.q_size
                numbers = (row * self.q_size, at, row * self.keys + start * self.lanes, steps, 0)
                micro((self.q, memory, self.scores), numbers)

            self._walk(self.score_kernels[count], rows, call)
            done += count

    def _add_values(self, v: tuple[Buffer, Val], count: Val, rows: Val) -> None:
        memory, place = v
        steps = (count + (self.step - 1)) // self.step
        done = 0
        for vectors in self.value_parts:
            start = done * self.lanes

            def call(micro: Function, row: Val, start: int = start) -> None:
                numbers = (row * self.keys, place + start * self.pair, row * self.out_size + start, steps, 0)
                micro((self.p, memory, self.sums), numbers)

            self._walk(self.value_kernels[vectors], rows, call)
            done += vectors

    def _soften(self, row: Val, key: Val, seen: Visible, adjust: Adjust | None) -> None:
        """One row of scores becomes one row of p; the row's statistics follow."""
        scores = [self._masked(row, key, start, seen, adjust) for start in range(0, self.keys, self.lanes)]
        top = scores[0]
        for score in scores[1:]:
            top = top.max(score)
        old = self.top.load(row)
        new = old.max(top.reduce("max"))
        with self.kernel.when(new > old):
            self._rescale(row, old, new)
        total = self.weight.load(row * self.lanes, self.lanes)
        for index, score in enumerate(scores):
            p = math.exp(score - new)
            total = total + p
            self.p.store(p.to(self.compute), row * self.keys + index * self.lanes)
        self.weight.store(total, row * self.lanes)

    def _masked(self, row: Val, key: Val, start: int, seen: Visible, adjust: Adjust | None) -> Val:
        score = self.scores.load(row * self.keys + start, self.lanes) * self.shape.scale
        if self.shape.softcap:
            score = math.tanh(score * (1 / self.shape.softcap)) * self.shape.softcap
        if adjust is not None:
            score = adjust(score, row, key + start, self.lanes)
        number = iota(self.lanes) + start
        keep = number < (seen.high - key).to("i32").splat(self.lanes)
        if seen.low is not None:
            keep = keep & (number >= (seen.low - key).to("i32").splat(self.lanes))
        return keep.select(score, float("-inf"))

    def _rescale(self, row: Val, old: Val, new: Val) -> None:
        factor = math.exp((old - new).splat(self.lanes))
        self.top.store(new, row)
        self.weight.store(self.weight.load(row * self.lanes, self.lanes) * factor, row * self.lanes)
        for start in range(0, self.out_size, self.lanes):
            place = row * self.out_size + start
            self.sums.store(self.sums.load(place, self.lanes) * factor, place)

    def finish(self, row: Val, out: Buffer, place: Val, sink: Val | None = None) -> None:
        """Store the row's result; ``sink`` is a further score that only counts in the denominator."""
        total = self.weight.load(row * self.lanes, self.lanes).reduce("sum")
        factor = (total > 0.0).select(1.0 / total, constant(0.0, "f32"))
        if sink is not None:
            top = self.top.load(row)
            both = top.max(sink)
            share = math.exp(top - both)
            factor = share / (total * share + math.exp(sink - both))
        for start in range(0, self.out_size, self.lanes):
            left = self.shape.vdim - start
            if left <= 0:
                break
            mask = None if left >= self.lanes else self.kernel.mask(constant(left), self.lanes)
            value = self.sums.load(row * self.out_size + start, self.lanes) * factor
            out.store(value.to(out.dtype), place + start, mask)


def _cut(vectors: int, widest: int) -> list[int]:
    """``vectors`` in nearly equal parts of at most ``widest``."""
    parts = -(-vectors // widest)
    return [vectors // parts + (i < vectors % parts) for i in range(parts)]
