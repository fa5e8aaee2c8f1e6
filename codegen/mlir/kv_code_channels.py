"""Keys under scales of channels, made into keys of 8 bits under one scale a group, a run at a time in the nearest memory.

A code of two bits picks one of four numbers of its channel. Sixteen bytes hold those of four channels, which vpshufb looks
up for four components of every key at once. A code of four bits is two of two: what its upper and what its lower half
stand for add up. The numbers are rounded to 8 bits under the largest of their group.
"""

from __future__ import annotations

from tilewright.codegen.cache_codes import CodeLayout
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.value import Val, constant, intrinsic, shuffle

_TOP = 126.0  # two rounded halves stay within 127
_BIAS = 128
_PLACES = 0x0C080400  # where the numbers of each of four channels begin
_CODES = 0x03030303


class ChannelKeys:
    """One run of keys at a time, in ``block``: unsigned bytes ``[run / panel][key_size / 4][panel][4]``."""

    def __init__(self, kernel: Kernel, cache: CodeLayout) -> None:
        self.kernel, self.cache, self.lanes = kernel, cache, kernel.lanes
        self.size = -(-cache.key_size // self.lanes) * self.lanes
        self.block = kernel.scratch(cache.run * cache.key_size, "u8")
        self.tables = [kernel.scratch(self.size, "i32") for _ in range(cache.bits // 2)]  # of the upper bits first

    def expand(self, k: Buffer, scales: Buffer) -> None:
        """The run at ``k``; the scale of each of its keys goes to ``scales``."""
        cache = self.cache
        for group in range(cache.run // cache.group):
            scale = self._make_tables(k, group)
            for start in range(0, cache.group, self.lanes):
                scales.store(scale.splat(self.lanes), group * cache.group + start)
            self._look_up(k, group * cache.group)

    def _make_tables(self, k: Buffer, group: int) -> Val:
        """The numbers that the codes of each channel stand for, four bytes a channel; their common scale."""
        cache, lanes = self.cache, self.lanes
        steps = (1 << cache.bits) - 1
        most = constant(1e-30, "f32", lanes)
        for start in range(0, self.size, lanes):
            scale, zero = self._channels(k, group, start)
            most = most.max(zero.abs()).max(scale.fma(float(steps), zero).abs())
        unit = most.reduce("max") * (1 / _TOP)
        factor = (1.0 / unit).splat(lanes)
        for start in range(0, self.size, lanes):
            scale, zero = (x * factor for x in self._channels(k, group, start))
            for table, step in zip(self.tables, (1.0,) if cache.bits == 2 else (4.0, 1.0)):
                first = zero + float(_BIAS) if table is self.tables[0] else constant(0.0, "f32", lanes)
                word = constant(0, "i32", lanes)
                for code in range(4):
                    word = word | scale.fma(step * code, first).round_even().to("i32") << 8 * code
                table.store(word, start)
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

    def _look_up(self, k: Buffer, first: int) -> None:
        """Keys ``first`` and on of the run, as many as a group has."""
        cache, lanes, panel = self.cache, self.lanes, self.cache.key_panel
        quads = cache.pair // 4
        for row in range(first, first + cache.group, lanes):
            source = row // panel * (panel * cache.key_size * cache.bits // 8) + row % panel * 4
            target = row // panel * (panel * cache.key_size) + row % panel * 4
            with self.kernel.loop(0, cache.key_size // cache.pair) as loop:
                words = k.load(loop.index * (4 * panel) + source, 4 * lanes).bitcast("i32")
                for quad in range(quads):
                    number = self._numbers(words, loop.index * quads + quad, cache.bits * quad)
                    self.block.store(number, (loop.index * quads + quad) * (4 * panel) + target)

    def _numbers(self, words: Val, quad: Val, shift: int) -> Val:
        total = None
        for table, down in zip(self.tables, range(shift + self.cache.bits - 2, shift - 1, -2)):
            four = table.load(quad * 4, 4)
            wide = shuffle(four, four, [lane % 4 for lane in range(self.lanes)])
            places = words.shift_right_logical(down) & _CODES | _PLACES
            found = _pick(wide.bitcast("u8"), places.bitcast("u8"))
            total = found if total is None else total + found
        assert total is not None
        return total


def _pick(table: Val, places: Val) -> Val:
    """vpshufb: bytes of each 16 by their places among them."""
    name = "llvm.x86.avx512.pshuf.b.512" if table.lanes == 64 else "llvm.x86.avx2.pshuf.b"
    return intrinsic(name, "u8", table.lanes, table, places)
