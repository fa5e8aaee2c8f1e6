"""Attend to a key/value cache in the layout of `CacheLayout`.

In decoding the keys of each head are cut into pieces, always at the same places, which are attended to each for itself; the
tasks that run last put them together. So a sum does not depend on which task has a piece, and whether it has it for several
sequences whose pages are the same there.
"""

from collections.abc import Callable

from tilewright.codegen.mlir.attention import for_rows
from tilewright.codegen.mlir.builder import Kernel
from tilewright.codegen.mlir.flash_rows import Visible
from tilewright.codegen.mlir.kv_operands import Operands
from tilewright.codegen.mlir.kv_parts import Parts, part_size
from tilewright.codegen.mlir.kv_spec import AttendBuffers, AttendSpec
from tilewright.codegen.mlir.rows import Row
from tilewright.codegen.mlir.value import Val, constant
from tilewright.codegen.schedule import AttentionSchedule
from tilewright.codegen.target import CpuTarget
from tilewright.ir import Paged


def attend_kernel(name: str, target: CpuTarget, spec: AttendSpec, schedule: AttentionSchedule) -> Kernel:
    """The whole kernel: dims B, S, and T of a table; buffers q, cache, start, what the spec has of table, pages, far, bias,
    sinks, cos, sin, blocks, windows, then out, parts."""
    paged = isinstance(spec.cache.layout, Paged)
    extra = {"table": "i32" if paged else None, "pages": "i32" if spec.chosen else None}
    extra |= {"far": spec.dtype if spec.far else None}
    extra |= {"bias": spec.bias and spec.bias_dtype, "sinks": spec.sinks}
    extra |= dict.fromkeys(("cos", "sin"), spec.rope.dtype if spec.rope else None)
    extra |= {"blocks": "i32" if spec.blocks else None, **dict.fromkeys(spec.cache.windows, "u8")}
    extra = {key: dtype for key, dtype in extra.items() if dtype}
    stored = spec.cache.stored
    given = [("q", spec.dtype), ("k", stored), ("v", stored), ("start", "i64"), *extra.items(), ("out", spec.out_dtype)]
    given += [(name, "f32") for name in spec.temporaries(schedule)]
    with Kernel(name, target, ("B", "S", *["T"] * paged), given) as kernel:
        named = {name: buffer for (name, _), buffer in zip(given, kernel.buffers)}
        buffers = AttendBuffers(**named, width=kernel.dims.get("T"))
        emit_attend(kernel, spec, schedule, kernel.dims["B"], kernel.dims["S"], buffers)
    return kernel


def emit_attend(kernel: Kernel, spec: AttendSpec, schedule: AttentionSchedule, b: Val, s: Val,
                buffers: AttendBuffers) -> None:
    """Emit the task loop into ``kernel``."""
    schedule.validate(kernel.target)
    Attending(kernel, spec, schedule, b, s, buffers).emit()


class Attending(Operands):
    """The state of one emission."""

    def emit(self) -> None:
        if self.pieces > 1:
            self._emit_pieces()
            return
        with self.kernel.loop(self.kernel.begin, self.kernel.end) as tasks:
            self._emit_queries(tasks.index)

    @property
    def _runs(self) -> Val:
        """Tasks that the queries of one head are cut into."""
        queries = self.spec.queries(self.schedule)
        return ((self.s + (queries - 1)) // queries).max(1)

    def _emit_queries(self, task: Val) -> None:
        """A task is a run of queries of one head."""
        heads, queries, runs = self.spec.cache.heads, self.spec.queries(self.schedule), self._runs
        run, head = task % runs, task // runs % heads
        batch, first = task // (runs * heads), run * queries
        rows = (self.s - first).min(constant(queries))
        if self.spec.blocks is not None:
            self.listed = self.spec.blocks.listed(self.buffers.blocks, heads, (batch, head), first, self.s)
        begin, high = self._range(batch, head, first, rows)
        self._task(batch, head, first, rows, begin, high, high)
        for_rows(self.kernel, rows, self.spec.group, lambda query, member, row: self._finish(
            row, batch, first + query, head * self.spec.group + member))

    def _emit_pieces(self) -> None:
        """One query: a task has some of the pieces of a head's keys. Neighbours are next to each other in memory; where one
        may work for other sequences too, those that do so are spread among all tasks."""
        kernel, heads, parts = self.kernel, self.spec.cache.heads, self.spec.parts(self.schedule)
        work = self.b * (heads * parts)
        with kernel.loop(kernel.begin, kernel.end.min(work)) as tasks:
            if self.sharing is None:
                lane, part = tasks.index // parts, tasks.index % parts
            else:
                lane, part = tasks.index % (self.b * heads), tasks.index // (self.b * heads)
            batch, head = lane // heads, lane % heads
            begin, high = self._range(batch, head, constant(0), constant(1))
            first, count = self._pieces_of(begin, high)
            with kernel.loop(first + count * part // parts, first + count * (part + 1) // parts) as pieces:
                self._piece(batch, head, pieces.index, begin, high)
        with kernel.loop(kernel.begin.max(work), kernel.end) as tasks:
            self._combine(tasks.index - work)

    def _pieces_of(self, begin: Val, high: Val) -> tuple[Val, Val]:
        """The number of the first piece with keys ``begin <= key < high``, and how many there are."""
        first = begin // self.piece
        return first, (high + (self.piece - 1)) // self.piece - first

    def _piece(self, batch: Val, head: Val, piece: Val, begin: Val, high: Val) -> None:
        """Of the keys ``begin <= key < high`` those of a piece."""
        kernel, group = self.kernel, self.spec.group
        sequences = constant(1) if self.sharing is None else self.sharing.count(batch, piece)
        first, count = self._pieces_of(begin, high)
        start = piece * self.piece
        with kernel.when(sequences > 0):
            self._task(batch, head, constant(0), sequences, begin.max(start), high.min(start + self.piece), high,
                       piece.eq(first))
            for_rows(kernel, sequences, group, lambda sequence, member, row: kernel.branch(
                count.eq(1), lambda: self._finish(row, batch + sequence, constant(0), head * group + member),
                lambda: self.flash.store_part(row, self.buffers.parts, self._part_place(
                    member, (batch + sequence) * self.spec.cache.heads + head, piece - first))))

    def _range(self, batch: Val, head: Val, first: Val, queries: Val) -> tuple[Val, Val]:
        """The keys that some of the queries see, sinks apart, from the start of a block on; never none."""
        position, step = self._start(batch, head) + first, self.schedule.keys
        low = self._visible(position).low
        begin = constant(0) if low is None else low.min(position) // step * step
        return begin, self._visible(position + (queries - 1)).high

    def _part_place(self, row: Val, lane: Val, piece: Val) -> Val:
        return ((lane * self.pieces + piece) * self.spec.group + row) * part_size(self.spec.cache.vdim)

    def _combine(self, lane: Val) -> None:
        """Put the pieces of one head together, unless there is only one."""
        spec, kernel, heads = self.spec, self.kernel, self.spec.cache.heads
        batch, head = lane // heads, lane % heads
        begin, high = self._range(batch, head, constant(0), constant(1))
        _, count = self._pieces_of(begin, high)
        with kernel.when(count > 1), kernel.loop(0, spec.group) as members:
            query_head = head * spec.group + members.index
            self._parts(lane, members.index, count).combine(
                self.buffers.out, self._place(spec.out, spec.cache.vdim, batch, constant(0), query_head),
                self._sink(query_head))

    def _parts(self, lane: Val, row: Val, count: Val) -> Parts:
        """What the first ``count`` pieces of a head's keys left of a row."""
        place, stride = self._part_place(row, lane, constant(0)), self.spec.group * part_size(self.spec.cache.vdim)
        return Parts(self.kernel, self.buffers.parts, place, stride, count, self.spec.cache.vdim)

    def _task(self, batch: Val, head: Val, first: Val, queries: Val, begin: Val, high: Val,
              end: Val, with_sinks: Val | None = None) -> None:
        """Queries from ``first`` on, over keys ``begin <= key < high``, and a ring's sinks (if ``with_sinks`` holds).

        Further keys of the sequence lie before ``end``, and will be wanted soon. In decoding queries are those of so many
        sequences.
        """
        flash, step = self.flash, self.schedule.keys
        rows = queries * self.spec.group
        flash.reset(rows)
        if self.spec.far is None:
            self._load_queries(batch, head, first, queries, self._query)
        if self.spec.sinks_kept:
            every = constant(True, "bool")
            with self.kernel.when(every if with_sinks is None else with_sinks):
                self._sinks(batch, head, first, queries)
        if self.spec.far is not None:
            self._load_queries(batch, head, first, queries, self._query)
        adjust = self._adjust(batch, head, first)
        if self.recent is not None:
            coded = self.spec.cache.coded(self.buffers.start.load(batch).to("index") + self.s)
            self.recent.attend(batch, head, begin.max(coded), high, rows,
                               lambda query: self._visible(self._stand(batch, head, first, query)), adjust)
            high = high.min(coded)

        def seen(query: Val) -> Visible:
            found = self._visible(self._stand(batch, head, first, query))
            return found if self.recent is None else Visible(found.low, found.high.min(high))

        with self.kernel.loop(begin, high, step) as blocks:
            key = blocks.index
            flash.block(self._source(batch, head, key, end), key, (high - key).min(constant(step)), rows, seen, adjust)

    def _sinks(self, batch: Val, head: Val, first: Val, queries: Val) -> None:
        """The queries over the sinks, as they meet them; positions and slots are the same there."""
        sinks, step = constant(self.spec.sinks_kept), self.schedule.keys
        position = self.buffers.start.load(batch).to("index") + first
        if self.spec.far is not None:
            self._load_queries(batch, head, first, queries, self._far_query)
        with self.kernel.loop(0, sinks, step) as blocks:
            key, rows = blocks.index, queries * self.spec.group
            self.flash.block(
                self._source(batch, head, key, sinks, sinks=True), key, (sinks - key).min(constant(step)), rows,
                lambda query: Visible(None, (position + query + 1).min(sinks)), self._adjust(batch, head, first))

    def _load_queries(self, batch: Val, head: Val, first: Val, queries: Val,
                      source: Callable[[Val, Val, Val], Row]) -> None:
        for_rows(self.kernel, queries, self.spec.group, lambda query, member, row: self.flash.load_query(
            row, source(*self._token(batch, first, query), head * self.spec.group + member)))
        if self.recent is not None:
            recent = self.recent.flash
            for_rows(self.kernel, queries, self.spec.group, lambda query, member, row: recent.load_query(
                row, source(batch, first + query, head * self.spec.group + member)))

    def _finish(self, row: Val, batch: Val, token: Val, head: Val) -> None:
        place = self._place(self.spec.out, self.spec.cache.vdim, batch, token, head)
        self.flash.finish(row, self.buffers.out, place, self._sink(head))

