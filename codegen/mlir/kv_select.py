"""Choose the pages that one query is to see by each head of keys: ``ops.Select`` (Quest, arXiv:2406.10774).

What a page promises is a product of vectors, up . max + down . min, with up and down (q + spread * |q|) / 2 and
(q - spread * |q|) / 2, which are added up over the query heads of a group before. Tasks are parts of the pages of a
sequence, for all heads; those that run last choose among the pages of a head, by bisection of the bits of these numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tilewright.codegen.attention_pattern import DENSE, Slice
from tilewright.codegen.cache import CacheLayout
from tilewright.codegen.cache_codes import CodeLayout
from tilewright.codegen.cache_slots import round_up
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.kv_places import Places
from tilewright.codegen.mlir.kv_summary import Halves, halves
from tilewright.codegen.mlir.rows import Row
from tilewright.codegen.mlir.value import SIZES, Val, constant
from tilewright.ir.ops.kv_select import FORCED

_FEW_PAGES = 32  # parts of a sequence's pages are no shorter, if there are so many
_MOST_PARTS = 16
_AHEAD = 8192  # bytes of summaries that are asked for: no hardware can guess where they lie
_LINE = 64
_LOWEST = -(1 << 31)


@dataclass(frozen=True)
class SelectSpec:
    """Of q ``[B, 1, heads, dim]`` over at most ``pages`` pages: i32 ``[B, cache.heads, most]``; see ``ops.Select``."""

    heads: int
    cache: CacheLayout | CodeLayout
    pages: int
    share: float
    least: int
    spread: float
    most: int
    q: Slice = DENSE

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.cache.heads

    @property
    def row(self) -> int:
        """Bounds of one head."""
        return round_up(self.pages, _LINE)

    @property
    def parts(self) -> int:
        """Parts of the pages of one sequence, at most."""
        return max(min(_MOST_PARTS, self.pages // _FEW_PAGES), 1)

    def tasks(self, b: Any) -> Any:
        """Number of tasks."""
        return b * self.parts

    def last(self, b: Any) -> Any:
        """Number of tasks that choose."""
        return b * self.cache.heads

    def scratch(self, b: Any) -> Any:
        """Bytes of the bounds."""
        return b * self.cache.heads * self.row * 4


@dataclass(frozen=True)
class SelectBuffers:
    """Arguments of the kernel: q, the keys, ``start`` i64 [B], ``table`` i32 [B, T], the result, and bounds as i32."""

    q: Buffer
    k: Buffer
    start: Buffer
    table: Buffer
    out: Buffer
    bounds: Buffer


def emit_select(kernel: Kernel, spec: SelectSpec, b: Val, width: Val, buffers: SelectBuffers) -> None:
    """Emit the task loop into ``kernel``; ``width`` is the T of the table."""
    _Select(kernel, spec, b, width, buffers).emit()


class _Select:
    """The state of one emission."""

    def __init__(self, kernel: Kernel, spec: SelectSpec, b: Val, width: Val, buffers: SelectBuffers) -> None:
        self.kernel, self.spec, self.b, self.buffers, self.lanes = kernel, spec, b, buffers, kernel.lanes
        self.places = Places(spec.cache, buffers.table, width)
        self.size = 2 * spec.cache.summary_row
        self.weights = kernel.scratch(spec.cache.heads * self.size, "f32")
        self.kind = spec.cache.full if isinstance(spec.cache, CodeLayout) else spec.cache.dtype

    def emit(self) -> None:
        kernel, heads, parts = self.kernel, self.spec.cache.heads, self.spec.parts
        work = self.b * parts
        with kernel.loop(kernel.begin, kernel.end.min(work)) as tasks:
            batch, part = tasks.index // parts, tasks.index % parts
            used, wanted = self._counts(batch)
            size = (used + (parts - 1)) // parts
            first = part * size
            with kernel.when((wanted < used) & (first < used)):
                self._score(batch, first, (first + size).min(used - 1))
        with kernel.loop(kernel.begin.max(work), kernel.end) as tasks:
            lane = tasks.index - work
            used, wanted = self._counts(lane // heads)
            kernel.branch(wanted < used, lambda: self._choose(lane, used, wanted), lambda: self._take_all(lane, used))
            with kernel.loop(wanted, self.spec.most) as rest:
                self._put(lane, rest.index, constant(-1, "i32"))

    def _counts(self, batch: Val) -> tuple[Val, Val]:
        """The pages of the sequence, and how many are to be chosen."""
        start = self.buffers.start.load(batch).to("index")
        used = start // self.spec.cache.run + 1
        share = (used.to("i64").to("f32") * self.spec.share).ceil().to("i64").to("index")
        return used, share.max(max(self.spec.least, FORCED)).min(used)

    # --- bounds -------------------------------------------------------------------------------------------------------

    def _score(self, batch: Val, first: Val, end: Val) -> None:
        """The bounds of pages ``first <= page < end`` of one sequence, all full."""
        heads, kernel, none = self.spec.cache.heads, self.kernel, constant(0.0, "f32", self.lanes)
        with kernel.loop(0, heads) as every:
            self._weigh(batch, every.index)
        ahead = max(_AHEAD // (heads * self.size * SIZES[self.kind]), 1)
        with kernel.loop(first, end) as pages:
            self._fetch(self._summary(batch, (pages.index + ahead).min(end - 1)))
            memory = self._summary(batch, pages.index)
            with kernel.loop(0, heads) as every:
                total, at = none, every.index * self.size
                for start in range(0, self.size, self.lanes):
                    weight = self.weights.load(at + start, self.lanes)
                    total = memory.load(at + start, self.lanes).to("f32").fma(weight, total)
                row = (batch * heads + every.index) * self.spec.row
                self.buffers.bounds.store(_ordered(total.reduce("sum")), row + pages.index)

    def _summary(self, batch: Val, page: Val) -> Halves:
        """The summaries of all heads of a page."""
        run = self.places.run_of(batch, constant(0), page * self.spec.cache.run)
        return halves(self.spec.cache, self.buffers.k, run)

    def _fetch(self, memory: Halves) -> None:
        step = _LINE // SIZES[self.kind]
        for start in range(0, self.spec.cache.heads * self.size, step):
            memory.prefetch(start, locality=2)

    def _weigh(self, batch: Val, head: Val) -> None:
        """What the least, then what the greatest components of a head are multiplied with."""
        cache, spec, starts = self.spec.cache, self.spec, range(0, self.spec.cache.summary_row, self.lanes)
        none = constant(0.0, "f32", self.lanes)
        with self.kernel.loop(0, spec.group, carry=[none] * (2 * len(starts))) as members:
            first = batch * (spec.q.stride or spec.heads * cache.dim) + spec.q.offset
            query = Row(self.kernel, self.buffers.q, first + (head * spec.group + members.index) * cache.dim, cache.dim)
            parts = [query.load(start) for start in starts]
            some = [x.abs() * spec.spread for x in parts]
            parts = [(x - y) * 0.5 for x, y in zip(parts, some)] + [(x + y) * 0.5 for x, y in zip(parts, some)]
            members.next(*[total + x for total, x in zip(members.values, parts)])
        for start, total in zip(range(0, self.size, self.lanes), members.results):
            self.weights.store(total, head * self.size + start)

    # --- choice -------------------------------------------------------------------------------------------------------

    def _choose(self, lane: Val, used: Val, wanted: Val) -> None:
        """The first page, the last, and between them those of the greatest bounds, in order."""
        need, row = (wanted - FORCED).to("i32"), lane * self.spec.row
        threshold = self._threshold(row, used - 1, need)
        above = self._count(row, used - 1, lambda bound: bound > threshold)
        self._put(lane, constant(0), constant(0, "i32"))
        with self.kernel.loop(1, used - 1, carry=[constant(1), need - above]) as pages:
            at, alike = pages.values
            bound = self.buffers.bounds.load(row + pages.index)
            equal = bound.eq(threshold) & (alike > 0)
            taken = equal | (bound > threshold)
            # There is room for one more than is chosen, that of the last page.
            self._put(lane, at, pages.index.to("i32"))
            pages.next(at + taken.select(constant(1), 0), alike - equal.select(constant(1, "i32"), 0))
        self._put(lane, wanted - 1, (used - 1).to("i32"))

    def _threshold(self, row: Val, end: Val, need: Val) -> Val:
        """The greatest number that at least ``need`` bounds reach, bit by bit from the highest on."""
        found = constant(0, "i32")
        with self.kernel.loop(0, 32, carry=[found, constant(_LOWEST, "i32")]) as bits:
            found, bit = bits.values
            trial = found | bit
            reached = self._count(row, end, lambda bound: bound >= (trial ^ _LOWEST))
            bits.next((reached >= need).select(trial, found), bit.shift_right_logical(1))
        return bits.results[0] ^ _LOWEST

    def _count(self, row: Val, end: Val, holds: Any) -> Val:
        """How many bounds of pages ``1 <= page < end`` hold."""
        lanes, one = self.lanes, constant(1, "i32", self.lanes)
        with self.kernel.loop(1, end, lanes, carry=[constant(0, "i32", lanes)]) as pages:
            (total,) = pages.values
            mask = self.kernel.mask(end - pages.index, lanes)
            bound = self.buffers.bounds.load(row + pages.index, lanes, mask)
            pages.next(total + (mask & holds(bound)).select(one, 0))
        return pages.results[0].reduce("sum")

    def _take_all(self, lane: Val, used: Val) -> None:
        with self.kernel.loop(0, used) as pages:
            self._put(lane, pages.index, pages.index.to("i32"))

    def _put(self, lane: Val, at: Val, page: Val) -> None:
        self.buffers.out.store(page, lane * self.spec.most + at)


def _ordered(x: Val) -> Val:
    """f32 as i32 of the same order."""
    bits = x.bitcast("i32")
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
