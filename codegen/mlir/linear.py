"""Linear kernels: ``y[M, N] = x[M, K] @ weight[N, K].T`` for any M, with whatever should happen to y on its way out.

One kernel serves every M. A task is one panel of output features (see `Packing`) for one block of rows; inside, blocks
of K keep the panel in cache while register tiles walk over the rows. With one tile of rows or fewer the panel is
streamed once, which is the matrix-vector product. Weights (or x) that need converting are converted on the fly for a
few rows, and block by block into scratch memory for more; int8 codes of x meet codes of weights as they are. Sums wait
in a scratch, from which a separate small loop applies scales, bias, activation and the caller's epilogue, and stores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tilewright.codegen.mlir.builder import Buffer, Function, Kernel
from tilewright.codegen.mlir.linear_codes import CodeFeed, DotFeed
from tilewright.codegen.mlir.linear_expand import ExpandFeed, emit_expand_kernel, expand_weights
from tilewright.codegen.mlir.linear_floats import PairFeed, WidenFeed
from tilewright.codegen.mlir.linear_groups import (
    Streams,
    emit_group_kernel,
    emit_row_sums,
    keeps_totals,
    load_scales,
    load_zeros,
)
from tilewright.codegen.mlir.linear_lossless import Compressed, emit_decompress
from tilewright.codegen.mlir.linear_spec import ACTIVATIONS, LinearSpec
from tilewright.codegen.mlir.microkernel import AnyFeed, Feed, Tile, emit_micro_kernel
from tilewright.codegen.mlir.value import Val, constant
from tilewright.codegen.mlir.widen import core_feed, widen_inputs, widen_weights
from tilewright.codegen.schedule import LinearSchedule, registers
from tilewright.codegen.target import CpuTarget

_FEW = 4  # rows up to which converting weights in registers beats storing the converted block
_STREAMED = 2  # rows up to which fetching ahead pays
_WIDE_BLOCK = 128  # k's of a converted block; four times as many of one byte


@dataclass(frozen=True)
class Place:
    """Where a vector of results belongs: ``lanes`` columns from ``col`` of ``row``; ``mask`` when some are past N."""

    row: Val
    col: Val
    lanes: int
    mask: Val | None


Epilogue = Callable[[Val, Place], Val]
Sink = Callable[[Val, Place], None]


@dataclass(frozen=True)
class LinearBuffers:
    """Arguments of the kernel: x (and its scales), for each weight what belongs to it, y (unless a sink stores).

    Weights are packed, or else ``compressed``.
    """

    x: Buffer
    weights: Sequence[Buffer] = ()
    scales: Sequence[Buffer] = ()
    zeros: Sequence[Buffer] = ()
    biases: Sequence[Buffer] = ()
    y: Buffer | None = None
    x_scale: Buffer | None = None
    compressed: Sequence[Compressed] = ()
    tables: Sequence[Buffer] = ()
    steps: Sequence[Buffer] = ()


def linear_kernel(name: str, target: CpuTarget, spec: LinearSpec, schedule: LinearSchedule) -> Kernel:
    """The whole kernel: dim M, buffers x, x_scale, weights, scales, zeros, steps, tables, biases, y if there are such."""
    names = ("gate", "up")[:spec.parts]
    scales = spec.group_packing(spec.scale, schedule, target).stored if spec.coded and spec.scale else None
    roles = {"weights": "u8" if spec.coded else spec.weight, "scales": scales, "zeros": "u8" if spec.has_zeros else None,
             "steps": "u8" if spec.expands else None, "tables": spec.table, "biases": spec.bias}
    given = [("x", spec.x_dtype)] + ([("x_scale", "f32")] if spec.dynamic else [])
    given += [(f"{part}_{role}", dtype) for role, dtype in roles.items() if dtype for part in names]
    with Kernel(name, target, ("M",), [*given, ("y", spec.out_dtype)]) as kernel:
        x, *rest, y = kernel.buffers
        x_scale = rest.pop(0) if spec.dynamic else None
        by_role = {role: [rest.pop(0) for _ in names] for role, dtype in roles.items() if dtype}
        emit_linear(kernel, spec, schedule, kernel.dims["M"], LinearBuffers(x, y=y, x_scale=x_scale, **by_role))
    return kernel


def emit_linear(kernel: Kernel, spec: LinearSpec, schedule: LinearSchedule, m: Val, buffers: LinearBuffers,
                epilogue: Epilogue | None = None, sink: Sink | None = None) -> None:
    """Emit the task loop into ``kernel``.

    ``epilogue(value, place)`` changes f32 vectors of results after scale, bias and activation; ``sink(value, place)``
    replaces the store to ``buffers.y``.
    """
    schedule.validate(kernel.target)
    _Linear(kernel, spec, schedule, m, buffers, epilogue, sink).emit()


@dataclass(frozen=True)
class _Path:
    """Micro-kernels by count of rows, and the buffers of x and weights that they were made for."""

    feed: AnyFeed
    tiles: dict[int, Function]
    x: Buffer
    weights: Buffer
    x_stride: int
    block: int
    stored: Feed | WidenFeed | ExpandFeed | None = None  # what blocks are converted from

    @property
    def tallest(self) -> int:
        """Rows of the tallest tile."""
        return max(self.tiles)


def _spacing(feed: AnyFeed) -> int:
    """Elements of the weights from one vector of features to the next."""
    return feed.lanes * feed.stride // (feed.panel * len(feed.spread))


class _Linear:
    """The state of one emission."""

    def __init__(self, kernel: Kernel, spec: LinearSpec, schedule: LinearSchedule, m: Val, buffers: LinearBuffers,
                 epilogue: Epilogue | None, sink: Sink | None) -> None:
        self.kernel, self.spec, self.schedule, self.m, self.buffers = kernel, spec, schedule, m, buffers
        self.epilogue, self.sink = epilogue, sink or self._store
        self.packing, self.groups = spec.packing(schedule, kernel.target), spec.groups
        self.x_stride, self.y_stride = spec.x_stride or spec.k, spec.y_stride or spec.n
        self.weights = buffers.weights
        if buffers.compressed:  # a panel at a time is made of them
            self.weights = [kernel.scratch(self.packing.panel_size, "bf16")] * spec.parts
        self.rows = -(-schedule.block_m // schedule.tile_m) * schedule.tile_m
        self.grouped = spec.coded and self.groups.count > 1
        self.acc = "i32" if spec.dynamic and not self.grouped else "f32"
        self.sums = [kernel.scratch(self.rows * self.packing.panel, self.acc) for _ in range(spec.parts)]
        self.corrections = None
        if spec.dynamic or spec.asymmetric:
            kind = "i32" if spec.dynamic else "f32"
            self.corrections = kernel.scratch(self.rows * self.groups.count, kind)
        self.direct, self.wide = self._paths()

    def _paths(self) -> tuple[_Path, _Path | None]:
        """Micro-kernels for few rows, which read x and the packed weights where they are, and maybe others for many."""
        spec, tile_m, target = self.spec, self.schedule.tile_m, self.kernel.target
        codes = (spec.weight, self.packing.panel, self.kernel.lanes, spec.k)
        if spec.expands:
            expand = ExpandFeed(*codes, target.has_vnni)
            return self._direct(expand, _FEW), self._wide(expand)
        if spec.dynamic:
            return self._direct(DotFeed(*codes, target.has_vnni), tile_m), None
        if spec.coded:
            feed = WidenFeed(*codes, spec.x_dtype, spec.table)
            if target.has_bf16_dot and spec.x_dtype == "bf16" and PairFeed.takes(spec.weight, spec.table):
                return self._direct(PairFeed(*codes, spec.x_dtype, spec.table), tile_m), self._wide(feed)
            return self._direct(feed, _FEW), self._wide(feed)
        dot = target.has_bf16_dot and spec.x_dtype == spec.weight == "bf16"
        feed = Feed(spec.x_dtype, spec.weight, self.packing.panel, self.kernel.lanes, dot)
        if feed == core_feed(self.kernel, feed):
            return self._direct(feed, tile_m), None
        return self._direct(feed, _FEW), self._wide(feed)

    def _direct(self, feed: AnyFeed, tallest: int) -> _Path:
        """Micro-kernels that read x and the packed weights where they are."""
        return self._path("direct", feed, tallest, self.buffers.x, self.weights[0], self.x_stride)

    def _wide(self, feed: Feed | WidenFeed | ExpandFeed) -> _Path:
        """Micro-kernels that read blocks converted, from ``feed``, for many rows."""
        core = self._core(feed)
        block = self._block(min(self.schedule.block_k, _WIDE_BLOCK * (4 if isinstance(core, DotFeed) else 1)))
        weights = self.kernel.scratch(block * core.panel, core.w_dtype)
        x, stride = self.buffers.x, self.x_stride
        if feed.x_dtype != core.x_dtype:
            x, stride = self.kernel.scratch(self.rows * block, "f32"), block
        return self._path("wide", core, self.schedule.tile_m, x, weights, stride, block, feed)

    def _core(self, feed: Feed | WidenFeed | ExpandFeed) -> Feed | DotFeed:
        """The feed that eats blocks converted from ``feed``."""
        if isinstance(feed, ExpandFeed):
            return DotFeed("i8", feed.panel, feed.lanes, feed.k, feed.vnni)
        return core_feed(self.kernel, feed)

    def _block(self, k: int) -> int:
        """A block of K of about that size, in whole groups."""
        size = self.spec.expands or (self.groups.size if self.grouped else 1)
        return max(k // size, 1) * size

    def _path(self, name: str, feed: AnyFeed, tallest: int, x: Buffer, w: Buffer, x_stride: int, block: int = 0,
              stored: Feed | WidenFeed | ExpandFeed | None = None) -> _Path:
        kernel, schedule, tiles = self.kernel, self.schedule, {}
        for rows in range(1, tallest + 1):
            # A tall tile is long enough by itself, and so is a step of many k's.
            unroll = max(1, min(schedule.unroll, 8 // rows) // max(feed.step // 8, 1))
            columns = tuple(i * _spacing(feed) for i in range(self._width(feed, rows)))
            tile = Tile(rows, columns, x_stride, self.packing.panel, unroll, told=self._fetches(rows))
            if isinstance(feed, ExpandFeed):
                buffers = (x, w, self.sums[0], *self._levels())
                tiles[rows] = emit_expand_kernel(kernel, f"{name}{rows}", feed, tile, self.spec.steps, buffers)
            elif self.grouped:
                streams = self._streams(feed, x, w)
                tiles[rows] = emit_group_kernel(kernel, f"{name}{rows}", feed, tile, self.groups, streams)
            else:
                buffers = (x, w, self.sums[0], *self._tables(feed))
                tiles[rows] = emit_micro_kernel(kernel, f"{name}{rows}", feed, tile, self.spec.k, buffers)
        return _Path(feed, tiles, x, w, x_stride, block or self._block(schedule.block_k), stored)

    def _fetches(self, rows: int) -> bool:
        """Whether a tile of so many rows may fetch weights ahead: one that waits for them rather than multiplies."""
        return bool(self.schedule.prefetch) and not (self.grouped or self.spec.expands) and rows <= _STREAMED

    def _width(self, feed: AnyFeed, rows: int) -> int:
        """Vectors of a panel that a tile of so many rows does at once, as registers allow."""
        target, most = self.kernel.target, self.schedule.tile_v
        widths = [w for w in range(most, 0, -1) if most % w == 0]
        if self.grouped:
            return next((w for w in widths if keeps_totals(rows, w, target)), 1)

        def needed(w: int) -> int:
            held = 3 * w if isinstance(feed, ExpandFeed) else 0  # its levels
            return rows * w + (w if rows > w else 1) * feed.parts + held + 2

        return next((w for w in widths if needed(w) <= registers(target)), 1) if self.spec.coded else widths[0]

    def _streams(self, feed: AnyFeed, x: Buffer, w: Buffer, part: int = 0) -> Streams:
        zeros = self.buffers.zeros[part] if self.spec.asymmetric else None
        (table,) = self._tables(feed, part) or (None,)
        return Streams(x, w, self.buffers.scales[part], self.sums[part], zeros, self.corrections, table)

    def _levels(self, part: int = 0) -> list[Buffer]:
        """What codes expand by: steps and perhaps zero points."""
        return [role[part] for role in (self.buffers.steps, self.buffers.zeros) if role]

    def _tables(self, feed: AnyFeed, part: int = 0) -> Sequence[Buffer]:
        """What ``feed`` looks weights up in."""
        return self.buffers.tables[part:part + 1] if isinstance(feed, CodeFeed) else ()

    # --- tasks --------------------------------------------------------------------------------------------------------

    def emit(self) -> None:
        kernel, tile_m = self.kernel, self.schedule.tile_m
        blocks = ((self.m + (self.schedule.block_m - 1)) // self.schedule.block_m).max(1)
        height = ((self.m + blocks - 1) // blocks + (tile_m - 1)) // tile_m * tile_m
        with kernel.loop(kernel.begin, kernel.end, carry=[self.m]) as tasks:
            if self.schedule.first == "rows":
                panel, row = tasks.index % self.packing.panels, tasks.index // self.packing.panels * height
            else:
                panel, row = tasks.index // blocks, tasks.index % blocks * height
            rows = height.min(self.m - row).max(0)  # whole tiles may reach past M a block early
            if self.corrections:
                with kernel.when(row.ne(tasks.values[0])):
                    self._correct(row, rows)
            for part in range(self.spec.parts):
                self._start(part, panel, rows)
                self._multiply(part, panel, row, rows)
            self._finish(panel * self.packing.panel, row, rows)
            tasks.next(row)

    def _correct(self, row: Val, rows: Val) -> None:
        """What sums of products start with: minus the zero point times the sum of x."""
        factor = -1 if self.spec.asymmetric else -(1 << self.groups.bits - 1)
        x = self.buffers.x.at(row * self.x_stride + self.spec.x_offset)
        emit_row_sums(self.kernel, x, self.x_stride, rows, self.spec.k, self.groups, factor, self.corrections)

    def _start(self, part: int, panel: Val, rows: Val) -> None:
        lanes, width, sums = self.kernel.lanes, self.packing.panel, self.sums[part]
        if self.grouped or not self.corrections:
            zero = constant(0, self.acc, lanes)
            with self.kernel.loop(0, rows * width, lanes) as loop:
                sums.store(zero, loop.index)
            return
        with self.kernel.loop(0, rows) as row:
            value = self.corrections.load(row.index).splat(lanes)
            for at in range(0, width, lanes):
                start = value
                if self.spec.asymmetric:
                    zeros = self.buffers.zeros[part]
                    start = value * load_zeros(zeros, panel * width + at, self.direct.feed, self.groups.bits)
                sums.store(start, row.index * width + at)

    # --- products -----------------------------------------------------------------------------------------------------

    def _multiply(self, part: int, panel: Val, row: Val, rows: Val) -> None:
        """sums[part] += x[row : row + rows] @ panel.T, block by block of K."""
        if self.buffers.compressed:
            weight, out = self.buffers.compressed[part], self.weights[part]
            emit_decompress(self.kernel, weight, panel, self.packing.panel, out)
            panel = constant(0)
        # One tile of rows uses each weight once: no reason to stop along the way. Nor to convert 4-bit codes for two.
        tiles = 2 if isinstance(self.direct.feed, PairFeed) and self.groups.bits == 4 else 1
        at_once = self.m <= self.direct.tallest * tiles
        if self.wide is None:
            block = at_once.select(constant(self.spec.k), self.direct.block)
            self._multiply_blocks(self.direct, part, (panel, row, rows), block)
            return
        with self.kernel.when(at_once):
            self._multiply_blocks(self.direct, part, (panel, row, rows), constant(self.spec.k))
        with self.kernel.when(~at_once):
            self._multiply_blocks(self.wide, part, (panel, row, rows), constant(self.wide.block))

    def _multiply_blocks(self, path: _Path, part: int, where: tuple[Val, Val, Val], block: Val) -> None:
        panel, row, rows = where
        stored = path.stored or path.feed
        with self.kernel.loop(0, self.spec.k, block) as blocks:
            start = blocks.index
            count = block.min(constant(self.spec.k) - start)
            x, x_at = self.buffers.x, row * self.x_stride + (start + self.spec.x_offset)
            w, w_at = self.weights[part], panel * self.packing.panel_size + start // stored.step * stored.stride
            if path.stored:
                self._convert(path, part, w.at(w_at), panel, start, count)
                w, w_at = path.weights, constant(0)
            if path.x is not self.buffers.x:
                widen_inputs(self.kernel, x.at(x_at), self.x_stride, rows, count, path.x, path.x_stride)
                x, x_at = path.x, constant(0)
            self._walk_rows(path, rows, self._call(path, part, (x, w), (x_at, w_at), panel, start, count))

    def _convert(self, path: _Path, part: int, w: Buffer, panel: Val, start: Val, count: Val) -> None:
        """A block of K of the weights at ``w``, as the path's micro-kernels read it."""
        stored, groups = path.stored, self.spec.steps if self.spec.expands else self.groups
        if isinstance(stored, ExpandFeed):
            at = (panel * groups.count + start // groups.size) * self.packing.panel
            expand_weights(self.kernel, stored, groups, w, self._levels(part), at, count, path.weights)
        elif stored:
            bound = stored.bound(self._tables(stored, part))
            widen_weights(self.kernel, bound, path.feed, w, count, path.weights)

    def _call(self, path: _Path, part: int, streams: tuple[Buffer, Buffer], at: tuple[Val, Val], panel: Val, start: Val,
              count: Val) -> Callable[[int, Val], None]:
        """Calls the micro-kernel of so many rows, from some row of the block on."""
        (x, w), (x_at, w_at), k, step = streams, at, self.spec.k, path.feed.step
        if isinstance(path.feed, ExpandFeed):
            buffers, groups = [x, w, self.sums[part], *self._levels(part)], self.spec.steps
            scales_at = (panel * groups.count + start // groups.size) * self.packing.panel
        elif self.grouped:
            buffers, group = self._streams(path.feed, x, w, part).buffers, start // self.groups.size
            groups = count // self.groups.size
            scales_at = (panel * self.groups.count + group) * self.packing.panel
        else:
            buffers = [x, w, self.sums[part], *self._tables(path.feed, part)]
            tail = (start + count).eq(k).to("index") if k % step else constant(0)
            ahead = (self.m <= path.tallest).select(constant(self.schedule.prefetch), 0)  # else the caches have the block

        def call(rows: int, row: Val) -> None:
            for vector in range(0, self.schedule.tile_v, self._width(path.feed, rows)):
                sums_at = row * self.packing.panel + vector * self.kernel.lanes
                places = (x_at + row * path.x_stride, w_at + vector * _spacing(path.feed), sums_at)
                if isinstance(path.feed, ExpandFeed):
                    more = (scales_at + vector * self.kernel.lanes, count // self.spec.expands)
                elif self.grouped:
                    more = (scales_at + vector * self.kernel.lanes, row * self.groups.count + group, groups)
                elif self._fetches(rows):
                    more = (count // step, tail, ahead)
                else:
                    more = (count // step, tail)
                path.tiles[rows](buffers, (*places, *more))

        return call

    def _walk_rows(self, path: _Path, rows: Val, call: Callable[[int, Val], None]) -> None:
        full = rows // path.tallest * path.tallest
        with self.kernel.loop(0, full, path.tallest) as loop:
            call(path.tallest, loop.index)
        for count in range(1, path.tallest):
            with self.kernel.when((rows - full).eq(count)):
                call(count, full)

    # --- from sums to y -----------------------------------------------------------------------------------------------

    def _finish(self, col: Val, row: Val, rows: Val) -> None:
        kernel, panel = self.kernel, self.packing.panel
        with kernel.loop(0, rows) as loop:
            if self.spec.n % panel == 0:
                self._finish_row(col, row + loop.index, loop.index * panel, masked=False)
                return
            whole = col + panel <= self.spec.n
            with kernel.when(whole):
                self._finish_row(col, row + loop.index, loop.index * panel, masked=False)
            with kernel.when(~whole):
                self._finish_row(col, row + loop.index, loop.index * panel, masked=True)

    def _finish_row(self, col: Val, row: Val, sums_at: Val, masked: bool) -> None:
        lanes = self.kernel.lanes
        for vector in range(self.schedule.tile_v):
            at = col + vector * lanes
            mask = self.kernel.mask(self.spec.n - at, lanes) if masked else None
            place = Place(row, at, lanes, mask)
            parts = [self._scaled(part, sums_at + vector * lanes, place) for part in range(self.spec.parts)]
            if self.spec.activation:
                parts[0] = ACTIVATIONS[self.spec.activation](parts[0])
            value = parts[0] * parts[1] if self.spec.gated else parts[0]
            self.sink(self.epilogue(value, place) if self.epilogue else value, place)

    def _scaled(self, part: int, at: Val, place: Place) -> Val:
        value = self.sums[part].load(at, place.lanes).to("f32")
        if self.buffers.scales and not self.grouped:
            value = value * load_scales(self.buffers.scales[part], place.col, place.lanes, self.groups.factor)
        if self.buffers.x_scale:
            value = value * self.buffers.x_scale.load(place.row).splat(place.lanes)
        if self.buffers.biases:
            value = value + self.buffers.biases[part].load(place.col, place.lanes, place.mask).to("f32")
        return value

    def _store(self, value: Val, place: Place) -> None:
        at = place.row * self.y_stride + (place.col + self.spec.y_offset)
        self.buffers.y.store(value.to(self.spec.out_dtype), at, place.mask)
