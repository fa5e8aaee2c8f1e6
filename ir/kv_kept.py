"""The layout of a cache that keeps some tokens of a text and lets the others go."""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.ir.dtypes import DType

NOTES = 2
"""Numbers (f32) beside each slot of each head: what the token there is worth, and its position."""
_STEP = 64


@dataclass(frozen=True)
class Kept:
    """``budget`` tokens of a sequence, which ``kv.retain`` chooses, in any order, and behind them a call's own.

    The tokens of a call from position p on lie in the slots from ``min(p, budget)`` on; a call appends at most ``chunk``.
    """

    budget: int
    chunk: int

    def __post_init__(self) -> None:
        if self.budget < 1 or self.chunk < 1:
            raise ValueError(f"budget and chunk of kept tokens are positive, got {self}")

    def __str__(self) -> str:
        return f"kept<{self.budget}, {self.chunk}>"

    @property
    def size(self) -> int:
        """All slots of a sequence."""
        return -(-(self.budget + self.chunk) // _STEP) * _STEP

    def check(self, dtype: DType, length: int) -> None:
        """Raises ValueError for what is not stored so: codes, and texts that fit."""
        if not dtype.is_float:
            raise ValueError(f"kept tokens are floats, not {dtype.value}: they move between slots one by one")
        if length < self.budget + self.chunk:
            most = self.budget + self.chunk
            raise ValueError(f"{most} slots for {length} positions leave no choice: give contiguous")
