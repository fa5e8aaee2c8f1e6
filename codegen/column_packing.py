"""How the weight of a linear kernel lies in memory that leaves out inputs: what belongs to one input is one piece.

``[ceil(N / panel)][K][panel]``: the weights of one k for a whole panel of output features, so wide that fetching one piece
and not the next is worth while. Two codes of four bits share a byte: of 32 features the first 16 have the lower halves.
Codes keep their sign. Features past N are zero.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from tilewright.codegen.text import format_call, parse_call
from tilewright.ir import DType

_FLOATS = ("f32", "f16", "bf16")
_CODES = ("i8", "i4")
UNIT = 32
"""Features whose codes of four bits lie together."""


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
        if self.panel % UNIT:
            raise ValueError(f"columns are panels of multiples of {UNIT} features, not {self.panel}")

    @property
    def stored(self) -> str:
        """Element type of the packed array."""
        return self.dtype if self.dtype in _FLOATS else "u8"

    @property
    def panels(self) -> int:
        return -(-self.n // self.panel)

    @property
    def row(self) -> int:
        """Stored elements of one k."""
        return self.panel // 2 if self.dtype == "i4" else self.panel

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
            rows = _halves(rows) if self.dtype == "i4" else rows
            turn(rows, columns[:, : len(rows)])
            columns[:, len(rows) :] = 0
        return packed


def _halves(rows: np.ndarray) -> np.ndarray:
    """Codes of four bits [features, k] -> bytes [features / 2, k]."""
    units = np.pad(rows.view(np.uint8), ((0, -len(rows) % UNIT), (0, 0))).reshape(-1, 2, UNIT // 2, rows.shape[1])
    return (units[:, 0] & np.uint8(15) | units[:, 1] << np.uint8(4)).reshape(-1, rows.shape[1])


def turn(rows: np.ndarray, target: np.ndarray, block: int = 2048) -> None:
    """target[k, n] = rows[n, k], a feature at a time: long strided writes are what numpy does fastest here."""
    for start in range(0, rows.shape[1], block):
        for feature, row in enumerate(rows[:, start : start + block]):
            target[start : start + block, feature] = row
