"""The newest tokens beside codes, in full: rows of a window, round which they go (see `CodeLayout.window`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tilewright.codegen.cache_codes import CodeLayout
from tilewright.codegen.cache_slots import SLOT_STEP
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.flash import Flash
from tilewright.codegen.mlir.flash_rows import Adjust, Shape, SoftRows, Visible
from tilewright.codegen.mlir.flash_sources import Straight
from tilewright.codegen.mlir.kv_blocks import Rows, pack_keys, pack_values
from tilewright.codegen.mlir.kv_codes_write import CodeWriter, Limits, Scale, make_scale
from tilewright.codegen.mlir.kv_residual_write import ResidualWriter
from tilewright.codegen.mlir.value import SIZES, Val, constant, iota
from tilewright.codegen.schedule import AttentionSchedule


@dataclass(frozen=True)
class Typed:
    """Bytes seen as elements of ``dtype``; places are in elements."""

    memory: Buffer
    dtype: str

    def at(self, offset: Val) -> Typed:
        """The same memory, with places counted from byte ``offset``."""
        return Typed(self.memory.at(offset), self.dtype)

    def load(self, index: Val | int, lanes: int, mask: None = None) -> Val:
        size = SIZES[self.dtype]
        return self.memory.load(index * size, lanes * size).bitcast(self.dtype)

    def store(self, value: Val, index: Val | int) -> None:
        self.memory.store(value.to(self.dtype).bitcast("u8"), index * SIZES[self.dtype])

    def prefetch(self, index: int, locality: int) -> None:
        self.memory.prefetch(index * SIZES[self.dtype], locality)


@dataclass(frozen=True)
class Windows:
    """The windows of a cache: ``keys`` and ``values`` of a head, and the elements of their rows.

    They are in memory of their own, or behind the codes in that of the cache.
    """

    cache: CodeLayout
    k: Buffer
    v: Buffer

    def keys(self, batch: Val, head: Val) -> Typed:
        """Rows of ``key_row`` elements."""
        cache = self.cache
        return self._rows(self.k, cache.k_bytes - cache.k_behind, cache.k_windows, cache.key_row, batch, head)

    def values(self, batch: Val, head: Val) -> Typed:
        """Rows of ``value_size`` elements."""
        cache = self.cache
        return self._rows(self.v, cache.v_bytes - cache.v_behind, cache.v_windows, cache.value_size, batch, head)

    def _rows(self, memory: Buffer, codes: int, windows: int, size: int, batch: Val, head: Val) -> Typed:
        cache, before = self.cache, 0 if self.cache.windows else codes
        window = cache.window * size * cache.full_size
        return Typed(memory, cache.full).at(batch * (before + windows) + before + head * window)


RowSource = Callable[[Val, int], Val]
"""One vector of f32 components of a token's row, from a component on."""


class RecentWriter:
    """Appends to one head of a cache that keeps recent tokens: whole groups become codes, the rest goes to the windows."""

    def __init__(self, kernel: Kernel, cache: CodeLayout) -> None:
        self.kernel, self.cache, self.lanes, self.codes = kernel, cache, kernel.lanes, CodeWriter(kernel, cache)
        self.k_rows, self.v_rows = (kernel.scratch(cache.group * size, "f32") for size in (cache.key_row, cache.value_size))
        self.scale, self.zero = (kernel.scratch(cache.key_row, "f32") for _ in range(2))
        sides = (cache.k_residual, self.k_rows, cache.key_row), (cache.v_residual, self.v_rows, cache.value_size)
        self.residuals = [ResidualWriter(kernel, cache, *side) for side in sides] if cache.has_residual else []

    def append(self, start: Val, end: Val, new: tuple[RowSource, RowSource], windows: tuple[Typed, Typed],
               run: Callable[[Val], tuple[Buffer, Buffer]]) -> None:
        """Tokens ``start`` to ``end``; ``new`` gives their rows by position, ``run(position)`` where codes lie."""
        cache, group = self.cache, self.cache.group
        coded = cache.coded(end)
        with self.kernel.loop(cache.coded(start), coded, group) as groups:
            first = groups.index
            with self.kernel.loop(0, group) as rows:
                position = first + rows.index
                for source, window, stage, size in self._both(new, windows, (self.k_rows, self.v_rows)):
                    self._stage(position, start, source, window, stage.at(rows.index * size), size)
            self._encode(first, *run(first))
        with self.kernel.loop(start.max(coded), end) as tokens:
            for source, window, _, size in self._both(new, windows, (None, None)):
                row = tokens.index % cache.window * size
                for column in range(0, size, self.lanes):
                    window.store(source(tokens.index, column), row + column)

    def _both(self, *pairs: tuple) -> list[tuple]:
        return list(zip(*pairs, (self.cache.key_row, self.cache.value_size)))

    def _stage(self, position: Val, start: Val, source: RowSource, window: Typed, stage: Buffer, size: int) -> None:
        """One row as the window has it, or would have it."""
        full = self.cache.full

        def kept() -> None:
            for column in range(0, size, self.lanes):
                stage.store(window.load(position % self.cache.window * size + column, self.lanes).to("f32"), column)

        def added() -> None:
            for column in range(0, size, self.lanes):
                stage.store(source(position, column).to(full).to("f32"), column)

        self.kernel.branch(position < start, kept, added)

    def _encode(self, first: Val, k: Buffer, v: Buffer) -> None:
        """The staged group becomes codes from slot ``first`` on, in the runs at ``k`` and ``v``."""
        cache, lanes = self.cache, self.lanes
        slot = first % cache.run
        if cache.channels:
            self._channels(k, slot // cache.group)
        with self.kernel.loop(0, cache.group) as rows:
            key, value = rows.index * cache.key_row, rows.index * cache.value_size

            def key_source(start: int) -> Val:
                return self.k_rows.load(key + start, lanes)

            if cache.channels:
                self.codes.key_codes(key_source, self._scale, k, slot + rows.index)
            else:
                of_key = self.codes.key(key_source, k, slot + rows.index, self._limits(0, rows.index))
            of_value = self.codes.value(lambda start: self.v_rows.load(value + start, lanes), v, slot + rows.index,
                                        self._limits(1, rows.index))
            scales = self._scale if cache.channels else lambda start: of_key, lambda start: of_value
            for residual, scale in zip(self.residuals, scales):
                residual.leave(rows.index, scale)
        for residual, memory in zip(self.residuals, (k, v)):
            residual.write(memory, slot)

    def _limits(self, side: int, row: Val) -> Limits:
        """Between what the numbers of a staged row lie, if not all of them count."""
        return self.residuals[side].limits_of_token(row) if self.residuals else None

    def _scale(self, start: int) -> Scale:
        return Scale(self.cache.dtype, self.scale.load(start, self.lanes), self.zero.load(start, self.lanes))

    def _channels(self, k: Buffer, group: Val) -> None:
        """Scales and zeros of the channels of the staged keys, into the run at ``k`` too."""
        cache, lanes, size = self.cache, self.lanes, self.cache.scale_size
        for start in range(0, cache.key_row, lanes):
            made = make_scale(cache, *self._limits_of_channels(start))
            assert made.zero is not None
            self.scale.store(made.scale, start)
            self.zero.store(made.zero, start)
            keep = cache.key_size - start
            if keep <= 0:
                continue
            mask = None if keep >= lanes else self.kernel.mask(constant(keep * size), lanes * size)
            inside = iota(lanes) < cache.dim - start  # behind the last channel there is nothing to tell apart
            for number, begin in ((made.scale, 0), (made.zero, cache.k_scales)):
                number = inside.select(number, 0.0)
                at = (group * cache.key_size + (begin + start)) * size + cache.k_codes
                k.store(number.to(cache.scales).bitcast("u8"), at, mask)

    def _limits_of_channels(self, start: int) -> tuple[Val, Val]:
        """Between what the staged keys of a vector of channels lie."""
        if self.residuals and (outliers := self.residuals[0].outliers) is not None:
            return outliers.of_channels(start)
        cache, infinity = self.cache, constant(float("inf"), "f32", self.lanes)
        with self.kernel.loop(0, cache.group, carry=[infinity, -infinity]) as rows:
            x = self.k_rows.load(rows.index * cache.key_row + start, self.lanes)
            rows.next(rows.values[0].min(x), rows.values[1].max(x))
        return rows.results[0], rows.results[1]


class RecentRows:
    """Attends to the windows: packs them block by block for the kernels of floats, whose rows are those over the codes."""

    def __init__(self, kernel: Kernel, shape: Shape, schedule: AttentionSchedule, windows: Windows, dtype: str,
                 shared: SoftRows) -> None:
        """``dtype`` is that of the queries."""
        cache = windows.cache
        dot = kernel.target.has_bf16_dot and dtype == cache.full == "bf16"
        stored = "bf16" if dot else "f32"
        self.kernel, self.windows, self.panel = kernel, windows, shape.panel
        self.keys = kernel.scratch(SLOT_STEP * cache.key_row, stored)
        self.values = kernel.scratch(SLOT_STEP * cache.value_size, stored)
        rows = replace(shape, dim=cache.key_row, dtype=stored, dot=dot)
        self.flash = Flash(kernel, rows, replace(schedule, keys=SLOT_STEP, prefetch=0), (self.keys, self.values), shared)

    def attend(self, batch: Val, head: Val, begin: Val, high: Val, rows: Val, visible: Callable[[Val], Visible],
               adjust: Adjust | None) -> None:
        """Keys ``begin <= key < high``, none of which is a code; for the rest see `Flash.block`."""
        cache, none = self.windows.cache, constant(0)
        k, v = self.windows.keys(batch, head), self.windows.values(batch, head)

        def seen(query: Val) -> Visible:
            low, high = visible(query).low, visible(query).high
            return Visible(begin if low is None else low.max(begin), high)

        with self.kernel.loop(begin // SLOT_STEP * SLOT_STEP, high, SLOT_STEP) as blocks:
            key = blocks.index
            count, slot = (high - key).min(constant(SLOT_STEP)), key % cache.window
            of_keys = Rows(k, slot * cache.key_row, cache.key_row, cache.key_row)
            pack_keys(self.kernel, of_keys, count, self.panel, self.keys)
            of_values = Rows(v, slot * cache.value_size, cache.value_size, cache.value_size)
            pack_values(self.kernel, of_values, count, self.panel, SLOT_STEP, self.values)
            self.flash.block(Straight(self.keys, self.values, none, none, SLOT_STEP, none), key, count, rows, seen, adjust)
