"""Linear kernels: ``y[M, N] = x[M, K] @ weight[N, K].T`` for any M, with whatever should happen to y on its way out.

One kernel serves every M. A task is one panel of output features (see `Packing`) for one block of rows; inside, blocks
of K keep the panel in cache while register tiles walk over the rows. With one tile of rows or fewer the panel is
streamed once, which is the matrix-vector product. Weights (or x) that need converting are converted on the fly for a
few rows, and block by block into scratch memory for more. Sums wait in an f32 scratch, from which a separate small
loop applies scales, bias, activation and the caller's epilogue, and stores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tilewright.codegen.mlir import math
from tilewright.codegen.mlir.builder import Buffer, Function, Kernel
from tilewright.codegen.mlir.microkernel import Feed, Tile, emit_micro_kernel, feed_for
from tilewright.codegen.mlir.value import Val, constant
from tilewright.codegen.mlir.widen import core_feed, widen_inputs, widen_weights
from tilewright.codegen.packing import Packing
from tilewright.codegen.schedule import LinearSchedule
from tilewright.codegen.target import CpuTarget

_FEW = 4  # rows up to which converting weights in registers beats storing the converted block
_WIDE_BLOCK = 128  # k's of a converted block


def _relu(x: Val) -> Val:
    return constant(0.0, "f32", x.lanes).max(x)


ACTIVATIONS: dict[str, Callable[[Val], Val]] = {**math.FUNCTIONS, "relu": _relu}


@dataclass(frozen=True)
class LinearSpec:
    """What a linear kernel computes; M is a dim of the kernel, everything else is static.

    ``weight`` is f32, bf16, f16 or i8 (symmetric, one f32 scale a feature). ``gated``: two weights g and u, and
    ``activation(x @ g.T) * (x @ u.T)``. Strides and offsets, in elements, place x and y inside wider rows (0 = dense).
    """

    n: int
    k: int
    x_dtype: str = "f32"
    weight: str = "f32"
    out_dtype: str = "f32"
    bias: str | None = None
    activation: str | None = None
    gated: bool = False
    x_stride: int = 0
    x_offset: int = 0
    y_stride: int = 0
    y_offset: int = 0

    def __post_init__(self) -> None:
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; known: {', '.join(sorted(ACTIVATIONS))}")
        if self.gated and self.activation is None:
            raise ValueError("a gated linear needs an activation")

    @property
    def parts(self) -> int:
        """How many weights: 2 when gated."""
        return 2 if self.gated else 1

    def panel(self, schedule: LinearSchedule, target: CpuTarget) -> int:
        """Output features of one panel."""
        return schedule.tile_v * target.lanes

    def packing(self, schedule: LinearSchedule, target: CpuTarget) -> Packing:
        """The layout in which each weight must come."""
        return Packing(self.weight, self.n, self.k, self.panel(schedule, target))

    def tasks(self, schedule: LinearSchedule, target: CpuTarget, m: Any) -> Any:
        """Number of tasks for ``m`` rows: an int, or an expression when ``m`` is symbolic."""
        return self.packing(schedule, target).panels * -(-m // schedule.block_m)


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
    """Arguments of the kernel: x, per part a packed weight, scales (i8) and bias, and y (unless a sink stores)."""

    x: Buffer
    weights: Sequence[Buffer]
    scales: Sequence[Buffer] = ()
    biases: Sequence[Buffer] = ()
    y: Buffer | None = None


def linear_kernel(name: str, target: CpuTarget, spec: LinearSpec, schedule: LinearSchedule) -> Kernel:
    """The whole kernel with dim M and buffers x, weights, scales, biases, y in this order."""
    names = ("gate", "up")[:spec.parts]
    given = [("x", spec.x_dtype), *((part, spec.weight) for part in names)]
    given += [(f"{part}_scale", "f32") for part in names] if spec.weight == "i8" else []
    given += [(f"{part}_bias", spec.bias) for part in names] if spec.bias else []
    with Kernel(name, target, ("M",), [*given, ("y", spec.out_dtype)]) as kernel:
        x, *rest, y = kernel.buffers
        groups = [rest[i:i + spec.parts] for i in range(0, len(rest), spec.parts)]
        weights = groups.pop(0)
        scales = groups.pop(0) if spec.weight == "i8" else ()
        biases = groups.pop(0) if spec.bias else ()
        emit_linear(kernel, spec, schedule, kernel.dims["M"], LinearBuffers(x, weights, scales, biases, y))
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

    feed: Feed
    tiles: dict[int, Function]
    x: Buffer
    weights: Buffer
    x_stride: int

    @property
    def tallest(self) -> int:
        """Rows of the tallest tile."""
        return max(self.tiles)


class _Linear:
    """The state of one emission."""

    def __init__(self, kernel: Kernel, spec: LinearSpec, schedule: LinearSchedule, m: Val, buffers: LinearBuffers,
                 epilogue: Epilogue | None, sink: Sink | None) -> None:
        self.kernel, self.spec, self.schedule, self.m, self.buffers = kernel, spec, schedule, m, buffers
        self.epilogue, self.sink = epilogue, sink or self._store
        self.packing = spec.packing(schedule, kernel.target)
        self.x_stride, self.y_stride = spec.x_stride or spec.k, spec.y_stride or spec.n
        rows = -(-schedule.block_m // schedule.tile_m) * schedule.tile_m
        self.sums = [kernel.scratch(rows * self.packing.panel, "f32") for _ in range(spec.parts)]
        feed = feed_for(kernel, spec.x_dtype, spec.weight, self.packing.panel)
        core = core_feed(kernel, feed)
        if feed == core:
            self.direct, self.wide = self._direct(feed, schedule.tile_m), None
        else:
            self.direct, self.wide = self._direct(feed, _FEW), self._wide(feed, core, rows)

    def _direct(self, feed: Feed, tallest: int) -> _Path:
        """Micro-kernels that read x and the packed weights where they are."""
        return self._path("direct", feed, tallest, self.buffers.x, self.buffers.weights[0], self.x_stride)

    def _wide(self, feed: Feed, core: Feed, rows: int) -> _Path:
        """Micro-kernels that read blocks converted for many rows."""
        block_k = min(self.schedule.block_k, _WIDE_BLOCK)
        weights = self.kernel.scratch(block_k * core.panel, core.w_dtype)
        x, stride = self.buffers.x, self.x_stride
        if feed.x_dtype != core.x_dtype:
            x, stride = self.kernel.scratch(rows * block_k, "f32"), block_k
        return self._path("wide", core, self.schedule.tile_m, x, weights, stride)

    def _path(self, name: str, feed: Feed, tallest: int, x: Buffer, weights: Buffer, x_stride: int) -> _Path:
        tiles = {}
        for rows in range(1, tallest + 1):
            unroll = max(1, min(self.schedule.unroll, 8 // rows))  # a tall tile is long enough by itself
            columns = tuple(vector * feed.lanes * feed.pair for vector in range(self.schedule.tile_v))
            tile = Tile(rows, columns, x_stride, self.packing.panel, unroll, self.schedule.prefetch)
            buffers = (x, weights, self.sums[0])
            tiles[rows] = emit_micro_kernel(self.kernel, f"{name}{rows}", feed, tile, self.spec.k, buffers)
        return _Path(feed, tiles, x, weights, x_stride)

    def emit(self) -> None:
        kernel, tile_m = self.kernel, self.schedule.tile_m
        blocks = ((self.m + (self.schedule.block_m - 1)) // self.schedule.block_m).max(1)
        height = ((self.m + blocks - 1) // blocks + (tile_m - 1)) // tile_m * tile_m
        with kernel.loop(kernel.begin, kernel.end) as tasks:
            panel, row = tasks.index // blocks, tasks.index % blocks * height
            rows = height.min(self.m - row)
            for part in range(self.spec.parts):
                self._zero(self.sums[part], rows)
                self._multiply(part, panel, row, rows)
            self._finish(panel * self.packing.panel, row, rows)

    def _zero(self, sums: Buffer, rows: Val) -> None:
        zero = constant(0.0, "f32", self.kernel.lanes)
        with self.kernel.loop(0, rows * self.packing.panel, self.kernel.lanes) as loop:
            sums.store(zero, loop.index)

    def _multiply(self, part: int, panel: Val, row: Val, rows: Val) -> None:
        """sums[part] += x[row : row + rows] @ panel.T, block by block of K."""
        # One tile of rows uses each weight once: no reason to stop along the way.
        at_once = self.m <= self.direct.tallest
        if self.wide is None:
            block = at_once.select(constant(self.spec.k), self.schedule.block_k)
            self._multiply_blocks(self.direct, part, (panel, row, rows), block)
            return
        with self.kernel.when(at_once):
            self._multiply_blocks(self.direct, part, (panel, row, rows), constant(self.spec.k))
        with self.kernel.when(~at_once):
            block = constant(min(self.schedule.block_k, _WIDE_BLOCK))
            self._multiply_blocks(self.wide, part, (panel, row, rows), block)

    def _multiply_blocks(self, path: _Path, part: int, where: tuple[Val, Val, Val], block: Val) -> None:
        panel, row, rows = where
        k, step = self.spec.k, path.feed.step
        with self.kernel.loop(0, k, block) as blocks:
            start = blocks.index
            left = constant(k) - start
            count = block.min(left)
            tail = (left.eq(count).to("index") if k % step else constant(0))
            x, x_at = self.buffers.x, row * self.x_stride + (start + self.spec.x_offset)
            w, w_at = self.buffers.weights[part], panel * self.packing.panel_size + start * self.packing.panel
            if path is self.wide:
                widen_weights(self.kernel, self.direct.feed, path.feed, w.at(w_at), count, path.weights)
                w, w_at = path.weights, constant(0)
            if path.x is not self.buffers.x:
                widen_inputs(self.kernel, x.at(x_at), self.x_stride, rows, count, path.x, path.x_stride)
                x, x_at = path.x, constant(0)
            self._walk_rows(path, rows, (x, w, self.sums[part]), (x_at, w_at, count // step, tail))

    def _walk_rows(self, path: _Path, rows: Val, buffers: tuple[Buffer, Buffer, Buffer],
                   numbers: tuple[Val, Val, Val, Val]) -> None:
        x_at, w_at, steps, tail = numbers
        full = rows // path.tallest * path.tallest

        def call(count: int, row: Val) -> None:
            places = (x_at + row * path.x_stride, w_at, row * self.packing.panel)
            path.tiles[count](buffers, (*places, steps, tail))

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
        value = self.sums[part].load(at, place.lanes)
        if self.buffers.scales:
            value = value * self.buffers.scales[part].load(place.col, place.lanes, place.mask)
        if self.buffers.biases:
            value = value + self.buffers.biases[part].load(place.col, place.lanes, place.mask).to("f32")
        return value

    def _store(self, value: Val, place: Place) -> None:
        at = place.row * self.y_stride + (place.col + self.spec.y_offset)
        self.buffers.y.store(value.to(self.spec.out_dtype), at, place.mask)
