"""Linear kernels: ``y[M, N] = x[M, K] @ weight[N, K].T`` for any M, with whatever should happen to y on its way out.

One kernel serves every M. A task is one panel of output features (see `Packing`) for one block of rows; inside, blocks
of K keep the panel in cache while register tiles walk over the rows. With one tile of rows or fewer the panel is
streamed once, which is the matrix-vector product. Weights (or x) that need converting are converted on the fly for a
few rows, and block by block into scratch memory for more; int8 codes of x meet codes of weights as they are. Sums wait
in a scratch, from which a separate small loop applies scales, bias, activation and the caller's epilogue, and stores.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tilewright.codegen.mlir.builder import Kernel
from tilewright.codegen.mlir.linear_groups import emit_row_sums, load_scales, load_zeros
from tilewright.codegen.mlir.linear_products import LinearBuffers, Products
from tilewright.codegen.mlir.linear_spec import ACTIVATIONS, LinearSpec
from tilewright.codegen.mlir.value import Val, constant
from tilewright.codegen.schedule import LinearSchedule
from tilewright.codegen.target import CpuTarget


@dataclass(frozen=True)
class Place:
    """Where a vector of results belongs: ``lanes`` columns from ``col`` of ``row``; ``mask`` when some are past N."""

    row: Val
    col: Val
    lanes: int
    mask: Val | None


Epilogue = Callable[[Val, Place], Val]
Sink = Callable[[Val, Place], None]


def linear_kernel(name: str, target: CpuTarget, spec: LinearSpec, schedule: LinearSchedule) -> Kernel:
    """The whole kernel with dim M and, as far as there are such, the buffers in the order of ``roles``, then y."""
    names = ("gate", "up")[:spec.parts]
    scales = spec.group_packing(spec.scale, schedule, target).stored if spec.coded and spec.scale else None
    roles = {"weights": "u8" if spec.coded else spec.weight, "scales": scales, "zeros": "u8" if spec.has_zeros else None,
             "steps": "u8" if spec.expands else None, "tables": spec.table, "offsets": "f32" if spec.offset else None,
             "biases": spec.bias}
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
    LinearTasks(kernel, spec, schedule, m, buffers, epilogue, sink).emit()


class LinearTasks(Products):
    """The state of one emission."""

    def __init__(self, kernel: Kernel, spec: LinearSpec, schedule: LinearSchedule, m: Val, buffers: LinearBuffers,
                 epilogue: Epilogue | None, sink: Sink | None = None) -> None:
        super().__init__(kernel, spec, schedule, m, buffers)
        self.epilogue, self.sink = epilogue, sink or self._store
        self.y_stride = spec.y_stride or spec.n

    # --- tasks --------------------------------------------------------------------------------------------------------

    def emit(self, begin: Val | None = None, end: Val | None = None) -> None:
        """The tasks that the kernel is called for, or those from ``begin`` to ``end``."""
        kernel, tile_m = self.kernel, self.schedule.tile_m
        begin, end = begin or kernel.begin, end or kernel.end
        blocks = ((self.m + (self.schedule.block_m - 1)) // self.schedule.block_m).max(1)
        height = ((self.m + blocks - 1) // blocks + (tile_m - 1)) // tile_m * tile_m
        with kernel.loop(begin, end, carry=[self.m]) as tasks:
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
                self.multiply(part, panel, row, rows)
            self.finish(panel * self.panel, row, rows)
            tasks.next(row)

    def _correct(self, row: Val, rows: Val) -> None:
        """What sums of products start with, minus the zero point times the sum of x, or the sums that offsets take."""
        factor = 1 if self.spec.offset else -1 if self.spec.asymmetric else -(1 << self.groups.bits - 1)
        x = self.buffers.x.at(row * self.x_stride + self.spec.x_offset)
        emit_row_sums(self.kernel, x, self.x_stride, rows, self.spec.k, self.groups, factor, self.corrections)

    def _start(self, part: int, panel: Val, rows: Val) -> None:
        lanes, width, sums = self.kernel.lanes, self.panel, self.sums[part]
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

    # --- from sums to y -----------------------------------------------------------------------------------------------

    def finish(self, col: Val, row: Val, rows: Val) -> None:
        kernel, panel = self.kernel, self.panel
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
