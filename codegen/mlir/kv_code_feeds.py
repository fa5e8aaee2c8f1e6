"""How the codes of values meet the digits of p, in the micro-kernels of microkernel.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.codegen.mlir.builder import Buffer
from tilewright.codegen.mlir.linear_codes import DotFeed, dot_quads, madd, madd_bytes
from tilewright.codegen.mlir.value import Val, constant


@dataclass(frozen=True)
class ValueFeed(DotFeed):
    """Unsigned digits of p in the place of x, signed codes in that of weights."""

    x_dtype: str = "u8"

    def weights(self, w: Buffer, place: Val | int, tail: bool = False) -> list[Val]:
        return [part.bitcast("i8") if self.bits < 8 else part for part in super().weights(w, place, tail)]

    def bytes(self, words: Val) -> list[Val]:
        return [words.bitcast("i8")] if self.vnni else _halves(words, signed=True)

    def inputs(self, x: Buffer, place: Val | int, tail: bool = False) -> list[Val]:
        return [part.bitcast("u8") if self.bits < 8 else part for part in super().inputs(x, place, tail)]

    def wide(self, quad: Val) -> list[Val]:
        return [quad.bitcast("u8")] if self.vnni else _halves(quad, signed=False)

    def accumulate(self, total: Val, weights: Sequence[Val], inputs: Sequence[Val]) -> Val:
        if self.vnni:
            for weight, value in zip(weights, inputs, strict=True):
                total = dot_quads(total, value, weight)
            return total
        if self.bits == 8:
            return self.accumulate_bytes(total, weights, inputs)
        # 2 * 255 * 15 each of two, 2 * 255 * 3 each of four: far from the end of i16.
        first, *others = (madd_bytes(value, weight) for weight, value in zip(weights, inputs, strict=True))
        for other in others:
            first = first + other
        return total + madd(first, constant(1, "i16", 2 * self.lanes))


def _halves(words: Val, signed: bool) -> list[Val]:
    """The even and the odd bytes as i16."""
    pairs = words.bitcast("i16")
    return [(pairs << 8) >> 8, pairs >> 8] if signed else [pairs & 0xFF, pairs.shift_right_logical(8)]
