"""Weights of one input for the features of a cache line, as vectors of f32, or those of two inputs as pairs of bf16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.codegen.column_packing import LINES
from tilewright.codegen.mlir.builder import Buffer
from tilewright.codegen.mlir.linear_floats import meanings, pick, pick_pairs, repeated
from tilewright.codegen.mlir.value import Val, constant, fma, intrinsic, literals, shuffle

FACTORS = {"i8": 2.0**-24}
"""What numbers are to be multiplied by: a code of eight bits stands at the top of 32."""


@dataclass(frozen=True)
class ColumnFeed:
    """``weight``: element type; ``lanes`` of a vector of f32. ``dot``: inputs come in pairs of bf16, for vdpbf16ps."""

    weight: str
    lanes: int
    dot: bool = False

    @property
    def line(self) -> int:
        """Features of a cache line."""
        return LINES[self.weight]

    @property
    def elements(self) -> int:
        """Stored elements of a cache line."""
        return 64 if self.weight in ("i8", "i4") else self.line

    @property
    def step(self) -> int:
        """Inputs that are multiplied together."""
        return 2 if self.dot else 1

    def load(self, w: Buffer, place: Val) -> list[Val]:
        """The weights of a line at ``place`` as they lie in memory."""
        if self.weight in ("i8", "i4"):
            return [w.load(place + at, 4 * self.lanes) for at in range(0, 64, 4 * self.lanes)]
        return [w.load(place + at, self.lanes) for at in range(0, self.line, self.lanes)]

    def number(self, loaded: Sequence[Val], index: int) -> Val:
        """The vector ``index`` of a line, divided by what ``FACTORS`` says."""
        if self.weight not in ("i8", "i4"):
            return loaded[index].to("f32")
        index, block = divmod(index, len(loaded))
        if self.weight == "i8":  # each code becomes the highest byte of its 32 bits
            codes, zero, places = loaded[block], constant(0, "u8", 4 * self.lanes), range(4 * self.lanes)
            picked = [at // 16 * 16 + 4 * index + at % 16 // 4 if at % 4 == 3 else 4 * self.lanes for at in places]
            return shuffle(codes, zero, picked).bitcast("i32").to("f32")
        words = loaded[block].bitcast("i16")
        half, nibble = divmod(index, 4)
        codes = shuffle(words, constant(0, "i16", words.lanes), _interleaved(words.lanes, half)).bitcast("i32")
        if self.lanes == 16:
            return pick(codes.shift_right_logical(4 * nibble), literals(_SIGNED, "f32"))
        return ((codes << 28 - 4 * nibble) >> 28).to("f32")

    def pairs(self, first: Sequence[Val], second: Sequence[Val], index: int) -> Val:
        """The vector ``index`` of the lines of two inputs, side by side as bf16."""
        half, nibble = divmod(index, 4)
        words = [loaded.bitcast("i16") for loaded in (*first, *second)]
        codes = shuffle(*words, _interleaved(words[0].lanes, half))
        return pick_pairs(codes.shift_right_logical(4 * nibble), repeated(literals(_SIGNED, "bf16"), 32))

    def add(self, total: Val, lines: Sequence[Sequence[Val]], index: int, x: Val) -> Val:
        """``total`` plus the products of x with the vector ``index`` of a line, or of the lines of two inputs."""
        if not self.dot:
            return fma(self.number(lines[0], index), x, total)
        pairs = self.pairs(*lines, index)
        return intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", "f32", self.lanes, total, pairs, x)


_SIGNED = [meanings("i4")[i ^ 8] for i in range(16)]
"""What a half of a byte stands for."""


def _interleaved(lanes: int, half: int) -> list[int]:
    """Of two vectors of words the lower or upper ones of each 16 bytes, taking turns."""
    places = range(lanes)
    return [at // 8 * 8 + 4 * half + at % 8 // 2 + lanes * (at % 2) for at in places]
