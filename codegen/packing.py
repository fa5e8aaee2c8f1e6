"""How the weight of a linear kernel lies in memory: panels of output features, streamed from front to back.

``[ceil(N / panel)][ceil(K / pair)][panel][pair]``: one panel is read contiguously while K advances, so a matrix-vector
product is a pure stream, and a tile of a matrix product reads whole vectors. Features past N and a K past the end are
zero. ``pair`` is 2 for bf16, whose pairs feed vdpbf16ps and elsewhere split into two f32 with one instruction each.
"""

from dataclasses import dataclass
from typing import Self

import ml_dtypes
import numpy as np

from tilewright.codegen.text import format_call, parse_call

_STORED = {"f32": np.dtype("f4"), "f16": np.dtype("f2"), "bf16": np.dtype(ml_dtypes.bfloat16), "i8": np.dtype("i1")}


@dataclass(frozen=True)
class Packing:
    """Layout of one [n, k] weight; ``text`` is its name in artifacts and ``pack`` makes it."""

    dtype: str
    n: int
    k: int
    panel: int

    def __post_init__(self) -> None:
        if self.dtype not in _STORED:
            raise ValueError(f"cannot pack {self.dtype} weights; known: {', '.join(_STORED)}")

    @property
    def pair(self) -> int:
        """Consecutive k's that lie side by side."""
        return 2 if self.dtype == "bf16" else 1

    @property
    def panels(self) -> int:
        return -(-self.n // self.panel)

    @property
    def steps(self) -> int:
        """Pairs along K."""
        return -(-self.k // self.pair)

    @property
    def panel_size(self) -> int:
        """Elements from one panel to the next."""
        return self.steps * self.pair * self.panel

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.panels, self.steps, self.panel, self.pair

    @property
    def nbytes(self) -> int:
        return self.panels * self.panel_size * _STORED[self.dtype].itemsize

    @property
    def text(self) -> str:
        """Canonical text; ``Packing.parse`` gives an equal packing back."""
        return format_call("panels", {"dtype": self.dtype, "n": self.n, "k": self.k, "panel": self.panel})

    @classmethod
    def parse(cls, text: str) -> Self:
        name, fields = parse_call(text)
        if name != "panels" or sorted(fields) != ["dtype", "k", "n", "panel"]:
            raise ValueError(f"{text!r} is not a packing; expected panels{{dtype=... n=... k=... panel=...}}")
        return cls(fields["dtype"], int(fields["n"]), int(fields["k"]), int(fields["panel"]))

    def pack(self, weight: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The packed copy of ``weight`` [n, k], written to ``out`` (of ``shape``) when given; no other large memory."""
        stored = _STORED[self.dtype]
        if weight.shape != (self.n, self.k) or weight.dtype != stored:
            raise ValueError(f"{self.text} cannot pack {weight.dtype} {weight.shape}")
        packed = np.empty(self.shape, stored) if out is None else out
        whole = self.n // self.panel
        # Pairs and single elements move as unsigned integers: numpy copies bf16 element by element.
        unit = np.dtype(f"u{stored.itemsize}")
        source, target = weight.view(unit), packed.view(unit)
        for panel in range(self.panels):
            rows = source[panel * self.panel:(panel + 1) * self.panel]
            self._pack_panel(rows, target[panel])
            if panel >= whole:
                target[panel, :, len(rows):] = 0
        return packed

    def _pack_panel(self, rows: np.ndarray, target: np.ndarray) -> None:
        """rows [<= panel, k] -> target [steps, panel, pair]."""
        even = self.k // self.pair * self.pair
        if self.pair == 1:
            _transpose(rows, target[:, :len(rows), 0])
            return
        wide = np.dtype(f"u{rows.itemsize * self.pair}")
        pairs = np.ascontiguousarray(rows[:, :even]).view(wide)
        _transpose(pairs, target.view(wide)[:even // self.pair, :len(rows), 0])
        if even != self.k:
            target[-1, :len(rows)] = 0
            target[-1, :len(rows), 0] = rows[:, -1]

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        """The [n, k] weight back from ``pack``."""
        panels, steps, panel, pair = self.shape
        flat = packed.reshape(self.shape).transpose(0, 2, 1, 3).reshape(panels * panel, steps * pair)
        return np.ascontiguousarray(flat[:self.n, :self.k])


def _transpose(rows: np.ndarray, target: np.ndarray, block: int = 2048) -> None:
    """target[k, n] = rows[n, k], a feature at a time: long strided writes are what numpy does fastest here."""
    for start in range(0, rows.shape[1], block):
        for feature, row in enumerate(rows[:, start:start + block]):
            target[start:start + block, feature] = row
