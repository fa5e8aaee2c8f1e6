"""How the weight of a linear kernel lies in memory: panels of output features, streamed from front to back.

``[ceil(N / panel)][ceil(K / pair)][panel][pair]``: one panel is read contiguously while K advances, so a matrix-vector
product is a pure stream, and a tile of a matrix product reads whole vectors. Features past N and a K past the end are
zero. ``pair`` is how many k's of one feature lie side by side: 2 of bf16, whose pairs feed vdpbf16ps and elsewhere split
into two f32 with one instruction each; 4 codes of 8 bits or 8 of 4 bits, which feed vpdpbusd.

Codes are stored unsigned: i8 plus 128, i4 plus 8. Of eight 4-bit codes the first four are the low halves of the four
bytes and the others the high halves. ``split`` exchanges the second and the third of four bytes: then neighbours have
the same place in the two halves of 32 bits, which makes them pairs of bf16 in one instruction.

Scales and zero points [N, G] are packed like weights, with G in the place of K.
"""

from dataclasses import dataclass, fields
from typing import Self

import ml_dtypes
import numpy as np

from tilewright.codegen.text import format_call, parse_call

_DTYPES = {
    "f32": np.dtype("f4"), "f16": np.dtype("f2"), "bf16": np.dtype(ml_dtypes.bfloat16),
    "i8": np.dtype("i1"), "u8": np.dtype("u1"), "i4": np.dtype(ml_dtypes.int4), "u4": np.dtype(ml_dtypes.uint4),
}
_BIAS = {"i8": 128, "u8": 0, "i4": 8, "u4": 0}  # what makes a code unsigned
_PAIR = {"bf16": 2, "i8": 4, "i4": 8, "u4": 8}  # unless told otherwise
_UNITS = (1, 2, 4)  # bytes that can lie side by side


@dataclass(frozen=True)
class Packing:
    """Layout of one [n, k] weight; ``text`` is its name in artifacts and ``pack`` makes it. ``pair`` 0 is the usual one."""

    dtype: str
    n: int
    k: int
    panel: int
    pair: int = 0
    split: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"cannot pack {self.dtype} weights; known: {', '.join(_DTYPES)}")
        object.__setattr__(self, "pair", self.pair or _PAIR.get(self.dtype, 1))
        if self.pair * self.bits // 8 not in _UNITS or self.pair * self.bits % 8:
            raise ValueError(f"cannot pack {self.dtype} in pairs of {self.pair}: 1, 2 or 4 bytes lie side by side")
        if self.split and self._unit.itemsize * self._stored.itemsize != 4:
            raise ValueError(f"cannot split {self.dtype} in pairs of {self.pair}: that is for codes in four bytes")

    @property
    def bits(self) -> int:
        """Of one element."""
        return 4 if self.dtype in ("i4", "u4") else 8 * _DTYPES[self.dtype].itemsize

    @property
    def stored(self) -> str:
        """Element type of the packed array: u8 for codes."""
        return "u8" if self.dtype in _BIAS else self.dtype

    @property
    def panels(self) -> int:
        return -(-self.n // self.panel)

    @property
    def steps(self) -> int:
        """Pairs along K."""
        return -(-self.k // self.pair)

    @property
    def panel_size(self) -> int:
        """Stored elements from one panel to the next."""
        return self.steps * self.panel * self.shape[-1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the packed array, in stored elements."""
        return self.panels, self.steps, self.panel, self.pair * self.bits // 8 // self._stored.itemsize

    @property
    def nbytes(self) -> int:
        return self.panels * self.panel_size * self._stored.itemsize

    @property
    def text(self) -> str:
        """Canonical text; ``Packing.parse`` gives an equal packing back."""
        return format_call("panels", {field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def parse(cls, text: str) -> Self:
        name, given = parse_call(text)
        if name != "panels" or list(given) != [field.name for field in fields(cls)]:
            raise ValueError(f"{text!r} is not a packing; expected panels{{dtype= n= k= panel= pair= split=}}")
        return cls(given["dtype"], *(int(given[key]) for key in ("n", "k", "panel", "pair")), given["split"] == "true")

    def pack(self, weight: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The packed copy of ``weight`` [n, k], written to ``out`` (of ``shape``) when given; no other large memory."""
        if weight.shape != (self.n, self.k) or weight.dtype != _DTYPES[self.dtype]:
            raise ValueError(f"{self.text} cannot pack {weight.dtype} {weight.shape}")
        packed = np.empty(self.shape, self._stored) if out is None else out
        # Elements that lie side by side move as one unsigned integer: numpy copies bf16 element by element.
        source = weight.view(f"u{weight.dtype.itemsize}")
        target = packed.view(self._stored).reshape(*self.shape[:2], -1).view(self._unit)
        for panel in range(self.panels):
            rows = source[panel * self.panel:(panel + 1) * self.panel]
            _transpose(self._units(rows), target[panel, :, :len(rows)])
            target[panel, :, len(rows):] = 0
        return packed

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        """The [n, k] weight back from ``pack``."""
        flat = packed.view(self._stored).reshape(self.shape).transpose(0, 2, 1, 3).reshape(self.panels * self.panel, -1)
        rows = self._exchange(np.ascontiguousarray(flat[:self.n]))
        if self.bits == 4:
            quads = rows.reshape(self.n, self.steps, 1, 4)
            rows = np.concatenate([quads & 15, quads >> 4], 2).reshape(self.n, -1)
        rows = np.ascontiguousarray(rows[:, :self.k])
        if bias := _BIAS.get(self.dtype):
            signed = (rows.astype(np.int16) - bias).astype(np.int8)
            return signed.astype(_DTYPES[self.dtype])
        return rows.view(_DTYPES[self.dtype])

    @property
    def _stored(self) -> np.dtype:
        return _DTYPES[self.stored]

    @property
    def _unit(self) -> np.dtype:
        """The unsigned integer of one feature and one step."""
        return np.dtype(f"u{self.pair * self.bits // 8}")

    def _units(self, rows: np.ndarray) -> np.ndarray:
        """Unsigned elements [features, k] -> units [features, steps]."""
        if self.bits == 4:
            rows = rows & 15
        if bias := _BIAS.get(self.dtype):
            rows = rows ^ np.uint8(bias)
        if self.pair > 1 and self.k % self.pair:
            rows = np.pad(rows, ((0, 0), (0, -self.k % self.pair)))
        if self.bits == 4:
            halves = rows.reshape(len(rows), self.steps, 2, 4)
            rows = (halves[:, :, 0] | halves[:, :, 1] << np.uint8(4)).reshape(len(rows), -1)
        return self._exchange(np.ascontiguousarray(rows)).view(self._unit)

    def _exchange(self, rows: np.ndarray) -> np.ndarray:
        """Bytes [features, 4 * steps], the second and third of four exchanged where the layout has it so."""
        if not self.split:
            return rows
        return np.ascontiguousarray(rows.reshape(len(rows), -1, 4)[:, :, [0, 2, 1, 3]]).reshape(len(rows), -1)


def _transpose(rows: np.ndarray, target: np.ndarray, block: int = 2048) -> None:
    """target[k, n] = rows[n, k], a feature at a time: long strided writes are what numpy does fastest here."""
    for start in range(0, rows.shape[1], block):
        for feature, row in enumerate(rows[:, start:start + block]):
            target[start:start + block, feature] = row
