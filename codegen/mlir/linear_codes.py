"""How weights that are codes of a few bits come out of memory, and how those that are integers meet int8 codes of x.

The codes come packed as `Packing` says, unsigned. `DotFeed` multiplies them by the int8 codes of x, exactly, in i32;
that the weights' codes are too large by their zero point (128, 8, 4 or 2 for symmetric ones) is corrected by whoever
starts the sums. Feeds for x in floats are in linear_floats.py. All are feeds of the micro-kernels in microkernel.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.microkernel import Weights
from tilewright.codegen.mlir.value import BITS, Val, constant, intrinsic
from tilewright.codegen.packing import code_pair, code_planes

CODES = {"i8": 8, "u8": 8, "i4": 4, "u4": 4, "i3": 3, "u3": 3, "i2": 2, "u2": 2, "f8e4m3": 8, "f8e5m2": 8, "f4e2m1": 4}
"""Bits of the codes that weights may be."""


def is_integer(weight: str) -> bool:
    """Whether codes are integers."""
    return weight in CODES and not weight.startswith("f")


@dataclass(frozen=True)
class CodeFeed:
    """Weights of element type ``weight``; ``k`` is the length of a row, which need not be whole steps."""

    weight: str
    panel: int
    lanes: int
    k: int

    @property
    def bits(self) -> int:
        """Of a code."""
        return CODES[self.weight]

    @property
    def w_dtype(self) -> str:
        return "u8"

    @property
    def pair(self) -> int:
        """The codes of four bytes, or of three times four when codes are in two parts."""
        return code_pair(self.bits)

    @property
    def step(self) -> int:
        return self.pair

    @property
    def factors(self) -> int:
        """k's of one feature that a step consumes in one lane."""
        return self.pair

    @property
    def words(self) -> int:
        """Vectors of one step."""
        return self.pair * self.bits // 32

    @property
    def stride(self) -> int:
        return 4 * self.panel * self.words

    @property
    def spread(self) -> tuple[int, ...]:
        return tuple(4 * self.panel * i for i in range(self.words))

    @property
    def rest(self) -> int:
        """k's beyond whole steps."""
        return self.k % self.step

    def load(self, w: Weights, place: Val | int) -> list[Val]:
        """The words of each feature, as i32."""
        return [w.load(place + start, 4 * self.lanes).bitcast("i32") for start in self.spread]

    def codes(self, words: Sequence[Val], quad: int, byte: int, mask: int, clean: bool = True) -> Val:
        """The ``quad``-th code of byte ``byte`` of each word, in the lowest bits of every lane of ``words``.

        ``mask`` has the lowest bit of each code wanted. Not ``clean``: anything may be above a code.
        """
        low, *high = code_planes(self.bits)
        apart = 8 // low
        first, own = shifted(words[quad // apart], 8 * byte + low * (quad % apart)), mask * ((1 << low) - 1)
        if not high:
            return first & own if clean else first
        return first & own | shifted(words[-1], 8 * byte + quad - low) & (mask << low if clean else ~own)

    def bound(self, more: Sequence[Buffer]) -> CodeFeed:
        """The feed inside of a function that has ``more`` buffers."""
        return self


def shifted(value: Val, count: int) -> Val:
    """Bits moved down by ``count``, or up where it is negative."""
    return value << -count if count < 0 else value.shift_right_logical(count) if count else value


@dataclass(frozen=True)
class DotFeed(CodeFeed):
    """x in int8: quadruples of codes to i32, with vpdpbusd or from 16-bit products that cannot overflow."""

    vnni: bool
    x_dtype: str = "i8"
    acc: str = "i32"

    @property
    def parts(self) -> int:
        return 2 if self.bits == 8 and not self.vnni else self.step // 4

    def weights(self, w: Weights, place: Val | int, tail: bool = False) -> list[Val]:
        words = self.load(w, place)
        if self.bits < 8:
            return [self.codes(words, quad, 0, 0x01010101).bitcast("u8") for quad in range(self.step // 4)]
        return self.bytes(words[0])

    def bytes(self, words: Val) -> list[Val]:
        """Factors of one quadruple of bytes."""
        if self.vnni:
            return [words.bitcast("u8")]
        pairs = words.bitcast("i16")  # the even and the odd codes
        return [pairs & 0xFF, pairs.shift_right_logical(8)]

    def inputs(self, x: Buffer, place: Val | int, tail: bool = False) -> list[Val]:
        quads = [self.quad(x, place + 4 * i, self.rest - 4 * i if tail else 4) for i in range(self.step // 4)]
        return [quad.bitcast("i8") for quad in quads] if self.bits < 8 else self.wide(quads[0])

    def wide(self, quad: Val) -> list[Val]:
        """Factors of one quadruple of codes of x, for ``bytes``."""
        if self.vnni:
            return [quad.bitcast("i8")]
        pairs = quad.bitcast("i16")
        return [(pairs << 8) >> 8, pairs >> 8]

    def quad(self, x: Buffer, place: Val | int, count: int) -> Val:
        """Four codes of x in every lane, zeros for those past ``count``."""
        if count >= 4:
            return x.load(place, 4).bitcast("i32").lane(0).splat(self.lanes)
        quad = constant(0, "i32")
        for i in range(count):
            quad = quad | (x.load(place + i).to("i32") & 0xFF) << 8 * i
        return quad.splat(self.lanes)

    def accumulate(self, total: Val, weights: Sequence[Val], inputs: Sequence[Val]) -> Val:
        if self.vnni or self.bits == 8:
            return self.accumulate_bytes(total, weights, inputs)
        # 2 * 15 * 128 each of two, 2 * 7 * 128 each of eight: far from the end of i16.
        first, *others = (madd_bytes(weight, value) for weight, value in zip(weights, inputs, strict=True))
        for other in others:
            first = first + other
        return total + madd(first, constant(1, "i16", 2 * self.lanes))

    def accumulate_bytes(self, total: Val, weights: Sequence[Val], inputs: Sequence[Val]) -> Val:
        """``total`` plus products of factors that ``bytes`` and ``wide`` give."""
        for weight, value in zip(weights, inputs, strict=True):
            total = dot_quads(total, weight, value) if self.vnni else total + madd(weight, value)
        return total


def dot_quads(total: Val, unsigned: Val, signed: Val) -> Val:
    """vpdpbusd: i32 sums plus the products of four u8 and four i8 in each lane."""
    bits = total.lanes * BITS["i32"]
    return intrinsic(f"llvm.x86.avx512.vpdpbusd.{bits}", "i32", total.lanes, total, unsigned, signed)


def madd(a: Val, b: Val) -> Val:
    """vpmaddwd: pairs of i16 products, added to i32."""
    name = "llvm.x86.avx512.pmaddw.d.512" if a.lanes == 32 else "llvm.x86.avx2.pmadd.wd"
    return intrinsic(name, "i32", a.lanes // 2, a, b)


def madd_bytes(unsigned: Val, signed: Val) -> Val:
    """vpmaddubsw: pairs of u8 x i8 products, added to i16 with saturation."""
    name = "llvm.x86.avx512.pmaddubs.w.512" if unsigned.lanes == 64 else "llvm.x86.avx2.pmadd.ub.sw"
    return intrinsic(name, "i16", unsigned.lanes // 2, unsigned, signed)


def quad_sums(codes: Val) -> Val:
    """The sum of every four neighbours of an i8 vector."""
    if Kernel.current().target.has_vnni:
        zero = constant(0, "i32", codes.lanes // 4)
        return dot_quads(zero, constant(1, "u8", codes.lanes), codes)
    return madd(madd_bytes(constant(1, "u8", codes.lanes), codes), constant(1, "i16", codes.lanes // 2))
