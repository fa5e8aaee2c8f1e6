"""Products of linear kernels: which micro-kernels a kernel has, and the walk over blocks of K and rows that calls them.

A row's sums grow in the order of K in every tile, so they are the same to the bit whatever other rows there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tilewright.codegen.mlir.builder import Buffer, Function, Kernel
from tilewright.codegen.mlir.linear_codes import CodeFeed, DotFeed
from tilewright.codegen.mlir.linear_expand import ExpandFeed, emit_expand_kernel, expand_weights
from tilewright.codegen.mlir.linear_floats import PairFeed, WidenFeed
from tilewright.codegen.mlir.linear_groups import Streams, emit_group_kernel, keeps_totals
from tilewright.codegen.mlir.linear_lossless import Compressed, emit_decompress, panel_room
from tilewright.codegen.mlir.linear_rows import RowFeed, emit_row_kernel, look_up_rows
from tilewright.codegen.mlir.linear_sparse import Reader, Sparse, emit_expand_function
from tilewright.codegen.mlir.linear_spec import LinearSpec
from tilewright.codegen.mlir.microkernel import AnyFeed, Feed, Tile, emit_micro_kernel
from tilewright.codegen.mlir.value import Val, constant
from tilewright.codegen.mlir.widen import core_feed, widen_inputs, widen_weights
from tilewright.codegen.packing import Packing, RowPacking
from tilewright.codegen.schedule import LinearSchedule, registers
from tilewright.ir.ops.sparse_expand import ROWS, SEGMENT

_FEW = 4  # rows up to which converting weights in registers beats storing the converted block
_STREAMED = 2  # rows up to which fetching ahead pays


@dataclass(frozen=True)
class LinearBuffers:
    """Arguments of the kernel: x (and its scales), for each weight what belongs to it, y (unless a sink stores).

    Weights are packed, or else ``compressed`` or ``sparse``.
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
    offsets: Sequence[Buffer] = ()
    sparse: Sequence[Sparse] = ()


@dataclass(frozen=True)
class Path:
    """Micro-kernels by count of rows, and the buffers of x and weights that they were made for.

    With ``reads`` they expand sparse weights themselves.
    """

    feed: AnyFeed
    tiles: dict[int, Function]
    x: Buffer
    weights: Buffer
    x_stride: int
    block: int
    stored: Feed | WidenFeed | ExpandFeed | RowFeed | None = None  # what blocks are converted from
    reads: bool = False

    @property
    def tallest(self) -> int:
        """Rows of the tallest tile."""
        return max(self.tiles)


def _spacing(feed: AnyFeed) -> int:
    """Elements of the weights from one vector of features to the next."""
    return feed.lanes * feed.stride // (feed.panel * len(feed.spread))


class Products:
    """The sums of products of one emission."""

    wide_block = 128
    """k's of a converted block; four times as many of one byte."""

    def __init__(self, kernel: Kernel, spec: LinearSpec, schedule: LinearSchedule, m: Val, buffers: LinearBuffers) -> None:
        self.kernel, self.spec, self.schedule, self.m, self.buffers = kernel, spec, schedule, m, buffers
        self.packing, self.groups = spec.packing(schedule, kernel.target), spec.groups
        self.panel = self.packing.panel
        self.x_stride, self.grouped = spec.x_stride or spec.k, spec.grouped
        self.weights = buffers.weights
        if buffers.compressed:  # a panel at a time is made of them
            self.weights = [kernel.scratch(panel_room(spec.k, self.panel), "bf16")] * spec.parts
        if buffers.sparse:  # a block of a panel at a time is
            self.weights = [self._room()] * spec.parts
            self.expand = emit_expand_function(kernel, buffers.sparse[0], self.panel, self.weights[0])
        self.rows = -(-schedule.block_m // schedule.tile_m) * schedule.tile_m
        self.acc = "i32" if spec.dynamic and not self.grouped else "f32"
        self.sums = [kernel.scratch(self.rows * self.panel, self.acc) for _ in range(spec.parts)]
        self.corrections = None
        if spec.dynamic or spec.asymmetric or spec.offset:
            kind = "i32" if spec.dynamic else "f32"
            self.corrections = kernel.scratch(self.rows * self.groups.count, kind)
        self.direct, self.wide = self._paths()

    def _room(self) -> Buffer:
        """Memory for an expanded block."""
        count = min(self._block(self.schedule.block_k), self.packing.steps * self.packing.pair)
        dense = Packing(self.spec.weight, self.panel, count, self.panel, self.packing.pair)
        return self.kernel.scratch(dense.panel_size, dense.stored)

    def _paths(self) -> tuple[Path, Path | None]:
        """Micro-kernels for few rows, which read x and the packed weights where they are, and maybe others for many."""
        spec, tile_m, target = self.spec, self.schedule.tile_m, self.kernel.target
        codes = (spec.weight, self.panel, self.kernel.lanes, spec.k)
        if spec.row_tables:
            rows = RowFeed(spec.weight, self.kernel.lanes, self.kernel.lanes, spec.k, "f32", spec.table)
            return self._direct(rows, _FEW), self._wide(rows)
        if spec.expands:
            expand = ExpandFeed(*codes, target.has_vnni)
            return self._direct(expand, _FEW), self._wide(expand)
        if spec.dynamic:
            dots = DotFeed(*codes, target.has_vnni)
            return self._direct(dots, tile_m), self._expanded(dots)
        if spec.coded:
            feed = WidenFeed(*codes, spec.x_dtype, spec.table)
            if target.has_bf16_dot and spec.x_dtype == "bf16" and feed.in_bf16:
                return self._direct(PairFeed(*codes, spec.x_dtype, spec.table), tile_m), self._wide(feed)
            return self._direct(feed, _FEW), self._wide(feed)
        dot = target.has_bf16_dot and spec.x_dtype == spec.weight == "bf16"
        feed = Feed(spec.x_dtype, spec.weight, self.panel, self.kernel.lanes, dot)
        if feed == core_feed(self.kernel, feed):
            return self._direct(feed, tile_m), self._expanded(feed)
        return self._direct(feed, _FEW), self._wide(feed)

    def _direct(self, feed: AnyFeed, tallest: int) -> Path:
        """Micro-kernels that read x and the packed weights where they are."""
        x, stride = self.buffers.x, self.x_stride
        if feed.x_dtype != self.spec.x_dtype:
            x, stride = self.kernel.scratch(tallest * self.spec.k, feed.x_dtype), self.spec.k
        return self._path("direct", feed, tallest, x, self.weights[0], stride, reads=bool(self.spec.sparse))

    def _expanded(self, feed: AnyFeed) -> Path | None:
        """Micro-kernels over expanded blocks of sparse weights."""
        if not self.spec.sparse:
            return None
        return self._path("wide", feed, self.schedule.tile_m, self.buffers.x, self.weights[0], self.x_stride)

    def _wide(self, feed: Feed | WidenFeed | ExpandFeed) -> Path:
        """Micro-kernels that read blocks converted, from ``feed``, for many rows."""
        core = self._core(feed)
        block = self._block(min(self.schedule.block_k, self.wide_block * (4 if isinstance(core, DotFeed) else 1)))
        weights = self.kernel.scratch(block * core.panel, core.w_dtype)
        x, stride = self.buffers.x, self.x_stride
        if self.spec.x_dtype != core.x_dtype:
            x, stride = self.kernel.scratch(self.rows * block, "f32"), block
        return self._path("wide", core, self.schedule.tile_m, x, weights, stride, block, feed)

    def _core(self, feed: Feed | WidenFeed | ExpandFeed) -> Feed | DotFeed:
        """The feed that eats blocks converted from ``feed``."""
        if isinstance(feed, ExpandFeed):
            return DotFeed("i8", feed.panel, feed.lanes, feed.k, feed.vnni)
        if isinstance(feed, RowFeed):
            return Feed("f32", "f32", self.panel, self.kernel.lanes, dot=False)
        return core_feed(self.kernel, feed)

    def _block(self, k: int) -> int:
        """A block of K of about that size, in whole groups."""
        size = self.spec.expands or (self.groups.size if self.grouped else 1)
        if isinstance(self.packing, RowPacking):
            size = self.packing.block
        if self.spec.sparse:
            size = math.lcm(size, SEGMENT * self.spec.sparse.pair)
        return max(k // size, 1) * size

    def _path(self, name: str, feed: AnyFeed, tallest: int, x: Buffer, w: Buffer, x_stride: int, block: int = 0,
              stored: Feed | WidenFeed | ExpandFeed | RowFeed | None = None, reads: bool = False) -> Path:
        kernel, schedule, tiles = self.kernel, self.schedule, {}
        for rows in range(1, tallest + 1):
            # A tall tile is long enough by itself, and so is a step of many factors.
            unroll = max(1, min(schedule.unroll, 8 // rows) // (4 if feed.factors > 16 else 1))
            columns = tuple(i * _spacing(feed) for i in range(self._width(feed, rows, reads)))
            tile = Tile(rows, columns, x_stride, self.panel, unroll, told=self._fetches(rows), in_order=feed.acc == "f32")
            if isinstance(feed, RowFeed):
                tile = replace(tile, unroll=-(-_FEW // rows))
                buffers = (x, w, self.sums[0], self.buffers.tables[0])
                tiles[rows] = emit_row_kernel(kernel, f"{name}{rows}", feed, tile, buffers)
            elif isinstance(feed, ExpandFeed):
                buffers = (x, w, self.sums[0], *self._levels())
                tiles[rows] = emit_expand_kernel(kernel, f"{name}{rows}", feed, tile, self.spec.steps, buffers)
            elif self.grouped:
                streams, opened = self._streams(feed, x, w, reads=reads), self._opened(feed, tile) if reads else None
                tiles[rows] = emit_group_kernel(kernel, f"{name}{rows}", feed, tile, self.groups, streams, opened)
            elif reads:
                values, *more = self.buffers.sparse[0].buffers
                buffers = (x, values, self.sums[0], *more)
                opened = self._opened(feed, tile)
                tiles[rows] = emit_micro_kernel(kernel, f"{name}{rows}", feed, tile, self.spec.k, buffers, opened)
            else:
                buffers = (x, w, self.sums[0], *self._tables(feed))
                tiles[rows] = emit_micro_kernel(kernel, f"{name}{rows}", feed, tile, self.spec.k, buffers)
        return Path(feed, tiles, x, w, x_stride, block or self._block(schedule.block_k), stored, reads)

    def _opened(self, feed: AnyFeed, tile: Tile) -> Callable[[Buffer, Sequence[Buffer], Val], Reader]:
        """Reads sparse weights inside of a micro-kernel, from a vector of the weight on."""

        def opened(values: Buffer, more: Sequence[Buffer], first: Val) -> Reader:
            weight = self.buffers.sparse[0].inside(values, *more)
            return Reader(self.kernel, weight, first, tile.vectors, self.panel, feed.step)

        return opened

    def _fetches(self, rows: int) -> bool:
        """Whether a tile of so many rows may fetch weights ahead: one that waits for them rather than multiplies."""
        return bool(self.schedule.prefetch) and not (self.grouped or self.spec.expands) and rows <= _STREAMED

    def _width(self, feed: AnyFeed, rows: int, reads: bool = False) -> int:
        """Vectors of a panel that a tile of so many rows does at once, as registers allow."""
        target, most = self.kernel.target, self.schedule.tile_v
        if isinstance(feed, RowFeed):
            return most
        widths = [w for w in range(most, 0, -1) if most % w == 0]
        if self.spec.sparse:  # blocks are not cut
            widths = [w for w in widths if w * self.kernel.lanes % ROWS == 0]
        if reads and rows <= _STREAMED:  # whole blocks are one stream
            return widths[-1]
        if self.grouped:
            return next((w for w in widths if keeps_totals(rows, w, target)), widths[-1])

        def needed(w: int) -> int:
            held = 3 * w if isinstance(feed, ExpandFeed) else 0  # its levels
            return rows * w + (w if rows > w else 1) * feed.parts + held + 2

        return next((w for w in widths if needed(w) <= registers(target)), widths[-1]) if self.spec.coded else widths[0]

    def _streams(self, feed: AnyFeed, x: Buffer, w: Buffer, part: int = 0, reads: bool = False) -> Streams:
        zeros = self.buffers.zeros[part] if self.spec.asymmetric else None
        (table,) = self._tables(feed, part) or (None,)
        offsets = self.buffers.offsets[part] if self.spec.offset else None
        found = Streams(x, w, self.buffers.scales[part], self.sums[part], zeros, self.corrections, table, offsets)
        if not reads:
            return found
        values, mask, starts = self.buffers.sparse[part].buffers
        return replace(found, codes=values, mask=mask, starts=starts)

    def _levels(self, part: int = 0) -> list[Buffer]:
        """What codes expand by: steps and perhaps zero points."""
        return [role[part] for role in (self.buffers.steps, self.buffers.zeros) if role]

    def _tables(self, feed: AnyFeed, part: int = 0) -> Sequence[Buffer]:
        """What ``feed`` looks weights up in."""
        return self.buffers.tables[part:part + 1] if isinstance(feed, CodeFeed) else ()

    # --- products -----------------------------------------------------------------------------------------------------

    def multiply(self, part: int, panel: Val, row: Val, rows: Val) -> None:
        """sums[part] += x[row : row + rows] @ panel.T, block by block of K."""
        if self.buffers.compressed:
            weight, out = self.buffers.compressed[part], self.weights[part]
            emit_decompress(self.kernel, weight, panel, self.panel, out)
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

    def _multiply_blocks(self, path: Path, part: int, where: tuple[Val, Val, Val], block: Val) -> None:
        panel, row, rows = where
        stored = path.stored or path.feed
        with self.kernel.loop(0, self.spec.k, block) as blocks:
            start = blocks.index
            count = block.min(constant(self.spec.k) - start)
            x, x_at = self.buffers.x, row * self.x_stride + (start + self.spec.x_offset)
            w, w_at = self.weights[part], self.place(panel, start, stored)
            if self.spec.sparse:
                w_at = constant(0)
                if not path.reads:
                    pair = self.spec.sparse.pair
                    steps = (count + (pair - 1)) // pair
                    self.expand((*self.buffers.sparse[part].buffers, w), (panel, start // pair, steps))
            if path.stored:
                self._convert(path, part, w.at(w_at), panel, start, count)
                w, w_at = path.weights, constant(0)
            if path.x is not self.buffers.x:
                widen_inputs(self.kernel, x.at(x_at), self.x_stride, rows, count, path.x, path.x_stride)
                x, x_at = path.x, constant(0)
            self._walk_rows(path, rows, self._call(path, part, (x, w), (x_at, w_at), panel, start, count))

    def place(self, panel: Val, start: Val, stored: AnyFeed) -> Val:
        """Where the weights of a panel are from the k ``start`` on."""
        return panel * self.packing.panel_size + start // stored.step * stored.stride

    def _convert(self, path: Path, part: int, w: Buffer, panel: Val, start: Val, count: Val) -> None:
        """A block of K of the weights at ``w``, as the path's micro-kernels read it."""
        stored, groups = path.stored, self.spec.steps if self.spec.expands else self.groups
        if isinstance(stored, ExpandFeed):
            at = (panel * groups.count + start // groups.size) * self.panel
            expand_weights(self.kernel, stored, groups, w, self._levels(part), at, count, path.weights)
        elif isinstance(stored, RowFeed):
            first, features = self._features(panel)
            rows = self.kernel.scratch(stored.lanes * path.block, "f32")
            table = self.buffers.tables[part]
            look_up_rows(self.kernel, stored, w, table, first, features, count, rows, path.weights, self.panel)
        elif stored:
            bound = stored.bound(self._tables(stored, part))
            widen_weights(self.kernel, bound, path.feed, w, count, path.weights)

    def _features(self, panel: Val) -> tuple[Val, Val]:
        """The first feature of a panel, and how many there are."""
        first = panel * self.panel
        return first, (constant(self.spec.n) - first).min(constant(self.panel))

    def _call(self, path: Path, part: int, streams: tuple[Buffer, Buffer], at: tuple[Val, Val], panel: Val, start: Val,
              count: Val) -> Callable[[int, Val], None]:
        """Calls the micro-kernel of so many rows, from some row of the block on."""
        (x, w), (x_at, w_at), k, step = streams, at, self.spec.k, path.feed.step
        if isinstance(path.feed, RowFeed):
            buffers, features = [x, w, self.sums[part], self.buffers.tables[part]], self._features(panel)
        elif isinstance(path.feed, ExpandFeed):
            buffers, groups = [x, w, self.sums[part], *self._levels(part)], self.spec.steps
            scales_at = (panel * groups.count + start // groups.size) * self.panel
        elif self.grouped:
            buffers, group = self._streams(path.feed, x, w, part, path.reads).buffers, start // self.groups.size
            groups = count // self.groups.size
            scales_at = (panel * self.groups.count + group) * self.panel
        else:
            buffers = [x, w, self.sums[part], *self._tables(path.feed, part)]
            if path.reads:
                values, *more_buffers = self.buffers.sparse[part].buffers
                buffers = [x, values, self.sums[part], *more_buffers]
            tail = (start + count).eq(k).to("index") if k % step else constant(0)
            ahead = (self.m <= path.tallest).select(constant(self.schedule.prefetch), 0)  # else the caches have the block

        def call(rows: int, row: Val) -> None:
            for vector in range(0, self.schedule.tile_v, self._width(path.feed, rows, path.reads)):
                sums_at = row * self.packing.panel + vector * self.kernel.lanes
                w_place = w_at + vector * _spacing(path.feed)
                if path.reads:
                    w_place = panel * self.schedule.tile_v + vector
                places = (x_at + row * path.x_stride, w_place, sums_at)
                if isinstance(path.feed, RowFeed):
                    more = features
                elif isinstance(path.feed, ExpandFeed):
                    more = (scales_at + vector * self.kernel.lanes, count // self.spec.expands)
                elif self.grouped:
                    more = (scales_at + vector * self.kernel.lanes, row * self.groups.count + group, groups)
                elif self._fetches(rows):
                    more = (count // step, tail, ahead)
                else:
                    more = (count // step, tail)
                path.tiles[rows](buffers, (*places, *more))

        return call

    def _walk_rows(self, path: Path, rows: Val, call: Callable[[int, Val], None]) -> None:
        full = rows // path.tallest * path.tallest
        with self.kernel.loop(0, full, path.tallest) as loop:
            call(path.tallest, loop.index)
        for count in range(1, path.tallest):
            with self.kernel.when((rows - full).eq(count)):
                call(count, full)
