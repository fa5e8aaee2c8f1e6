"""Choose blocks of keys for blocks of queries: ``ops.Choose`` (arXiv:2407.02490, arXiv:2502.20766).

A task is a head of keys of one sequence. Estimates (kv_estimate.py) are products of few queries, the last ones or means,
with all keys, by the micro-kernels of attention; what they give each block is all that is kept.
"""

from __future__ import annotations

from collections.abc import Callable

from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.kv_choose_spec import ChooseBuffers, ChooseSpec
from tilewright.codegen.mlir.kv_estimate import Estimate, Span
from tilewright.codegen.mlir.value import Val, constant, iota
from tilewright.codegen.schedule import AttentionSchedule

_NONE = -1.0  # of a weight: less than all
_MANY = float(1 << 24)


def emit_choose(kernel: Kernel, spec: ChooseSpec, schedule: AttentionSchedule, s: Val, buffers: ChooseBuffers) -> None:
    """Emit the task loop into ``kernel``."""
    _Choose(kernel, spec, schedule, s, buffers).emit()


class _Choose:
    """The state of one emission."""

    def __init__(self, kernel: Kernel, spec: ChooseSpec, schedule: AttentionSchedule, s: Val,
                 buffers: ChooseBuffers) -> None:
        self.kernel, self.spec, self.op, self.s, self.buffers = kernel, spec, spec.op, s, buffers
        self.lanes = kernel.lanes
        self.lists = (s + (self.op.queries - 1)) // self.op.queries
        self.estimate = Estimate(kernel, spec, schedule, s, buffers) if spec.estimates else None

    def emit(self) -> None:
        kernel, heads = self.kernel, self.spec.cache.heads
        with kernel.loop(kernel.begin, kernel.end) as tasks:
            self.batch, self.head, self.lane = tasks.index // heads, tasks.index % heads, tasks.index
            self.start = self.buffers.start.load(self.batch).to("index")
            self.end = self.start + self.s
            self.memory = self.buffers.memory.at(tasks.index * self.spec.task_size)
            for kind in dict.fromkeys(self.op.kinds):
                with kernel.when(self._has(kind)):
                    self._head(kind)

    def _has(self, kind: str) -> Val:
        """Whether the head of this task has a pattern."""
        found = constant(False, "bool")
        for head, own in enumerate(self.op.kinds):
            if own == kind:
                found = found | self.head.eq(head)
        return found

    def _array(self, number: int) -> Buffer:
        """An array with a number for each block."""
        return self.memory.at(number * self.spec.row)

    @property
    def keep(self) -> Buffer:
        return self._array(0)

    def _head(self, kind: str) -> None:
        if kind == "a-shape":
            self._each(self._fill)
            return
        self.kernel.branch(self.end <= self.op.dense, lambda: self._each(lambda span: None), lambda: self._estimated(kind))

    def _estimated(self, kind: str) -> None:
        assert self.estimate is not None
        self.estimate.begin(self.batch, self.head, self.memory)
        if kind == "block-sparse":
            self._by_products(False)
            return
        columns, slashes = self._array(1), self._array(2)
        self.estimate.lines(columns, slashes)
        if kind == "vertical-slash":
            self._by_lines(columns, slashes, gamma=False)
            return
        near = self.estimate.distance(columns, self._array(3)) < self.op.tau**2
        self.kernel.branch(near, lambda: self._by_products(True), lambda: self._by_lines(columns, slashes, gamma=True))

    # --- patterns -----------------------------------------------------------------------------------------------------

    def _each(self, add: Callable[[Span], None]) -> None:
        """Write the list of each block of queries, what it has always and what ``add`` marks besides."""
        with self.kernel.loop(0, self.lists) as loop:
            span = self._span(loop.index)
            self._always(span)
            add(span)
            self._write(span)

    def _span(self, number: Val) -> Span:
        low = number * self.op.queries
        return Span(number, low, (low + self.op.queries).min(self.s))

    def _by_lines(self, columns: Buffer, slashes: Buffer, gamma: bool) -> None:
        """Columns, and diagonals (numbered from the far end of the last query's), of the greatest weight."""
        op, count = self.op, (self.end - 1) // self.op.block + 1
        taken = self._array(4), self._array(5)
        for weights, keep, tokens in zip((columns, slashes), taken, (op.columns, op.slashes)):
            self._clear(keep)
            limit = _MANY if gamma else float(-(-tokens // op.block))
            self._best(weights, keep, count, constant(limit, "f32"), op.gamma if gamma else _MANY)

        def add(span: Span) -> None:
            first, last = self._own(span)
            with self._vectors(last + 1) as j:
                self.keep.store(self.keep.load(j, self.lanes).max(taken[0].load(j, self.lanes)), j)
            with self.kernel.loop(first, last + 1) as rows, self._vectors(rows.index + 1) as j:
                on = taken[1].load(j + (count - 1 - rows.index), self.lanes)
                self.keep.store(self.keep.load(j, self.lanes).max(on), j)
            if not gamma:
                self._fill(span)

        self._each(add)

    def _by_products(self, gamma: bool) -> None:
        """Blocks of the greatest weight by products of means, some blocks of queries at a time."""
        assert self.estimate is not None
        step = self.estimate.queries
        with self.kernel.loop(0, self.lists, step) as some:
            count = (self.lists - some.index).min(constant(step))
            self.estimate.products(count, lambda query: self._span(some.index + query))
            with self.kernel.loop(0, count) as each:
                span = self._span(some.index + each.index)
                self._always(span)
                blocks, weights = self._own(span)[1] + 1, self._array(3)
                self.estimate.mean_of_group(each.index, blocks, weights)
                limit = constant(_MANY, "f32") if gamma else self._room(blocks)
                self._best(weights, self.keep, blocks, limit, self.op.gamma if gamma else _MANY)
                self._write(span)

    def _room(self, blocks: Val) -> Val:
        """How many blocks of the best by products are taken, f32."""
        if self.op.tokens:
            return constant(float(-(-self.op.tokens // self.op.block)), "f32")
        return (blocks.to("i64").to("f32") * self.op.share).ceil()

    def _own(self, span: Span) -> tuple[Val, Val]:
        """The first and the last block in which queries stand."""
        return (self.start + span.low) // self.op.block, (self.start + span.high - 1) // self.op.block

    # --- marks --------------------------------------------------------------------------------------------------------

    def _vectors(self, count: Val):
        return _Vectors(self.kernel, count)

    def _clear(self, array: Buffer) -> None:
        with self._vectors(constant(self.spec.row)) as j:
            array.store(constant(0.0, "f32", self.lanes), j)

    def _always(self, span: Span) -> None:
        op, lanes = self.op, self.lanes
        last = self._own(span)[1]
        local = (self.start + span.low - op.local).max(constant(0)) // op.block
        local = (self.start + span.high <= op.dense).select(constant(0), local)
        with self._vectors(last + 1) as j:
            number = iota(lanes) + j.to("i32").splat(lanes)
            there = (number >= local.to("i32").splat(lanes)) | (number < -(-op.sinks // op.block))
            self.keep.store(there.select(constant(1.0, "f32", lanes), 0.0), j)

    def _fill(self, span: Span) -> None:
        """Mark the nearest blocks that are not yet, as many as ``tokens`` has room for."""
        if not self.op.tokens:
            return
        last, zero = self._own(span)[1], constant(0.0, "f32", self.lanes)
        self.keep.store(zero, last + 1)
        with self.kernel.loop(0, last + 1, self.lanes, [zero]) as loop:
            loop.next(loop.values[0] + self.keep.load(loop.index, self.lanes))
        room = float(-(-self.op.tokens // self.op.block)) - loop.results[0].reduce("sum")
        with self.kernel.loop(0, last + 1, carry=[room]) as loop:
            place = last - loop.index
            on = self.keep.load(place)
            free = (on.eq(0.0)) & (loop.values[0] > 0.0)
            self.keep.store(free.select(constant(1.0, "f32"), on), place)
            loop.next(free.select(loop.values[0] - 1.0, loop.values[0]))

    def _best(self, weights: Buffer, keep: Buffer, count: Val, limit: Val, gamma: float) -> None:
        """Mark the greatest weights, after those marked, until so many are or their sum is ``gamma``; spoils weights."""
        kernel, lanes = self.kernel, self.lanes
        zero = constant(0.0, "f32", lanes)
        none = constant(_NONE, "f32", lanes)
        weights.store(none, count)
        with kernel.loop(0, count, lanes, [zero, zero]) as loop:
            inside = iota(lanes) < (count - loop.index).to("i32").splat(lanes)
            marked = inside & (keep.load(loop.index, lanes) > 0.0)
            weight = weights.load(loop.index, lanes)
            weights.store(marked.select(none, weight), loop.index)
            number, total = loop.values
            loop.next(number + marked.select(constant(1.0, "f32", lanes), 0.0), total + marked.select(weight, 0.0))
        number, total = (value.reduce("sum") for value in loop.results)
        with kernel.loop(0, count, carry=[number, total]) as loop:
            number, total = loop.values
            more, same = (number < limit) & (total < gamma), [number, total]
            loop.next(*kernel.branch(more, lambda: self._take(weights, keep, count, *same), lambda: same))

    def _take(self, weights: Buffer, keep: Buffer, count: Val, number: Val, total: Val) -> list[Val]:
        """Mark the greatest weight, of two alike the first; all are taken once only negative ones are left."""
        kernel, lanes = self.kernel, self.lanes
        with kernel.loop(0, count, lanes, [constant(_NONE, "f32", lanes)]) as loop:
            loop.next(loop.values[0].max(weights.load(loop.index, lanes)))
        top = loop.results[0].reduce("max")
        far = constant((1 << 31) - 1, "i32", lanes)
        with kernel.loop(0, count, lanes, [far]) as loop:
            place = iota(lanes) + loop.index.to("i32").splat(lanes)
            loop.next(loop.values[0].min(weights.load(loop.index, lanes).eq(top.splat(lanes)).select(place, far)))
        first = loop.results[0].reduce("min").to("index").min(count - 1)
        left = top >= 0.0
        with kernel.when(left):
            keep.store(constant(1.0, "f32"), first)
            weights.store(constant(_NONE, "f32"), first)
        return [left.select(number + 1.0, constant(_MANY, "f32")), total + top]

    def _write(self, span: Span) -> None:
        """The numbers of the blocks that are marked, zeros behind them."""
        kernel, most = self.kernel, self.spec.most
        out = self.buffers.out.at((self.lane * self.lists + span.number) * (1 + most))
        with kernel.loop(0, self._own(span)[1] + 1, carry=[constant(0)]) as loop:
            out.store(loop.index.to("i32"), loop.values[0] + 1)
            loop.next((self.keep.load(loop.index) > 0.0).select(loop.values[0] + 1, loop.values[0]))
        (count,) = loop.results
        out.store(count.to("i32"), 0)
        with kernel.loop(count, most) as rest:
            out.store(constant(0, "i32"), rest.index + 1)


class _Vectors:
    """A loop over an array, a vector at a time; the last may go on behind the end."""

    def __init__(self, kernel: Kernel, count: Val) -> None:
        self.loop = kernel.loop(0, count, kernel.lanes)

    def __enter__(self) -> Val:
        return self.loop.__enter__().index

    def __exit__(self, *error: object) -> None:
        self.loop.__exit__(*error)  # type: ignore[arg-type]

