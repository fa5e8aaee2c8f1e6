"""Attend to kept tokens, then let the least worthy go (``kv.retain``).

The weights of slots are those that attention had in hands: of one query they are set aside as its tasks go over the keys,
of many queries they are found once more, for those that count. The tasks that run last choose, each for one head.
"""

from tilewright.codegen.cache import CacheLayout
from tilewright.codegen.mlir.attention import for_rows
from tilewright.codegen.mlir.builder import Kernel
from tilewright.codegen.mlir.flash import Flash
from tilewright.codegen.mlir.kv import Attending
from tilewright.codegen.mlir.kv_notes import Head
from tilewright.codegen.mlir.kv_retain import Chooser
from tilewright.codegen.mlir.kv_spec import AttendBuffers, AttendSpec
from tilewright.codegen.mlir.value import Val, constant
from tilewright.codegen.schedule import AttentionSchedule


def emit_retain(kernel: Kernel, spec: AttendSpec, schedule: AttentionSchedule, b: Val, s: Val,
                buffers: AttendBuffers) -> None:
    """Emit the task loops into ``kernel``."""
    schedule.validate(kernel.target)
    _Retaining(kernel, spec, schedule, b, s, buffers).emit()


class _Retaining(Attending):
    """The state of one emission."""

    flash: Flash

    def __init__(self, kernel: Kernel, spec: AttendSpec, schedule: AttentionSchedule, b: Val, s: Val,
                 buffers: AttendBuffers) -> None:
        super().__init__(kernel, spec, schedule, b, s, buffers)
        self.chooser = Chooser(kernel, spec, buffers)
        assert isinstance(spec.cache, CacheLayout)
        self.cache = spec.cache

    def emit(self) -> None:
        if self.spec.s == 1:
            self.flash.watch = self.chooser
            self._emit_pieces()
            return
        kernel, work = self.kernel, self.b * self.cache.heads * self._runs
        with kernel.loop(kernel.begin, kernel.end.min(work)) as tasks:
            self._emit_queries(tasks.index)
        with kernel.loop(kernel.begin.max(work), kernel.end) as tasks:
            self._choose(tasks.index - work)

    def _start(self, batch: Val, head: Val) -> Val:
        return super()._start(batch, head).min(constant(self.cache.budget))

    # --- one query ----------------------------------------------------------------------------------------------------

    def _task(self, batch: Val, head: Val, first: Val, queries: Val, begin: Val, high: Val,
              end: Val, with_sinks: Val | None = None) -> None:
        self.chooser.first = (batch * self.cache.heads + head) * self.spec.group
        super()._task(batch, head, first, queries, begin, high, end, with_sinks)

    def _finish(self, row: Val, batch: Val, token: Val, head: Val) -> None:
        super()._finish(row, batch, token, head)
        if self.spec.s == 1:  # the only piece of the keys
            lane = batch * self.cache.heads + head // self.spec.group
            self.flash.store_part(row, self.buffers.parts, self._part_place(row, lane, constant(0)))

    def _combine(self, lane: Val) -> None:
        super()._combine(lane)
        self._choose(lane)

    # --- what stays ---------------------------------------------------------------------------------------------------

    def _choose(self, lane: Val) -> None:
        buffers, batch, number = self.buffers, lane // self.cache.heads, lane % self.cache.heads
        assert buffers.count is not None
        head = Head(self.kernel, self.cache, buffers.k, buffers.v, batch, number)
        start, count = (x.load(batch).to("index") for x in (buffers.start, buffers.count))
        with self.kernel.when(count > 0):
            live = self._start(batch, number)
            self.chooser.begin(head, start, live, count)
            if self.spec.s == 1:
                self._gain_of_one(head, live + 1)
            else:
                self._gain_of_many(head, live, count)
            self.chooser.close(head, start, live, count)

    def _gain_of_one(self, head: Head, keys: Val) -> None:
        """By the weights that the tasks left."""
        _, count = self._pieces_of(constant(0), keys)
        self.chooser.first = head.lane * self.spec.group
        with self.kernel.loop(0, self.spec.group) as members:
            sink = self._sink(head.head * self.spec.group + members.index)
            self.chooser.settle(members.index, *self._parts(head.lane, members.index, count).total(sink), sink, keys)
        self.chooser.gain(head, constant(1), keys, keys)

    def _gain_of_many(self, head: Head, live: Val, count: Val) -> None:
        """By the weights of the queries that count, some at a time."""
        group, step, most = self.spec.group, self.schedule.keys, self.spec.queries(self.schedule)
        self.chooser.first = head.lane * (most * group)
        observe = self.chooser.rule.observe
        self.flash.watch = self.chooser
        with self.kernel.loop((count - observe).max(0) if observe else 0, count, most) as loop:
            first, queries = loop.index, (count - loop.index).min(constant(most))
            rows, position, high = queries * group, live + first, live + first + queries
            self.flash.reset(rows)
            self._load_queries(head.batch, head.head, first, queries, self._query)
            adjust = self._adjust(head.batch, head.head, first)
            with self.kernel.loop(0, high, step) as blocks:
                key, source = blocks.index, self._source(head.batch, head.head, blocks.index, high)
                self.flash.weigh(source, key, (high - key).min(constant(step)), rows,
                                 lambda query: self._visible(position + query), adjust)
            for_rows(self.kernel, queries, group,
                     lambda query, member, row: self._settle(row, head.head * group + member, high))
            self.chooser.gain(head, queries, position + 1, high)
        self.flash.watch = None

    def _settle(self, row: Val, head: Val, high: Val) -> None:
        sink = self._sink(head)
        self.chooser.settle(row, *self.flash.total(row, sink), sink, high)
