"""Keys under scales of channels, made into keys of 8 bits under one scale a group.

A code of two bits picks one of four numbers of its channel. Sixteen bytes hold those of four channels, which vpshufb looks
up for four components of every key at once. A code of four bits is two of two: what its upper and what its lower half
stand for add up. The numbers are rounded to 8 bits under the largest of their group. Products of few rows look keys up on
their way, those of many find them in a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tilewright.codegen.cache_codes import CodeLayout
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.linear_codes import DotFeed
from tilewright.codegen.mlir.microkernel import Weights
from tilewright.codegen.mlir.value import Val, constant, intrinsic, shuffle

_TOP = 126.0  # two rounded halves stay within 127
_BIAS = 128.0
_PLACES = 0x0C080400  # where the numbers of each of four channels begin
_CODES = 0x03030303
_BYTES = 2.0**23  # added to a number from 0 to 255, the sum has its nearest integer in the lowest bits
_ABOVE = 0x4B000000  # and these above


class ChannelKeys:
    """One run of keys at a time, in ``block``: unsigned bytes ``[run / panel][key_size / 4][panel][4]``."""

    def __init__(self, kernel: Kernel, cache: CodeLayout) -> None:
        self.kernel, self.cache, self.lanes = kernel, cache, kernel.lanes
        self.size = -(-cache.key_size // self.lanes) * self.lanes
        self.block = kernel.scratch(cache.run * cache.key_size, "u8")
        count = self.size * (cache.run // cache.group)
        self.at = kernel.scratch(1, "i64")  # where the tables of the group at hand begin
        self.tables = [kernel.scratch(count, "i32") for _ in range(cache.bits // 2)]  # of the upper bits first

    def prepare(self, k: Buffer, scales: Buffer) -> None:
        """What the codes of the run at ``k`` stand for; the scale of each of its keys goes to ``scales``."""
        cache = self.cache
        for group in range(cache.run // cache.group):
            scale = self._make_tables(k, group)
            for start in range(0, cache.group, self.lanes):
                scales.store(scale.splat(self.lanes), group * cache.group + start)

    def expand(self, k: Buffer) -> None:
        """The keys of the run, prepared, to ``block``."""
        for group in range(self.cache.run // self.cache.group):
            self._look_up(k, group)

    def _make_tables(self, k: Buffer, group: int) -> Val:
        """The numbers that the codes of each channel stand for, four bytes a channel; their common scale."""
        cache, lanes = self.cache, self.lanes
        starts, steps = range(0, self.size, lanes), (1 << cache.bits) - 1
        pairs = [self._channels(k, group, start) for start in starts]
        most = constant(1e-30, "f32", lanes)
        for scale, zero in pairs:
            most = most.max(zero.abs()).max(scale.fma(float(steps), zero).abs())
        unit = most.reduce("max") * (1 / _TOP)
        factor = (1.0 / unit).splat(lanes)
        for start, pair in zip(starts, pairs):
            scale, zero = (x * factor for x in pair)
            for table, step in zip(self.tables, (1.0,) if cache.bits == 2 else (4.0, 1.0)):
                first = zero + _BIAS if table is self.tables[0] else constant(0.0, "f32", lanes)
                table.store(_four_bytes([scale.fma(step * code, first) for code in range(4)]), group * self.size + start)
        return unit

    def _channels(self, k: Buffer, group: int, start: int) -> tuple[Val, Val]:
        """Scales and zeros of one vector of channels."""
        cache, size = self.cache, self.cache.scale_size
        keep = cache.key_size - start
        found = []
        for first in (0, cache.k_scales):
            at = cache.k_codes + (first + group * cache.key_size + start) * size
            mask = None if keep >= self.lanes else self.kernel.mask(constant(keep * size), self.lanes * size)
            found.append(k.load(at, self.lanes * size, mask).bitcast(cache.scales).to("f32"))
        return found[0], found[1]

    def _look_up(self, k: Buffer, group: int) -> None:
        """The keys of a group of the run."""
        cache, lanes, panel = self.cache, self.lanes, self.cache.key_panel
        first, quads = group * cache.group, cache.pair // 4
        tables = Tables(tuple(table.at(group * self.size) for table in self.tables), lanes)
        for row in range(first, first + cache.group, lanes):
            source = row // panel * (panel * cache.key_size * cache.bits // 8) + row % panel * 4
            target = row // panel * (panel * cache.key_size) + row % panel * 4
            with self.kernel.loop(0, cache.key_size // cache.pair) as loop:
                words = k.load(loop.index * (4 * panel) + source, 4 * lanes).bitcast("i32")
                for quad in range(quads):
                    number = tables.numbers(words, loop.index * quads + quad, quad)
                    self.block.store(number, (loop.index * quads + quad) * (4 * panel) + target)


@dataclass(frozen=True)
class Tables:
    """Of one group, four bytes a channel: those of the upper two bits of codes of four first."""

    tables: tuple[Buffer, ...]
    lanes: int

    def numbers(self, words: Val, quad: Val, part: int) -> Val:
        """Four components of every key, the ``quad``-th ones, which are the ``part``-th codes of the bytes of words."""
        total, bits = None, 2 * len(self.tables)
        for table, down in zip(self.tables, range(bits * part + bits - 2, bits * part - 1, -2)):
            four = table.load(quad * 4, 4)
            wide = shuffle(four, four, [lane % 4 for lane in range(self.lanes)])
            places = words.shift_right_logical(down) & _CODES | _PLACES
            found = _pick(wide.bitcast("u8"), places.bitcast("u8"))
            total = found if total is None else total + found
        assert total is not None
        return total


@dataclass
class LookedUp:
    """Codes from a place on and their group's tables, read by `TableFeed`."""

    codes: Buffer
    tables: Tables
    stride: int
    step: Val | int = 0
    carried: list[Val] = field(default_factory=list)

    def after(self, steps: Val) -> LookedUp:
        return replace(self, codes=self.codes.at(steps * self.stride))

    def at_step(self, step: Val) -> LookedUp:
        return replace(self, step=step)

    def load(self, place: Val | int, lanes: int) -> Val:
        return self.codes.load(constant(0) + self.step * self.stride + place, lanes)

    def prefetch(self, ahead: Val | int, masks: bool) -> None:
        """Lines of a step, of all its panel."""
        for line in range(0, self.stride, 64):
            self.codes.prefetch(constant(line) + self.step * self.stride + ahead, locality=2)


@dataclass(frozen=True)
class TableFeed(DotFeed):
    """Keys that are looked up on the way to their products, which vpdpbusd makes: no others hold numbers of 8 bits."""

    def opened(self, w: Buffer, more: Sequence[Buffer], place: Val) -> LookedUp:
        """``more`` are the tables of all groups and, as the last, the place of those of the group at ``place``."""
        *tables, at = more
        first = at.load(0).to("index")
        return LookedUp(w.at(place), Tables(tuple(table.at(first) for table in tables), self.lanes), self.stride)

    def weights(self, w: Weights, place: Val | int, tail: bool = False) -> list[Val]:
        assert isinstance(w, LookedUp)
        (words,), quads = self.load(w, place), self.step // 4
        return [w.tables.numbers(words, w.step * quads + quad, quad) for quad in range(quads)]


def _four_bytes(numbers: Sequence[Val]) -> Val:
    """Four f32 numbers from 0 to 255, rounded, as bytes of a word; the first is the lowest."""
    first, *others = ((number + _BYTES).bitcast("i32") for number in numbers)
    word = first - _ABOVE
    for i, other in enumerate(others, 1):
        word = word + (other << 8 * i)
    return word


def _pick(table: Val, places: Val) -> Val:
    """vpshufb: bytes of each 16 by their places among them."""
    name = "llvm.x86.avx512.pshuf.b.512" if table.lanes == 64 else "llvm.x86.avx2.pshuf.b"
    return intrinsic(name, "u8", table.lanes, table, places)
