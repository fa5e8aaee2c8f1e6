"""Linear kernels that leave out small inputs, where there are none to leave out: results of few rows, and many rows."""

from __future__ import annotations

from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.columns import Inputs
from tilewright.codegen.mlir.columns_feed import ColumnFeed
from tilewright.codegen.mlir.columns_spec import FINISHED, ROWS, ColumnsSchedule, ColumnsSpec
from tilewright.codegen.mlir.linear import Epilogue, LinearTasks
from tilewright.codegen.mlir.linear_floats import WidenFeed
from tilewright.codegen.mlir.linear_products import LinearBuffers, Path
from tilewright.codegen.mlir.microkernel import AnyFeed, Feed
from tilewright.codegen.mlir.value import Val, constant, shuffle
from tilewright.codegen.mlir.widen import store_weights
from tilewright.codegen.schedule import registers

_AHEAD = 16  # k's whose weights are being fetched


class ManyRows(LinearTasks):
    """Products of weights in columns, converted block by block, with x that has no small elements any more."""

    wide_block = 1024

    def __init__(self, kernel: Kernel, spec: ColumnsSpec, schedule: ColumnsSchedule, m: Val, buffers: LinearBuffers,
                 epilogue: Epilogue | None) -> None:  # fmt: skip
        self.spec, self.columns, self.few = spec.linear, spec.packing(schedule), (spec, schedule)
        self.feed = ColumnFeed(self.spec.weight, kernel.lanes)
        super().__init__(kernel, spec.linear, spec.dense(kernel.target), m, buffers, epilogue)

    def copy(self, inputs: Inputs, begin: Val, end: Val) -> None:
        """x without its small elements, for the tasks from ``begin`` to ``end``."""
        lanes, k, out = self.kernel.lanes, self.spec.k, self.buffers.x
        with self.kernel.loop(begin * ROWS, (end * ROWS).min(self.m)) as row, self.kernel.loop(0, k, lanes) as loop:
            mask = self.kernel.mask(k - loop.index, lanes) if k % lanes else None
            out.store(inputs.load(row.index, loop.index, lanes, mask).to(out.dtype), row.index * k + loop.index, mask)

    def add_up(self, sums: Buffer, begin: Val, end: Val) -> None:
        """Results of few rows from the sums of all tasks, for the features of the tasks from ``begin`` to ``end``."""
        with self.kernel.loop(begin * FINISHED, (end * FINISHED).min(constant(self.spec.n)), self.panel) as loop:
            for part in range(self.spec.parts):
                with self.kernel.loop(0, self.m) as row:
                    self._add_up(sums, part, row.index, loop.index)
            self.finish(loop.index, constant(0), self.m)

    def _add_up(self, sums: Buffer, part: int, row: Val, col: Val) -> None:
        spec, schedule = self.few
        lanes, panel, splits, size = self.kernel.lanes, self.columns.panel, spec.splits(schedule), spec.sums(schedule)
        at = col // panel * (splits * size) + col % panel + row * panel + part * schedule.rows * panel
        starts = range(0, self.panel, lanes)
        with self.kernel.loop(0, splits, carry=[constant(0.0, "f32", lanes) for _ in starts]) as loop:
            place = at + loop.index * size
            loop.next(*[total + sums.load(place + start, lanes) for total, start in zip(loop.values, starts)])
        for total, start in zip(loop.results, starts):
            self.sums[part].store(total, row * self.panel + start)

    # --- many rows ----------------------------------------------------------------------------------------------------

    def _paths(self) -> tuple[Path, Path | None]:
        spec, lanes = self.spec, self.kernel.lanes
        self.groups = self.few[0].groups
        if spec.coded:
            return self._wide(WidenFeed(spec.weight, self.panel, lanes, spec.k, spec.x_dtype)), None
        dot = self.kernel.target.has_bf16_dot and spec.x_dtype == spec.weight == "bf16"
        return self._wide(Feed(spec.x_dtype, spec.weight, self.panel, lanes, dot)), None

    def _width(self, feed: AnyFeed, rows: int, reads: bool = False) -> int:
        """Vectors of a panel at once, as registers allow."""
        if self.grouped:
            return super()._width(feed, rows)
        have, most = registers(self.kernel.target), self.schedule.tile_v
        fitting = (w for w in range(most, 0, -1) if most % w == 0 and rows * w + (w if rows > w else rows) + 1 <= have)
        return next(fitting, 1)

    def multiply(self, part: int, panel: Val, row: Val, rows: Val) -> None:
        self._multiply_blocks(self.direct, part, (panel, row, rows), constant(self.direct.block))

    def _fetch(self, w: Buffer, place: Val) -> None:
        """Ask for the weights of one k."""
        for line in range(self.panel // self.feed.line):
            w.prefetch(place + line * self.feed.elements, locality=2)

    def place(self, panel: Val, start: Val, stored: AnyFeed) -> Val:
        feature, columns = panel * self.panel, self.columns
        line = feature % columns.panel // self.feed.line
        return (feature // columns.panel * columns.k + start) * columns.row + line * self.feed.elements

    def _convert(self, path: Path, part: int, w: Buffer, panel: Val, start: Val, count: Val) -> None:
        core = path.feed
        assert isinstance(core, Feed)
        whole = count // core.pair * core.pair
        with self.kernel.loop(0, whole, core.pair) as loop:
            self._convert_step(core, w, loop.index, core.pair, path.weights)
        if self.spec.k % core.pair:
            with self.kernel.when((count - whole).ne(0)):
                self._convert_step(core, w, whole, 1, path.weights)

    def _convert_step(self, core: Feed, w: Buffer, k: Val, count: int, block: Buffer) -> None:
        """``count`` k's from ``k`` on; one that has no neighbour gets zeros for it."""
        lanes, places = self.kernel.lanes, [(k + i) * self.columns.row for i in range(count)]
        for place in places:
            self._fetch(w, place + _AHEAD * self.columns.row)
        if self.spec.weight == core.w_dtype == "bf16" and count == 2:  # nothing to compute
            pairs = [i // 2 + lanes * (i % 2) for i in range(2 * lanes)]
            for column in range(0, self.panel, lanes):
                low, high = (w.load(place + column, lanes).bitcast("i16") for place in places)
                block.store(shuffle(low, high, pairs).bitcast("bf16"), k * core.panel + 2 * column)
            return
        zero, vectors = constant(0.0, "f32", lanes), self.feed.line // lanes
        for line in range(self.panel // self.feed.line):
            loaded = [self.feed.load(w, place + line * self.feed.elements) for place in places]
            for index in range(vectors):
                rows = [self.feed.number(each, index) for each in loaded]
                column = (line * vectors + index) * lanes
                store_weights(core, block, k, column, [*rows, *[zero] * (core.pair - count)])
