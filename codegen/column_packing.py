"""How the weight of a linear kernel lies in memory that leaves out inputs: what belongs to one input is one piece.

``[ceil(N / panel)][K][panel]``: the weights of one k for a whole panel of output features, so wide that fetching one piece
and not the next is worth while. Features past N are zero. Where a piece is a multiple of 2 KiB, 64 bytes lie between it and
the next: else the same features of many k's would share few places of a cache.

Codes keep their sign. They are reordered within each 64 bytes, so that instructions that work on four blocks of 16 bytes
make vectors of neighbouring features. i8: byte ``16 q + 4 t + i`` is feature ``16 t + 4 q + i``. i4: the lower and the upper
half of byte ``16 q + 8 h + 2 i + b`` are features ``64 h + 32 b + 4 q + i`` and that plus 16.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from tilewright.codegen.text import format_call, parse_call
from tilewright.ir import DType

_FLOATS = ("f32", "f16", "bf16")
_CODES = ("i8", "i4")
LINES = {"f32": 16, "f16": 32, "bf16": 32, "i8": 64, "i4": 128}
"""Features of 64 bytes."""


@dataclass(frozen=True)
class ColumnPacking:
    """Layout of one [n, k] weight; ``text`` is its name in artifacts and ``pack`` makes it."""

    dtype: str
    n: int
    k: int
    panel: int

    def __post_init__(self) -> None:
        if self.dtype not in (*_FLOATS, *_CODES):
            raise ValueError(f"cannot pack {self.dtype} weights in columns; known: {', '.join((*_FLOATS, *_CODES))}")
        if self.panel % LINES[self.dtype]:
            raise ValueError(f"panels of {self.dtype} have multiples of {LINES[self.dtype]} features, not {self.panel}")

    @property
    def stored(self) -> str:
        """Element type of the packed array."""
        return self.dtype if self.dtype in _FLOATS else "u8"

    @property
    def panels(self) -> int:
        return -(-self.n // self.panel)

    @property
    def row(self) -> int:
        """Stored elements from one k to the next."""
        line = 64 // DType(self.stored).np.itemsize
        lines = self.panel // LINES[self.dtype]
        return (lines + (lines % 32 == 0)) * line

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the packed array, in stored elements."""
        return self.panels, self.k, self.row

    @property
    def nbytes(self) -> int:
        return self.panels * self.k * self.row * DType(self.stored).np.itemsize

    @property
    def text(self) -> str:
        """Canonical text; ``parse`` gives an equal packing back."""
        return format_call("columns", {field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def parse(cls, text: str) -> Self:
        name, given = parse_call(text)
        if name != "columns" or list(given) != [field.name for field in fields(cls)]:
            raise ValueError(f"{text!r} is not a packing; expected columns{{dtype= n= k= panel=}}")
        return cls(given["dtype"], *(int(given[key]) for key in ("n", "k", "panel")))

    def pack(self, weight: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The packed copy of ``weight`` [n, k], written to ``out`` (of ``shape``) when given."""
        if weight.shape != (self.n, self.k) or weight.dtype != DType(self.dtype).np:
            raise ValueError(f"{self.text} cannot pack {weight.dtype} {weight.shape}")
        packed = np.empty(self.shape, DType(self.stored).np) if out is None else out
        # Elements move as unsigned integers: numpy copies bf16 element by element.
        source, target = (array.view(f"u{array.dtype.itemsize}") for array in (weight, packed))
        for panel, columns in enumerate(target):
            rows = source[panel * self.panel : (panel + 1) * self.panel]
            rows = _bytes(rows, LINES[self.dtype]) if self.dtype in _CODES else rows
            turn(rows, columns[:, : len(rows)])
            columns[:, len(rows) :] = 0
        return packed


def _bytes(rows: np.ndarray, line: int) -> np.ndarray:
    """Codes [features, k] -> bytes of whole lines, a k a column."""
    padded, k = np.pad(rows.view(np.uint8), ((0, -len(rows) % line), (0, 0))), rows.shape[1]
    if line == LINES["i8"]:
        return padded.reshape(-1, 4, 4, 4, k).transpose(0, 2, 1, 3, 4).reshape(-1, k)
    low, high = padded.reshape(-1, 2, 2, 2, 4, 4, k).transpose(3, 0, 4, 1, 5, 2, 6)
    return (low & np.uint8(15) | high << np.uint8(4)).reshape(-1, k)


def turn(rows: np.ndarray, target: np.ndarray, block: int = 2048) -> None:
    """target[k, n] = rows[n, k], a feature at a time: long strided writes are what numpy does fastest here."""
    for start in range(0, rows.shape[1], block):
        for feature, row in enumerate(rows[:, start : start + block]):
            target[start : start + block, feature] = row
