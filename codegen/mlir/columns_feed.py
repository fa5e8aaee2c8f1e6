"""Weights of one input for many features, as f32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tilewright.codegen.column_packing import UNIT
from tilewright.codegen.mlir.builder import Buffer
from tilewright.codegen.mlir.value import Val
from tilewright.ir import DType


@dataclass(frozen=True)
class ColumnFeed:
    """``weight``: element type; ``lanes`` of a vector of f32."""

    weight: str
    lanes: int

    @property
    def unit(self) -> int:
        """Features that are loaded together."""
        return UNIT if self.weight == "i4" else self.lanes

    def elements(self, features: int) -> int:
        """Stored elements of so many features."""
        return features * DType(self.weight).bits // 8 if self.weight in ("i8", "i4") else features

    def numbers(self, w: Buffer, place: Val) -> list[Val]:
        """The weights of ``unit`` features at ``place``, a vector after the other."""
        if self.weight == "i4":
            starts = range(0, UNIT // 2, self.lanes)
            codes = [w.load(place + start, self.lanes).to("i32") for start in starts]
            return [((code << left) >> 28).to("f32") for left in (28, 24) for code in codes]
        loaded = w.load(place, self.lanes)
        return [(loaded.bitcast("i8") if self.weight == "i8" else loaded).to("f32")]

    def all_numbers(self, w: Buffer, place: Val, features: int) -> Iterator[Val]:
        """The weights of so many features."""
        for start in range(0, features, self.unit):
            yield from self.numbers(w, place + self.elements(start))
