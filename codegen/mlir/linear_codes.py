"""How weights that are small integers meet x: feeds of the micro-kernels (see microkernel.py).

The codes come packed as `Packing` says, unsigned. `DotFeed` multiplies them by the int8 codes of x, exactly, in i32;
that the weights' codes are too large by their zero point (128 or 8 for symmetric ones) is corrected by whoever starts
the sums. `PairFeed` and `WidenFeed` take x in floats and codes as they are, less 128 or 8, which makes symmetric ones
what they mean; their codes are packed with ``split``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.microkernel import split_bf16
from tilewright.codegen.mlir.value import BITS, Val, constant, fma, intrinsic, literals

CODES = {"i8": 8, "u8": 8, "i4": 4, "u4": 4}
"""Bits of the codes that weights may be."""


@dataclass(frozen=True)
class _CodeFeed:
    """Weights of ``bits`` a code; ``k`` is the length of a row, which need not be whole steps."""

    bits: int
    panel: int
    lanes: int
    k: int

    @property
    def w_dtype(self) -> str:
        return "u8"

    @property
    def step(self) -> int:
        """The codes of four bytes."""
        return 32 // self.bits

    @property
    def stride(self) -> int:
        return 4 * self.panel

    @property
    def spread(self) -> tuple[int, ...]:
        return (0,)

    @property
    def rest(self) -> int:
        """k's beyond whole steps."""
        return self.k % self.step

    def words(self, w: Buffer, place: Val) -> Val:
        """The four bytes of each feature, as one i32."""
        return w.load(place, 4 * self.lanes).bitcast("i32")


@dataclass(frozen=True)
class DotFeed(_CodeFeed):
    """x in int8: quadruples of codes to i32, with vpdpbusd or from 16-bit products that cannot overflow."""

    vnni: bool
    x_dtype: str = "i8"
    acc: str = "i32"

    @property
    def parts(self) -> int:
        return 1 if self.vnni and self.bits == 8 else 2

    def weights(self, w: Buffer, place: Val, tail: bool = False) -> list[Val]:
        words = self.words(w, place)
        if self.bits == 4:
            return [(words & 0x0F0F0F0F).bitcast("u8"), (words.shift_right_logical(4) & 0x0F0F0F0F).bitcast("u8")]
        if self.vnni:
            return [words.bitcast("u8")]
        pairs = words.bitcast("i16")  # the even and the odd codes
        return [pairs & 0xFF, pairs.shift_right_logical(8)]

    def inputs(self, x: Buffer, place: Val, tail: bool = False) -> list[Val]:
        quads = [self._quad(x, place + 4 * i, self.rest - 4 * i if tail else 4) for i in range(self.step // 4)]
        if self.vnni or self.bits == 4:
            return [quad.bitcast("i8") for quad in quads]
        (pairs,) = (quad.bitcast("i16") for quad in quads)
        return [(pairs << 8) >> 8, pairs >> 8]

    def _quad(self, x: Buffer, place: Val, count: int) -> Val:
        """Four codes of x in every lane, zeros for those past ``count``."""
        if count >= 4:
            return x.load(place, 4).bitcast("i32").lane(0).splat(self.lanes)
        quad = constant(0, "i32")
        for i in range(count):
            quad = quad | (x.load(place + i).to("i32") & 0xFF) << 8 * i
        return quad.splat(self.lanes)

    def accumulate(self, total: Val, weights: Sequence[Val], inputs: Sequence[Val]) -> Val:
        if self.vnni:
            for weight, value in zip(weights, inputs, strict=True):
                total = dot_quads(total, weight, value)
            return total
        if self.bits == 8:
            for weight, value in zip(weights, inputs, strict=True):
                total = total + _madd(weight, value)
            return total
        # 2 * 15 * 128 a step: far from the end of i16.
        low, high = (_madd_bytes(weight, value) for weight, value in zip(weights, inputs, strict=True))
        return total + _madd(low + high, constant(1, "i16", 2 * self.lanes))


@dataclass(frozen=True)
class PairFeed(_CodeFeed):
    """x in bf16, multiplied in pairs by vdpbf16ps: half a byte of each 16 bits becomes a bf16 in one instruction.

    Codes of 8 bits are taken as 16 times one half plus the other. All of it is exact: products are summed in f32.
    """

    x_dtype: str = "bf16"
    acc: str = "f32"
    parts: int = 4

    def weights(self, w: Buffer, place: Val, tail: bool = False) -> list[Val]:
        pairs = self.words(w, place).bitcast("i16")
        low = literals(2 * (list(range(16)) if self.bits == 8 else list(range(-8, 8))), "bf16").bitcast("i16")
        high = literals(2 * list(range(-128, 128, 16)), "bf16").bitcast("i16") if self.bits == 8 else low
        return [_pick_pairs(pairs.shift_right_logical(4 * i), high if i % 2 else low).bitcast("bf16") for i in range(4)]

    def inputs(self, x: Buffer, place: Val, tail: bool = False) -> list[Val]:
        starts = (0, 0, 2, 2) if self.bits == 8 else (0, 4, 2, 6)  # the k's of the halves of a byte
        pairs = {start: self._pair(x, place + start, self.rest - start if tail else 2) for start in starts}
        return [pairs[start] for start in starts]

    def _pair(self, x: Buffer, place: Val, count: int) -> Val:
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
class WidenFeed(_CodeFeed):
    """x in floats: codes widen to f32, then fma."""

    x_dtype: str
    acc: str = "f32"

    @property
    def parts(self) -> int:
        return self.step

    def weights(self, w: Buffer, place: Val, tail: bool = False) -> list[Val]:
        words = self.words(w, place)
        count = self.rest if tail else self.step
        if self.bits == 4 and self.lanes == 16:
            return [_pick(words.shift_right_logical(self._bit(i)), literals(range(-8, 8), "f32")) for i in range(count)]
        signed, drop = words ^ (-0x7F7F7F80 if self.bits == 8 else -0x77777778), 32 - self.bits  # the sign bits flip
        return [((signed << drop - self._bit(i)) >> drop).to("f32") for i in range(count)]

    def _bit(self, i: int) -> int:
        """Where the code of the i-th k begins in its word."""
        return 8 * (0, 2, 1, 3)[i % 4] + 4 * (i // 4)

    def inputs(self, x: Buffer, place: Val, tail: bool = False) -> list[Val]:
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


def _pick(indices: Val, values: Val) -> Val:
    """vpermps: of 16 f32 the one that the low four bits of each i32 name."""
    return intrinsic("llvm.x86.avx512.permvar.sf.512", "f32", 16, values, indices)


def _pick_pairs(indices: Val, values: Val) -> Val:
    """vpermw: of 32 16-bit values the one that the low five bits of each 16 name."""
    return intrinsic("llvm.x86.avx512.permvar.hi.512", "i16", 32, values, indices)


def dot_quads(total: Val, unsigned: Val, signed: Val) -> Val:
    """vpdpbusd: i32 sums plus the products of four u8 and four i8 in each lane."""
    bits = total.lanes * BITS["i32"]
    return intrinsic(f"llvm.x86.avx512.vpdpbusd.{bits}", "i32", total.lanes, total, unsigned, signed)


def _madd(a: Val, b: Val) -> Val:
    """vpmaddwd: pairs of i16 products, added to i32."""
    name = "llvm.x86.avx512.pmaddw.d.512" if a.lanes == 32 else "llvm.x86.avx2.pmadd.wd"
    return intrinsic(name, "i32", a.lanes // 2, a, b)


def _madd_bytes(unsigned: Val, signed: Val) -> Val:
    """vpmaddubsw: pairs of u8 x i8 products, added to i16 with saturation."""
    name = "llvm.x86.avx512.pmaddubs.w.512" if unsigned.lanes == 64 else "llvm.x86.avx2.pmadd.ub.sw"
    return intrinsic(name, "i16", unsigned.lanes // 2, unsigned, signed)


def quad_sums(codes: Val) -> Val:
    """The sum of every four neighbours of an i8 vector."""
    if Kernel.current().target.has_vnni:
        zero = constant(0, "i32", codes.lanes // 4)
        return dot_quads(zero, constant(1, "u8", codes.lanes), codes)
    return _madd(_madd_bytes(constant(1, "u8", codes.lanes), codes), constant(1, "i16", codes.lanes // 2))
