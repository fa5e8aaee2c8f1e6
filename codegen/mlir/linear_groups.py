"""Weights with a scale (and zero point) for each group of k's: sums of x, and the micro-kernel that applies the scales.

The sums of a group are kept apart, in i32 for int8 activations, and scaled into f32 totals when the group ends. A zero
point costs nothing in the inner loop: ``sum (w - zero) * x = sum w * x - zero * sum x``, so a group's sums start at the
correction ``-zero * sum x``. The same holds for a scale a channel, where all of K is one group. Of weights with an offset,
``scale * w + offset``, a group adds ``offset * sum x`` to the totals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tilewright.codegen.mlir.builder import Buffer, Function, Kernel
from tilewright.codegen.mlir.linear_codes import quad_sums
from tilewright.codegen.mlir.microkernel import AnyFeed, Reading, Tile, Weights, carried, resumed, sum_steps
from tilewright.codegen.mlir.narrow import widen_f8e8m0
from tilewright.codegen.mlir.value import Val, constant, fma, shuffle
from tilewright.codegen.schedule import registers
from tilewright.codegen.target import CpuTarget

_CHAINS = 4  # sums that hide the latency of products, where weights come one vector after the other


@dataclass(frozen=True)
class Groups:
    """``count`` groups of ``size`` k's in a row of K, of codes of ``bits``; scales are to be multiplied by ``factor``."""

    size: int
    count: int
    bits: int
    factor: float = 1.0


@dataclass(frozen=True)
class Streams:
    """What a panel brings along K, and what x does: buffers, not offset. The last six may be missing.

    Sparse weights have a ``mask`` and ``starts``.
    """

    x: Buffer
    codes: Buffer
    scales: Buffer
    sums: Buffer
    zeros: Buffer | None = None
    corrections: Buffer | None = None
    table: Buffer | None = None
    offsets: Buffer | None = None
    mask: Buffer | None = None
    starts: Buffer | None = None

    @property
    def optional(self) -> tuple[Buffer | None, ...]:
        """The last six."""
        return self.zeros, self.corrections, self.table, self.offsets, self.mask, self.starts

    @property
    def buffers(self) -> list[Buffer]:
        given = (self.x, self.codes, self.scales, self.sums, *self.optional)
        return [buffer for buffer in given if buffer is not None]

    def like(self, buffers: Sequence[Buffer]) -> Streams:
        """The same roles for other buffers, in the order of ``buffers``."""
        x, codes, scales, sums, *rest = buffers
        given = [rest.pop(0) if mine else None for mine in self.optional]
        return Streams(x, codes, scales, sums, *given)


def emit_group_kernel(kernel: Kernel, name: str, feed: AnyFeed, tile: Tile, groups: Groups, streams: Streams,
                      opened: Callable[[Buffer, Sequence[Buffer], Val], Reading] | None = None) -> Function:
    """``sums[rows][features] += x[rows] @ features.T`` over some groups of K, as the inner function ``name``.

    Numbers of a call: first element of x, of the codes, of the sums, of the scales (and zeros) and of the corrections,
    and the count of groups. ``opened`` reads sparse weights, as that of `emit_micro_kernel`.
    """
    with kernel.function(name, streams.buffers, numbers=6) as micro:
        x_at, w_at, sums_at, scales_at, corrections_at, count = micro.numbers
        inner = streams.like(micro.buffers)
        feed = feed.bound([inner.table] if inner.table else [])
        codes = inner.codes.at(w_at)
        if opened and inner.mask and inner.starts:
            codes = opened(inner.codes, (inner.mask, inner.starts), w_at)
        _GroupKernel(kernel, feed, tile, groups, inner, codes, (x_at, scales_at, corrections_at)).emit(sums_at, count)
    return micro


class _GroupKernel:
    """The state of one emission."""

    def __init__(self, kernel: Kernel, feed: AnyFeed, tile: Tile, groups: Groups, streams: Streams, codes: Weights,
                 starts: tuple[Val, Val, Val]) -> None:
        self.kernel, self.feed, self.tile, self.groups, self.streams = kernel, feed, tile, groups, streams
        self.codes = codes
        self.x_at, self.scales_at, self.corrections_at = starts
        self.places = [(r, v) for r in range(tile.rows) for v in range(tile.vectors)]

    def emit(self, sums_at: Val, count: Val) -> None:
        sums = self.streams.sums.at(sums_at)
        at = [r * self.tile.sums_stride + v * self.feed.lanes for r, v in self.places]
        if not keeps_totals(self.tile.rows, self.tile.vectors, self.kernel.target):
            with self.kernel.loop(0, count, carry=carried(self.codes)) as loop:
                resumed(self.codes, loop.values)
                self._flush_to_memory(loop.index, sums, at)
                loop.next(*carried(self.codes))
            return
        totals = [sums.load(place, self.feed.lanes) for place in at]
        with self.kernel.loop(0, count, carry=[*totals, *carried(self.codes)]) as loop:
            totals = self._ended(loop.index, resumed(self.codes, loop.values))
            loop.next(*totals, *carried(self.codes))
        for place, total in zip(at, loop.results):
            sums.store(total, place)

    def _flush_to_memory(self, group: Val, sums: Buffer, at: Sequence[int]) -> None:
        totals = self._ended(group, [sums.load(place, self.feed.lanes) for place in at])
        for total, place in zip(totals, at):
            sums.store(total, place)

    def _ended(self, group: Val, totals: Sequence[Val]) -> list[Val]:
        """``totals`` with what a group adds to them."""
        parts, scales = self._group(group), self._scales(group)
        after = [fma(part, scales[v], total) for part, total, (_, v) in zip(parts, totals, self.places)]
        if self.streams.offsets is None:
            return after
        offsets, rows = self._offsets(group, scales), [row.to("f32") for row in self._row_sums(group)]
        return [fma(offsets[v], rows[r], total) for total, (r, v) in zip(after, self.places)]

    def _offsets(self, group: Val, scales: Sequence[Val]) -> list[Val]:
        """Offsets of a group; feeds for floats take codes for smaller ones by half of their range."""
        lanes, at = self.feed.lanes, self.scales_at + group * self.feed.panel
        less = 0.0 if self.feed.acc == "i32" else float(1 << self.groups.bits - 1)
        loaded = [self.streams.offsets.load(at + v * lanes, lanes) for v in range(self.tile.vectors)]
        return [fma(scale, constant(less, "f32", lanes), offset) for scale, offset in zip(scales, loaded)]

    def _row_sums(self, group: Val) -> list[Val]:
        """The corrections of a group: for each row, in every lane."""
        at, corrections = self.corrections_at + group, self.streams.corrections
        return [corrections.load(at + r * self.groups.count).splat(self.feed.lanes) for r in range(self.tile.rows)]

    def _group(self, group: Val) -> list[Val]:
        """The f32 sums of one group."""
        steps = self.groups.size // self.feed.step
        x = self.streams.x.at(self.x_at + group * self.groups.size)
        codes = self.codes
        if isinstance(codes, Buffer):
            codes = codes.at(group * (steps * self.feed.stride))
        else:
            codes = codes.after(group * steps)
        start = self._start(group)
        split = 1 if isinstance(codes, Buffer) else min(self.tile.unroll, -(-_CHAINS // len(start)))
        totals = sum_steps(self.kernel, self.feed, self.tile, (x, codes), constant(steps), start, split)
        return [total.to("f32") for total in totals]

    def _start(self, group: Val) -> list[Val]:
        feed, streams = self.feed, self.streams
        if streams.corrections is None or streams.offsets:
            return [constant(0, feed.acc, feed.lanes)] * len(self.places)
        rows = self._row_sums(group)
        if streams.zeros is None:
            return [rows[r] for r, _ in self.places]
        at = self.scales_at + group * feed.panel
        zeros = [load_zeros(streams.zeros, at + v * feed.lanes, feed, self.groups.bits) for v in range(self.tile.vectors)]
        return [rows[r] * zeros[v] for r, v in self.places]

    def _scales(self, group: Val) -> list[Val]:
        feed, scales = self.feed, self.streams.scales
        at = self.scales_at + group * feed.panel
        return [load_scales(scales, at + v * feed.lanes, feed.lanes, self.groups.factor) for v in range(self.tile.vectors)]


def keeps_totals(rows: int, vectors: int, target: CpuTarget) -> bool:
    """Whether a tile's totals stay in registers beside the sums of the current group."""
    return 2 * (rows * vectors + vectors) + 2 <= registers(target)


def load_scales(scales: Buffer, at: Val, lanes: int, factor: float) -> Val:
    """Scales of a vector of features, as f32 and times ``factor``. Bytes are exponents of two."""
    loaded = scales.load(at, lanes)
    wide = widen_f8e8m0(loaded) if scales.dtype == "u8" else loaded.to("f32")
    return wide * factor if factor != 1 else wide


def load_zeros(zeros: Buffer, at: Val, feed: AnyFeed, bits: int) -> Val:
    """Zero points of a vector of features, as ``feed`` sees the codes."""
    loaded = zeros.load(at, feed.lanes).to("i32")
    return loaded if feed.acc == "i32" else (loaded - (1 << bits - 1)).to("f32")


# --- sums of x ------------------------------------------------------------------------------------------------------


def emit_row_sums(kernel: Kernel, x: Buffer, stride: int, rows: Val, k: int, groups: Groups, factor: int,
                  out: Buffer) -> None:
    """``out[row, group] = factor * sum(x[row, group])`` for ``rows`` rows of x that are ``stride`` apart."""
    with kernel.loop(0, rows) as row:
        source, target = x.at(row.index * stride), out.at(row.index * groups.count)
        if groups.count == 1:
            target.store(_sum_row(kernel, source, constant(0), k, out.dtype) * factor, 0)
            return
        together = _together(kernel, groups, x.dtype)
        whole = groups.count // together * together if together > 1 else 0
        if together > 1:
            with kernel.loop(0, whole, together) as loop:
                target.store(_sum_groups(source.at(loop.index * groups.size), groups.size, together) * factor, loop.index)
        with kernel.loop(whole, groups.count) as loop:
            total = _sum_row(kernel, source, loop.index * groups.size, groups.size, out.dtype)
            target.store(total * factor, loop.index)


def _together(kernel: Kernel, groups: Groups, dtype: str) -> int:
    """Groups of int8 codes whose sums are found at once, filling a vector; 1 where that does not work out."""
    quads, odd = divmod(groups.size, 4)
    return kernel.lanes if dtype == "i8" and not odd and quads & (quads - 1) == 0 else 1


def _sum_groups(x: Buffer, size: int, lanes: int) -> Val:
    """The sums of ``lanes`` groups that follow each other, each of 4 * 2**i codes."""
    vectors = [quad_sums(x.load(start, 4 * lanes)) for start in range(0, size * lanes, 4 * lanes)]
    while len(vectors) > 1:
        vectors = [_add_neighbours(a, b) for a, b in zip(vectors[::2], vectors[1::2])]
    return vectors[0]


def _add_neighbours(a: Val, b: Val) -> Val:
    """a0 + a1, a2 + a3, ..., b0 + b1, ..."""
    lanes = 2 * a.lanes
    return shuffle(a, b, range(0, lanes, 2)) + shuffle(a, b, range(1, lanes, 2))


def _sum_row(kernel: Kernel, x: Buffer, start: Val, count: int, dtype: str) -> Val:
    lanes = kernel.lanes
    whole = count // lanes * lanes
    with kernel.loop(0, whole, lanes, [constant(0, dtype, lanes)]) as loop:
        loop.next(loop.values[0] + x.load(start + loop.index, lanes).to(dtype))
    with kernel.loop(whole, count, carry=[loop.results[0].reduce("sum")]) as loop:
        loop.next(loop.values[0] + x.load(start + loop.index).to(dtype))
    return loop.results[0]
