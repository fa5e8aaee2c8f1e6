"""How weights that are codes of a few bits meet x in floats: feeds of the micro-kernels (see microkernel.py).

A code becomes the number it stands for, exactly; symmetric integers what they mean, unsigned ones what they would mean if
they were symmetric, which whoever starts the sums corrects. Codes of up to four bits are places in a table of a vector or
two, whose entries an instruction picks: any sixteen numbers cost the same. Their codes are packed with ``split``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from tilewright.codegen.mlir.builder import Buffer
from tilewright.codegen.mlir.linear_codes import CODES, CodeFeed, is_integer, shifted
from tilewright.codegen.mlir.microkernel import Weights, split_bf16
from tilewright.codegen.mlir.narrow import F8_FACTORS, widen_f8
from tilewright.codegen.mlir.value import Val, constant, fma, intrinsic, literals, shuffle
from tilewright.ir.types import DType


def meanings(weight: str) -> list[float]:
    """The number that each code of four bits or fewer stands for."""
    count = 1 << CODES[weight]
    if is_integer(weight):
        return [float(i - count // 2) for i in range(count)]
    return [float(v) for v in np.arange(count, dtype=np.uint8).view(DType(weight).np)]


@dataclass(frozen=True)
class FloatFeed(CodeFeed):
    """``table``: element type of the table of codes, when it comes as an argument; ``entries`` are its numbers, loaded."""

    x_dtype: str
    table: str | None = None
    entries: Val | None = None
    acc: str = "f32"

    @property
    def in_bf16(self) -> bool:
        """Whether a bf16 holds each number."""
        return self.table in (None, "bf16")

    def place(self, i: int) -> tuple[int, int]:
        """Which code of which byte of its word the i-th k has."""
        return i // 4, (0, 2, 1, 3)[i % 4]


@dataclass(frozen=True)
class PairFeed(FloatFeed):
    """x in bf16, multiplied in pairs by vdpbf16ps: codes become bf16 in one instruction, vpermw.

    Integers of 8 bits are taken as 16 times one half plus the other, floats of 8 bits are picked from four vectors. All of
    it is exact: products are summed in f32.
    """

    @property
    def parts(self) -> int:
        return 4 if self.weight in ("i8", "u8") else self.step // 2

    def bound(self, more: Sequence[Buffer]) -> PairFeed:
        if self.table is None:
            return self
        (table,) = more
        return replace(self, entries=repeated(table.load(0, 1 << self.bits), 32))

    def weights(self, w: Weights, place: Val | int, tail: bool = False) -> list[Val]:
        words = [word.bitcast("i16") for word in self.load(w, place)]
        if self.weight.startswith("f8"):
            return [_pick_magnitudes(shifted(words[0], bit), self.weight) for bit in (0, 8)]
        if self.bits == 8:
            low, high = (literals(2 * list(numbers), "bf16") for numbers in (range(16), range(-128, 128, 16)))
            return [pick_pairs(words[0].shift_right_logical(4 * i), high if i % 2 else low) for i in range(4)]
        entries = self.entries or repeated(literals(meanings(self.weight), "bf16"), 32)
        quads = range(self.step // 4)
        codes = [self.codes(words, quad, byte, 1, clean=False) for quad in quads for byte in (0, 1)]
        return [pick_pairs(code, entries) for code in codes]

    def inputs(self, x: Buffer, place: Val | int, tail: bool = False) -> list[Val]:
        starts = (0, 0, 2, 2) if self.weight in ("i8", "u8") else range(0, self.step, 2)
        pairs = {start: self._pair(x, place + start, self.rest - start if tail else 2) for start in starts}
        return [pairs[start] for start in starts]

    def _pair(self, x: Buffer, place: Val | int, count: int) -> Val:
        """Two neighbours in every lane, zeros for those past ``count``."""
        if count >= 2:
            bits = x.load(place, 2).bitcast("i32").lane(0)
        else:
            bits = x.load(place, 1).bitcast("i16").lane(0).to("i32") & 0xFFFF if count == 1 else constant(0, "i32")
        return bits.splat(self.lanes).bitcast("bf16")

    def accumulate(self, total: Val, weights: Sequence[Val], inputs: Sequence[Val]) -> Val:
        for weight, value in zip(weights, inputs, strict=True):
            total = intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", "f32", self.lanes, total, weight, value)
        return total


@dataclass(frozen=True)
class WidenFeed(FloatFeed):
    """x in floats: codes widen to f32, then fma."""

    @property
    def parts(self) -> int:
        return self.step

    def bound(self, more: Sequence[Buffer]) -> WidenFeed:
        if self.table is None:
            return self
        (table,) = more
        return replace(self, entries=self.widest(table.load(0, 1 << self.bits).to("f32")))

    def weights(self, w: Weights, place: Val | int, tail: bool = False) -> list[Val]:
        words = self.load(w, place)
        return [self.number(words, i) for i in range(self.rest if tail else self.pair)]

    def number(self, words: Sequence[Val], i: int) -> Val:
        """What the ``i``-th codes of ``words`` stand for."""
        quad, byte = self.place(i)
        if self.bits < 4 or self.entries or self.weight == "f4e2m1" or (self.bits == 4 and self.lanes == 16):
            entries = self.entries or self.widest(literals(meanings(self.weight), "f32"))
            return pick(self.codes(words, quad, byte, 1, clean=False), entries)
        if not is_integer(self.weight):
            return widen_f8(shifted(words[0], 8 * byte).to("i16"), self.weight)
        signed, drop = words[0] ^ (-0x7F7F7F80 if self.bits == 8 else -0x77777778), 32 - self.bits  # the sign bits flip
        return ((signed << drop - 8 * byte - self.bits * quad) >> drop).to("f32")

    def widest(self, table: Val) -> Val:
        """``table`` as often as fills a vector."""
        return repeated(table, max(self.lanes, table.lanes))

    def inputs(self, x: Buffer, place: Val | int, tail: bool = False) -> list[Val]:
        count = self.rest if tail else self.step
        if self.x_dtype != "bf16":
            return [x.load(place + i).to("f32").splat(self.lanes) for i in range(count)]
        values = []
        for i in range(0, count - 1, 2):
            values += split_bf16(x.load(place + i, 2).bitcast("i32").lane(0).splat(self.lanes))
        if count % 2:
            bits = x.load(place + (count - 1), 1).bitcast("i16").lane(0).to("i32") << 16
            values.append(bits.splat(self.lanes).bitcast("f32"))
        return values

    def accumulate(self, total: Val, weights: Sequence[Val], inputs: Sequence[Val]) -> Val:
        for weight, value in zip(weights, inputs, strict=True):
            total = fma(weight, value, total)
        return total


def repeated(table: Val, lanes: int) -> Val:
    """As many copies of ``table`` as fill ``lanes``."""
    return shuffle(table, table, [i % table.lanes for i in range(lanes)])


def pick(indices: Val, table: Val) -> Val:
    """Of 16 or 8 f32 the one that the lowest bits of each i32 name: vpermps, or two of half the size and a blend."""
    if indices.lanes == 16:
        return intrinsic("llvm.x86.avx512.permvar.sf.512", "f32", 16, table, indices)
    half = partial(intrinsic, "llvm.x86.avx2.permps", "f32", 8)
    if table.lanes == 8:
        return half(table, indices)
    low, high = table.slice(0, 8), table.slice(8, 8)
    return ((indices << 28) < 0).select(half(high, indices), half(low, indices))


def pick_pairs(indices: Val, table: Val) -> Val:
    """vpermw: of 32 bf16 the one that the low five bits of each 16 name."""
    return intrinsic("llvm.x86.avx512.permvar.hi.512", "i16", 32, table.bitcast("i16"), indices).bitcast("bf16")


def _pick_magnitudes(codes: Val, weight: str) -> Val:
    """The floats of 8 bits in the lower halves of 16, as bf16 divided by `F8_FACTORS`: two of vpermi2w pick."""
    factor = F8_FACTORS[weight]
    numbers = [float(v) / factor for v in np.arange(128, dtype=np.uint8).view(DType(weight).np)]
    tables = [literals(numbers[i:i + 32], "bf16").bitcast("i16") for i in range(0, 128, 32)]
    pick = partial(intrinsic, "llvm.x86.avx512.vpermi2var.hi.512", "i16", 32)
    small, large = pick(tables[0], codes, tables[1]), pick(tables[2], codes, tables[3])
    return ((codes & 0x40).ne(0).select(large, small) | ((codes << 8) & -0x8000)).bitcast("bf16")
