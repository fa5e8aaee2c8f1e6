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
from tilewright.codegen.mlir.columns_spec import FEATURES, ColumnsSchedule, ColumnsSpec
from tilewright.codegen.mlir.elementwise import threshold
from tilewright.codegen.mlir.linear_groups import load_scales
from tilewright.codegen.mlir.value import Val, constant, fma
from tilewright.codegen.schedule import registers

_NO_SIGN = 0x7FFFFFFF


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
        self.feed = ColumnFeed(self.linear.weight, kernel.lanes)
        self.depth, self.panel = spec.depth(schedule), self.packing.panel
        self.size = self.linear.groups.size if self.linear.grouped else self.depth
        self.room = -(-self.depth // kernel.lanes) * kernel.lanes + 2 * kernel.lanes
        self.places = kernel.scratch(self.room, "i32")
        self.values = kernel.scratch(self.room * schedule.rows, "f32")
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
        kernel, lanes = self.kernel, self.kernel.lanes
        count = constant(self.depth).min(constant(self.linear.k) - start)
        self._load(rows, start, count)
        features = constant(self.panel).min(constant(self.linear.n) - panel * self.panel)
        lines = (features + (self.spec.line - 1)) // self.spec.line
        zero = constant(0.0, "f32", lanes)
        span = self.schedule.rows * self.panel
        with kernel.loop(0, lines * self.spec.line, lanes) as loop:
            for at in range(0, self.linear.parts * span, span):
                for row in range(rows):
                    self.out.store(zero, out_at + (loop.index + (at + row * self.panel)))
                    if self.parts and not at:
                        self.parts.store(zero, loop.index + row * self.panel)
        with kernel.loop(0, (count + (self.size - 1)) // self.size, carry=[constant(0)]) as groups:
            first = groups.index * self.size
            listed = self._list(rows, start + first, first, (count - first).min(constant(self.size)))
            for part, weight in enumerate(self.weights):
                w_at = panel * (self.packing.k * self.packing.row)
                at = out_at + part * span
                if not self.parts:
                    self.adders[rows]((weight, self.places, self.values, self.out), (w_at, at, listed, lines))
                    continue
                self.adders[rows]((weight, self.places, self.values, self.parts), (w_at, 0, listed, lines))
                self._scale(rows, part, panel, (start + first) // self.size, at, features)
            groups.next(listed)

    # --- which inputs count -------------------------------------------------------------------------------------------

    def _load(self, rows: int, start: Val, count: Val) -> None:
        """``numbers[rows][room]``: x without small elements from the k ``start`` on."""
        lanes = self.kernel.lanes
        with self.kernel.loop(0, count, lanes) as loop:
            mask = self.kernel.mask(count - loop.index, lanes)
            for row in range(rows):
                value = self.inputs.load(constant(row), start + loop.index, lanes, mask)
                self.numbers.store(value, loop.index + row * self.room)

    def _list(self, rows: int, start: Val, first: Val, count: Val) -> Val:
        """The k's that count for any row, how far their weights are, and x there; gives their number."""
        with self.kernel.loop(0, count, carry=[constant(0)]) as loop:
            (found,) = loop.values
            numbers = [self.numbers.load(first + loop.index + row * self.room) for row in range(rows)]
            bits = numbers[0].bitcast("i32")
            for number in numbers[1:]:
                bits = bits | number.bitcast("i32")
            self.places.store((start + loop.index).to("i32"), found)
            for row, number in enumerate(numbers):
                self.values.store(number, found + row * self.room)
            loop.next(found + (bits & _NO_SIGN).ne(0).to("index"))
        (listed,) = loop.results
        again = self.places.load((listed - 1).max(constant(0)))
        for i in range(self.schedule.ahead):
            self.places.store(again, listed + i)
        return listed

    # --- what they add ------------------------------------------------------------------------------------------------

    def _adder(self, rows: int) -> Function:
        """``sums[rows][lines] += values[rows][listed] * weight[places][lines]`` as an inner function.

        Numbers of a call: the first element of the panel and of the sums, how many are listed, and the cache lines.
        """
        sums = self.parts or self.out
        kernel, unroll = self.kernel, self._unroll(rows)
        with kernel.function(f"add{rows}", (self.weights[0], self.places, self.values, sums), numbers=4) as add:
            w, places, values, sums = add.buffers
            w_at, sums_at, listed, lines = add.numbers
            whole = listed // unroll * unroll
            for first, last, step in ((constant(0), whole, unroll), (whole, listed, 1)):
                with kernel.loop(first, last, step) as loop:
                    self._add(rows, step, loop.index, (w.at(w_at), places, values, sums.at(sums_at)), lines)
                if unroll == 1:
                    break
        return add

    def _unroll(self, rows: int) -> int:
        """Inputs at a time, as registers allow: their numbers stay there."""
        most = (registers(self.kernel.target) - 2) // (rows + 1)
        return next(u for u in (8, 4, 2, 1) if u <= max(min(most, self.schedule.unroll), 1))

    def _add(self, rows: int, count: int, entry: Val, buffers: Sequence[Buffer], lines: Val) -> None:
        kernel, feed, line, lanes = self.kernel, self.feed, self.spec.line, self.kernel.lanes
        w, places, values, sums = buffers
        at = [places.load(entry + i).to("index") * self.packing.row for i in range(count)]
        ahead = self.schedule.ahead
        next_at = [places.load(entry + (i + ahead)).to("index") * self.packing.row for i in range(count)] if ahead else []
        x = [[values.load(entry + (i + row * self.room)).splat(lanes) for i in range(count)] for row in range(rows)]
        with kernel.loop(0, lines) as loop:
            begin = loop.index * feed.elements(line)
            for place in next_at:
                w.prefetch(place + begin, locality=2)
            for start in range(0, line, feed.unit):
                weights = [feed.numbers(w, place + begin + feed.elements(start)) for place in at]
                for i, vectors in enumerate(zip(*weights)):
                    for row in range(rows):
                        place = loop.index * line + (start + i * lanes + row * self.panel)
                        total = sums.load(place, lanes)
                        for weight, number in zip(vectors, x[row]):
                            total = fma(weight, number, total)
                        sums.store(total, place)

    def _scale(self, rows: int, part: int, panel: Val, group: Val, out_at: Val, features: Val) -> None:
        """The sums of a group, times their scales, go to the task's; the next group's begin at zero."""
        kernel, lanes, groups = self.kernel, self.kernel.lanes, self.linear.groups
        scales, sums = self.scales[part], self.parts
        assert sums is not None
        with kernel.loop(0, features, FEATURES) as loop:
            scales_at = ((panel * self.panel + loop.index) * groups.count) + group * FEATURES
            for start in range(0, FEATURES, lanes):
                scale = load_scales(scales, scales_at + start, lanes, groups.factor)
                for row in range(rows):
                    at = loop.index + (start + row * self.panel)
                    place = out_at + at
                    self.out.store(fma(sums.load(at, lanes), scale, self.out.load(place, lanes)), place)
                    sums.store(constant(0.0, "f32", lanes), at)
