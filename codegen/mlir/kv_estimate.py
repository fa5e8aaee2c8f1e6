"""What blocks of keys are worth to queries, estimated: by the attention of some of them, or by products of their means.

For each row, a query of one head, a block keeps its top score and the weight of its keys relative to that; then both become
its share of the row's attention. Scores are in units of log 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tilewright.codegen.cache import CacheLayout
from tilewright.codegen.mlir import math
from tilewright.codegen.mlir.attention import for_rows
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.flash import Flash
from tilewright.codegen.mlir.flash_rows import LOG2E, LOWEST, Shape, power_of_two
from tilewright.codegen.mlir.flash_sources import Scattered, Source, Straight
from tilewright.codegen.mlir.kv_choose_spec import ChooseBuffers, ChooseSpec
from tilewright.codegen.mlir.kv_places import Places, key_place
from tilewright.codegen.mlir.rows import Row
from tilewright.codegen.mlir.value import Val, constant, iota
from tilewright.codegen.schedule import AttentionSchedule
from tilewright.ir import CONTIGUOUS


@dataclass(frozen=True)
class Span:
    """The queries ``low <= s < high`` of a call, which are its block ``number``."""

    number: Val
    low: Val
    high: Val


@dataclass(frozen=True)
class Mean:
    """The mean of ``count`` rows, ``stride`` elements apart, rounded to their type."""

    kernel: Kernel
    memory: Buffer
    place: Val
    stride: int
    count: Val
    size: int

    def load(self, start: int) -> Val:
        """One vector of elements from ``start`` on, as f32; zeros behind the end."""
        with self.kernel.loop(0, self.count, carry=[constant(0.0, "f32", self.kernel.lanes)]) as loop:
            row = Row(self.kernel, self.memory, self.place + loop.index * self.stride, self.size)
            loop.next(loop.values[0] + row.load(start))
        total = loop.results[0] / self.count.to("i64").to("f32").splat(self.kernel.lanes)
        return total.to(self.memory.dtype).to("f32")


class Estimate:
    """Rows of estimates of one head of keys at a time."""

    def __init__(self, kernel: Kernel, spec: ChooseSpec, schedule: AttentionSchedule, s: Val,
                 buffers: ChooseBuffers) -> None:
        op, cache = spec.op, spec.cache
        assert isinstance(cache, CacheLayout)
        self.kernel, self.spec, self.op, self.cache, self.s, self.buffers = kernel, spec, op, cache, s, buffers
        self.lanes, self.queries = kernel.lanes, spec.rows // spec.group
        schedule = replace(schedule, keys=max(schedule.keys, op.block))
        dot = kernel.target.has_bf16_dot and op.q.dtype.value == cache.dtype == "bf16"
        run = 0 if cache.layout == CONTIGUOUS else cache.run
        shape = Shape(spec.group, cache.dim, cache.vdim, cache.dtype, cache.panel, dot, op.scale, 0.0, None, run)
        self.flash, self.keys = Flash(kernel, shape, schedule, (buffers.k, buffers.v)), schedule.keys
        self.places = Places(cache, buffers.table, buffers.width)
        self.factor = op.scale * LOG2E

    def begin(self, batch: Val, head: Val, memory: Buffer) -> None:
        """Turn to a head of keys; ``memory`` is that of its task."""
        self.batch, self.head = batch, head
        self.start = self.buffers.start.load(batch).to("index")
        self.tops, self.sums = (memory.at(self.spec.rows_at(sums)) for sums in (False, True))

    # --- what is asked for --------------------------------------------------------------------------------------------

    def lines(self, columns: Buffer, slashes: Buffer) -> None:
        """The shares of the last queries' attention by block, and by diagonal, numbered from the far end of the last
        query's."""
        kernel, lanes, zero = self.kernel, self.lanes, constant(0.0, "f32", self.kernel.lanes)
        for array in (columns, slashes):
            with kernel.loop(0, self.spec.row, lanes) as loop:
                array.store(zero, loop.index)
        first = (self.s - self.op.sample).max(constant(0))
        part = 1.0 / ((self.s - first) * self.spec.group).to("i64").to("f32")
        last = (self.start + self.s - 1) // self.op.block
        with kernel.loop(first, self.s, self.queries) as some:
            token = some.index
            count = (self.s - token).min(constant(self.queries))
            blocks = self._rows(count, self.start + token + count, lambda query, head: self._query(token + query, head),
                                lambda row, at, key: self._weigh(row, at, key, token))

            def add(query: Val, member: Val, row: Val) -> None:
                further = last - (self.start + token + query) // self.op.block
                with kernel.loop(0, blocks, lanes) as loop:
                    share = self.sums.load(row * self.spec.row + loop.index, lanes) * part.splat(lanes)
                    for array, place in ((columns, loop.index), (slashes, loop.index + further)):
                        array.store(array.load(place, lanes) + share, place)

            for_rows(kernel, count, self.spec.group, add)

    def products(self, count: Val, span_of: Callable[[Val], Span]) -> None:
        """The shares of the means of ``count`` blocks of queries, at most ``queries``: a row for each head of each."""
        high = self.start + span_of(count - 1).high
        self._rows(count, high, lambda query, head: self._mean(span_of(query), head),
                   lambda row, at, key: self._average(row, at, key, self.start + span_of(row // self.spec.group).high))

    def mean_of_group(self, query: Val, blocks: Val, weights: Buffer) -> None:
        """What the query heads of one of `products` give each block on average."""
        lanes, group = self.lanes, self.spec.group
        with self.kernel.loop(0, blocks, lanes) as loop:
            total = constant(0.0, "f32", lanes)
            with self.kernel.loop(0, group, carry=[total]) as members:
                row = query * group + members.index
                members.next(members.values[0] + self.sums.load(row * self.spec.row + loop.index, lanes))
            weights.store(members.results[0] * (1.0 / group), loop.index)

    def distance(self, columns: Buffer, guess: Buffer) -> Val:
        """The square of the Jensen-Shannon distance between the last queries' attention and the products of their mean."""
        lanes, zero = self.lanes, constant(0.0, "f32", self.lanes)
        low = (self.s - self.op.sample).max(constant(0))
        blocks = (self.start + self.s - 1) // self.op.block + 1
        self.products(constant(1), lambda query: Span(query, low, self.s))
        self.mean_of_group(constant(0), blocks, guess)
        with self.kernel.loop(0, blocks, lanes, [zero]) as loop:
            p, q = columns.load(loop.index, lanes), guess.load(loop.index, lanes)
            middle, total = (p + q) * 0.5, loop.values[0]
            for x in (p, q):
                total = total + (x > 0.0).select(x * math.log(x / middle), 0.0)
            loop.next(total)
        return (loop.results[0].reduce("sum") * 0.5).max(0.0)

    # --- rows ---------------------------------------------------------------------------------------------------------

    def _rows(self, count: Val, high: Val, source: Callable[[Val, Val], Row | Mean],
              reduce: Callable[[Val, Val, Val], None]) -> Val:
        """Shares of all blocks before ``high`` for ``count`` queries; gives how many blocks these are."""
        kernel, op, rows = self.kernel, self.op, count * self.spec.group
        for_rows(kernel, count, self.spec.group, lambda query, member, row: self.flash.load_query(
            row, source(query, self.head * self.spec.group + member)))
        with kernel.loop(0, high, self.keys) as loop:
            key = loop.index
            inside = (high - key).min(constant(self.keys))
            self.flash.score(self._source(key, high), inside, rows)
            with kernel.loop(0, rows) as each, kernel.loop(0, (inside + (op.block - 1)) // op.block) as parts:
                first = parts.index * op.block
                reduce(each.index, each.index * self.keys + first, key + first)
        blocks = (high + (op.block - 1)) // op.block
        with kernel.loop(0, rows) as each:
            self._share(each.index, blocks)
        return blocks

    def _source(self, key: Val, high: Val) -> Source:
        cache, k, v = self.cache, self.buffers.k, self.buffers.v
        if cache.layout != CONTIGUOUS:
            return Scattered(k, v, lambda n: self.places.run_of(self.batch, self.head, (key + n).min(high - 1)),
                             lambda run: key_place(cache, run))
        lane = (self.batch * cache.heads + self.head) * cache.slots
        return Straight(k, v, (lane + key) * cache.key_size, lane * cache.value_size, cache.slots, key)

    def _place(self, token: Val, head: Val) -> Val:
        where, dim = self.spec.q, self.cache.dim
        return (self.batch * self.s + token) * self._stride + (head * dim + where.offset)

    @property
    def _stride(self) -> int:
        return self.spec.q.stride or int(self.op.q.shape[2]) * self.cache.dim

    def _query(self, token: Val, head: Val) -> Row:
        return Row(self.kernel, self.buffers.q, self._place(token, head), self.cache.dim)

    def _mean(self, span: Span, head: Val) -> Mean:
        place = self._place(span.low, head)
        return Mean(self.kernel, self.buffers.q, place, self._stride, span.high - span.low, self.cache.dim)

    def _scores(self, at: Val, seen: Val, outside: float) -> list[Val]:
        """The scores of a block from ``at`` on, ``outside`` for keys that are not seen."""
        lanes = self.lanes
        left = seen.to("i32").splat(lanes)
        return [(iota(lanes) < left - start).select(self.flash.scores.load(at + start, lanes), outside)
                for start in range(0, self.op.block, lanes)]  # fmt: skip

    def _weigh(self, row: Val, at: Val, key: Val, token: Val) -> None:
        """The top of a block's scores, and the weight of all relative to it."""
        position = self.start + token + row // self.spec.group
        scores = self._scores(at, position + 1 - key, float("-inf"))
        top = scores[0]
        for score in scores[1:]:
            top = top.max(score)
        top = (top.reduce("max") * self.factor).max(LOWEST)
        total = constant(0.0, "f32", self.lanes)
        for score in scores:
            total = total + power_of_two(score.fma(self.factor, -top.splat(self.lanes)), rough=self.flash.shape.dot)
        self._keep(row, key, top, total.reduce("sum"))

    def _average(self, row: Val, at: Val, key: Val, high: Val) -> None:
        """The mean of a block's scores, as its top; its weight is one, or none behind the last query."""
        seen = (high - key).max(constant(0))
        total = constant(0.0, "f32", self.lanes)
        for score in self._scores(at, seen, 0.0):
            total = total + score
        count = seen.min(constant(self.op.block)).max(1).to("i64").to("f32")
        some = seen > 0
        top = some.select(total.reduce("sum") / count * self.factor, constant(LOWEST, "f32"))
        self._keep(row, key, top, some.select(constant(1.0, "f32"), constant(0.0, "f32")))

    def _keep(self, row: Val, key: Val, top: Val, weight: Val) -> None:
        place = row * self.spec.row + key // self.op.block
        self.tops.store(top, place)
        self.sums.store(weight, place)

    def _share(self, row: Val, blocks: Val) -> None:
        """Weights of blocks become shares of the row's attention."""
        kernel, lanes, place = self.kernel, self.lanes, row * self.spec.row
        zero, lowest = constant(0.0, "f32", lanes), constant(LOWEST, "f32", lanes)
        self.tops.store(lowest, place + blocks)
        self.sums.store(zero, place + blocks)
        with kernel.loop(0, blocks, lanes, [lowest]) as loop:
            loop.next(loop.values[0].max(self.tops.load(place + loop.index, lanes)))
        top = loop.results[0].reduce("max").splat(lanes)
        with kernel.loop(0, blocks, lanes, [zero]) as loop:
            at = place + loop.index
            weight = self.sums.load(at, lanes) * math.exp2_of_negative(self.tops.load(at, lanes) - top)
            self.sums.store(weight, at)
            loop.next(loop.values[0] + weight)
        factor = (1.0 / loop.results[0].reduce("sum")).splat(lanes)
        with kernel.loop(0, blocks, lanes) as loop:
            at = place + loop.index
            self.sums.store(self.sums.load(at, lanes) * factor, at)
