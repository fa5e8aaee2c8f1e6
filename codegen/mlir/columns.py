"""Linear kernels that leave out what small inputs have no part in: ``y = threshold(x) @ weight.T``.

For few rows of x a task is some inputs and a wide panel of features. Of the inputs it lists those that count, and adds
``x[k] * weight[k, panel]`` one after the other to sums in the first-level cache; weights of those that do not count are
never read, and of those that come next in the list they are being fetched. Then other tasks add up the sums of a panel's
inputs and finish the results. Many rows are multiplied as ever (columns_dense.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.codegen.mlir.builder import Buffer, Function, Kernel
from tilewright.codegen.mlir.columns_feed import ColumnFeed
from tilewright.codegen.mlir.columns_spec import ColumnsSchedule, ColumnsSpec
from tilewright.codegen.mlir.elementwise import threshold
from tilewright.codegen.mlir.linear_groups import load_scales
from tilewright.codegen.mlir.value import Val, constant, fma
from tilewright.codegen.schedule import registers

_NO_SIGN = 0x7FFFFFFF
_MORE = 64  # inputs of the next task, whose weights are fetched at the end of one
_TURN = 64  # inputs after which gate and up take turns


@dataclass(frozen=True)
class Inputs:
    """x ``[M, K]``, the limits (one, or one for each k) and what is compared with them, unless it is x."""

    x: Buffer
    limits: Buffer | float
    by: Buffer | None
    k: int
    each: bool

    def load(self, row: Val, k: Val, lanes: int, mask: Val | None) -> Val:
        """A vector of x as f32 without its small elements."""
        at = row * self.k + k
        x = self.x.load(at, lanes, mask).to("f32")
        by = [] if self.by is None else [self.by.load(at, lanes, mask).to("f32")]
        return threshold(x, self._limit(k, lanes, mask), *by)

    def _limit(self, k: Val, lanes: int, mask: Val | None) -> Val:
        if isinstance(self.limits, float):
            return constant(self.limits, "f32", lanes)
        return self.limits.load(k, lanes, mask) if self.each else self.limits.load(0).splat(lanes)


class FewRows:
    """The sums of tasks for few rows."""

    def __init__(self, kernel: Kernel, spec: ColumnsSpec, schedule: ColumnsSchedule, m: Val, inputs: Inputs,
                 weights: Sequence[Buffer], scales: Sequence[Buffer], out: Buffer) -> None:  # fmt: skip
        self.kernel, self.spec, self.schedule, self.m, self.inputs = kernel, spec, schedule, m, inputs
        self.weights, self.out = weights, out
        self.linear, self.packing = spec.linear, spec.packing(schedule)
        self.scales = scales if self.linear.grouped else []
        dot = kernel.target.has_bf16_dot and self.linear.weight == "i4" and self.linear.x_dtype == "bf16"
        self.feed = ColumnFeed(self.linear.weight, kernel.lanes, dot)
        self.depth, self.panel = spec.depth(schedule), self.packing.panel
        self.size = self.linear.groups.size if self.linear.grouped else self.depth
        self.span = schedule.rows * self.panel
        self.room = -(-(self.depth + _MORE) // kernel.lanes) * kernel.lanes + 2 * kernel.lanes
        self.places = kernel.scratch(self.room, "i32")
        self.starts = kernel.scratch(self.depth // self.size + 1, "i32")
        self.values = kernel.scratch(self.room * schedule.rows, "bf16" if dot else "f32")
        self.numbers = kernel.scratch(self.room * schedule.rows, "f32")
        self.parts = kernel.scratch(schedule.rows * self.panel, "f32") if self.scales else None
        self.adders = {rows: self._adder(rows) for rows in range(1, schedule.rows + 1)}

    def emit(self, begin: Val, end: Val) -> None:
        """The tasks from ``begin`` to ``end``."""
        splits = self.spec.splits(self.schedule)
        with self.kernel.loop(begin, end) as tasks:
            panel, start = tasks.index // splits, tasks.index % splits * self.depth
            for rows in self.adders:
                with self.kernel.when(self.m.eq(rows)):
                    self._task(rows, panel, start, tasks.index * self.spec.sums(self.schedule))

    def _task(self, rows: int, panel: Val, start: Val, out_at: Val) -> None:
        kernel = self.kernel
        count = constant(self.depth).min(constant(self.linear.k) - start)
        listed = self._list(rows, start, count)
        features = constant(self.panel).min(constant(self.linear.n) - panel * self.panel)
        lines = (features + (self.spec.line - 1)) // self.spec.line
        self._clear(rows, lines, out_at)
        if self.parts:
            with kernel.loop(0, count // self.size) as groups:
                first, last = (self.starts.load(groups.index + i).to("index") for i in range(2))
                for part in range(self.linear.parts):
                    self._call(rows, part, self.parts, (panel, constant(0), first, last, lines))
                    group = start // self.size + groups.index
                    self._scale(rows, part, panel, group, out_at + part * self.span, features)
            return
        step = constant(_TURN) if self.linear.parts > 1 else listed.max(constant(1))
        with kernel.loop(0, listed, step) as loop:
            last = listed.min(loop.index + step)
            for part in range(self.linear.parts):
                self._call(rows, part, self.out, (panel, out_at + part * self.span, loop.index, last, lines))

    def _clear(self, rows: int, lines: Val, out_at: Val) -> None:
        """Sums begin at zero."""
        zero, lanes = constant(0.0, "f32", self.kernel.lanes), self.kernel.lanes
        with self.kernel.loop(0, lines * self.spec.line, lanes) as loop:
            for row in range(rows):
                at = loop.index + row * self.panel
                for part in range(self.linear.parts):
                    self.out.store(zero, out_at + at + part * self.span)
                if self.parts:
                    self.parts.store(zero, at)

    def _call(self, rows: int, part: int, sums: Buffer, numbers: tuple[Val, Val, Val, Val, Val]) -> None:
        panel, *others = numbers
        w_at = panel * (self.packing.k * self.packing.row)
        self.adders[rows]((self.weights[part], self.places, self.values, sums), (w_at, *others))

    # --- which inputs count -------------------------------------------------------------------------------------------

    def _list(self, rows: int, start: Val, count: Val) -> Val:
        """The k's that count for any row, where their weights are, and x there; gives their number.

        ``starts`` are the numbers of the first of each group. Behind them stand those that the next task begins with.
        """
        kernel, lanes = self.kernel, self.kernel.lanes
        more = (count + _MORE).min(constant(self.linear.k) - start)
        with kernel.loop(0, more, lanes) as loop:
            mask = kernel.mask(more - loop.index, lanes)
            for row in range(rows):
                value = self.inputs.load(constant(row), start + loop.index, lanes, mask)
                self.numbers.store(value, loop.index + row * self.room)
        with kernel.loop(0, count, self.size, carry=[constant(0)]) as groups:
            (found,) = groups.values
            self.starts.store(found.to("i32"), groups.index // self.size)
            last = (groups.index + self.size).min(count)
            groups.next(self._padded(rows, self._find(rows, start, groups.index, last, found)))
        (listed,) = groups.results
        self.starts.store(listed.to("i32"), count // self.size)
        found = self._find(rows, start, count, more, listed)
        last = self.places.load((found - 1).max(constant(0)))
        for i in range(self.schedule.ahead):
            self.places.store(last, found + i)
        return listed

    def _find(self, rows: int, start: Val, first: Val, last: Val, listed: Val) -> Val:
        """Those from the k ``first`` on are listed too, after ``listed`` others."""
        with self.kernel.loop(first, last, carry=[listed]) as loop:
            (found,) = loop.values
            numbers = [self.numbers.load(loop.index + row * self.room) for row in range(rows)]
            bits = numbers[0].bitcast("i32")
            for number in numbers[1:]:
                bits = bits | number.bitcast("i32")
            self.places.store((start + loop.index).to("i32"), found)
            for row, number in enumerate(numbers):
                self.values.store(number.to(self.values.dtype), found + row * self.room)
            loop.next(found + (bits & _NO_SIGN).ne(0).to("index"))
        return loop.results[0]

    def _padded(self, rows: int, listed: Val) -> Val:
        """An input that does not count makes the last a pair, where it takes pairs."""
        if self.feed.step == 1:
            return listed
        self.places.store(self.places.load((listed - 1).max(constant(0))), listed)
        for row in range(rows):
            self.values.store(constant(0.0, "f32").to(self.values.dtype), listed + row * self.room)
        return listed + listed % 2

    # --- what they add ------------------------------------------------------------------------------------------------

    def _adder(self, rows: int) -> Function:
        """``sums[rows][lines] += values[rows][listed] * weight[places][lines]`` as an inner function.

        Numbers of a call: the first element of the panel and of the sums, which of those listed, and the cache lines.
        """
        sums = self.parts or self.out
        kernel, (_, unroll) = self.kernel, self._tile(rows)
        with kernel.function(f"add{rows}", (self.weights[0], self.places, self.values, sums), numbers=5) as add:
            w, places, values, sums = add.buffers
            w_at, sums_at, begin, end, lines = add.numbers
            whole = begin + (end - begin) // unroll * unroll
            steps = dict.fromkeys((unroll, self.feed.step))
            for first, last, step in zip((begin, whole), (whole, end), steps):
                with kernel.loop(first, last, step) as loop:
                    self._add(rows, step, loop.index, (w.at(w_at), places, values, sums.at(sums_at)), lines)
        return add

    def _tile(self, rows: int) -> tuple[int, int]:
        """Vectors of sums and inputs at a time, as registers allow."""
        have, least = registers(self.kernel.target), self.feed.step
        vectors = max(min(have // 4 // rows, self.feed.line // self.kernel.lanes), 1)
        most = min((have - 4 - vectors * rows) // rows * least, self.schedule.unroll)
        return vectors, next((u for u in (8, 4, 2) if least <= u <= most), least)

    def _add(self, rows: int, count: int, entry: Val, buffers: Sequence[Buffer], lines: Val) -> None:
        """``count`` inputs from ``entry`` on, line by line; on the way as many others are fetched, one after the other."""
        kernel, ahead = self.kernel, self.schedule.ahead
        w, places, values, sums = buffers
        at = [places.load(entry + i).to("index") * self.packing.row for i in range(count)]
        entries = range(0, count, self.feed.step)
        x = [[self._value(values, entry + (i + row * self.room)) for i in entries] for row in range(rows)]
        part = lines // count if ahead else constant(0)
        with kernel.loop(0, count if ahead else 0) as turns:
            place = places.load(entry + ahead + turns.index).to("index") * self.packing.row
            with kernel.loop(0, part) as loop:
                for i in range(count):
                    w.prefetch(place + (loop.index * count + i) * self.feed.elements, locality=2)
                self._add_line(rows, turns.index * part + loop.index, w, at, x, sums)
        with kernel.loop(part * count, lines) as loop:
            self._add_line(rows, loop.index, w, at, x, sums)

    def _add_line(self, rows: int, line: Val, w: Buffer, at: Sequence[Val], x: Sequence[Sequence[Val]],
                  sums: Buffer) -> None:  # fmt: skip
        """What the inputs whose weights are ``at`` add to the sums of one line."""
        feed, lanes, (vectors, _) = self.feed, self.kernel.lanes, self._tile(rows)
        begin = line * feed.elements
        for first in range(0, feed.line // lanes, vectors):
            each = [(index, row) for index in range(first, first + vectors) for row in range(rows)]
            out = [line * feed.line + (index * lanes + row * self.panel) for index, row in each]
            totals = [sums.load(place, lanes) for place in out]
            for i in range(0, len(at), feed.step):
                loaded = [feed.load(w, place + begin) for place in at[i:i + feed.step]]
                numbers = [x[row][i // feed.step] for _, row in each]
                totals = [feed.add(t, loaded, index, number) for t, (index, _), number in zip(totals, each, numbers)]
            for place, total in zip(out, totals):
                sums.store(total, place)

    def _value(self, values: Buffer, entry: Val) -> Val:
        """An input, or a pair of them, in every lane."""
        if self.feed.dot:
            return values.load(entry, 2).bitcast("i32").lane(0).splat(self.kernel.lanes).bitcast("bf16")
        return values.load(entry).splat(self.kernel.lanes)

    def _scale(self, rows: int, part: int, panel: Val, group: Val, out_at: Val, features: Val) -> None:
        """The sums of a group, times their scales, go to the task's; the next group's begin at zero."""
        kernel, lanes, groups, width = self.kernel, self.kernel.lanes, self.spec.groups, self.spec.features
        scales, sums = self.scales[part], self.parts
        assert sums is not None
        with kernel.loop(0, features, width) as loop:
            scales_at = ((panel * self.panel + loop.index) * groups.count) + group * width
            for start in range(0, width, lanes):
                scale = load_scales(scales, scales_at + start, lanes, groups.factor)
                for row in range(rows):
                    at = loop.index + (start + row * self.panel)
                    place = out_at + at
                    self.out.store(fma(sums.load(at, lanes), scale, self.out.load(place, lanes)), place)
                    sums.store(constant(0.0, "f32", lanes), at)
