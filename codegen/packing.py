"""How the weight of a linear kernel lies in memory: panels of output features, streamed from front to back.

``[ceil(N / panel)][ceil(K / pair)][panel][pair]``: one panel is read contiguously while K advances, so a matrix-vector
product is a pure stream, and a tile of a matrix product reads whole vectors. Features past N and a K past the end are
zero. ``pair`` is how many k's of one feature lie side by side: 2 of bf16, whose pairs feed vdpbf16ps and elsewhere split
into two f32 with one instruction each; as many codes as four bytes hold, which feed vpdpbusd.

Codes are stored unsigned: i8 plus 128, i4 plus 8, i3 plus 4, i2 plus 2; floats of 8 and 4 bits as their bits. Of codes of
4 or 2 bits the first four lie in the lowest bits of the four bytes, the next four above them, and so on: a shift and a
mask give four of them. Codes of 3 bits are cut in two: 32 of them fill two times four bytes with their two lower bits,
and another four bytes, in the same manner, with their highest; ``[panel][4 bytes]`` of the first, the second, the third.
``split`` exchanges the second and the third of four bytes: then neighbours have the same place in the two halves of 32
bits, which makes them pairs of bf16 in one instruction.

Scales and zero points [N, G] are packed like weights, with G in the place of K.
"""

from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from tilewright.codegen.column_packing import ColumnPacking, turn
from tilewright.codegen.text import format_call, parse_call
from tilewright.ir import CodegenError, DType

_FLOATS = ("f32", "f16", "bf16")
_BIAS = {"i8": 128, "i4": 8, "i3": 4, "i2": 2}  # what makes a code unsigned
_CODES = (*_BIAS, "u8", "u4", "u3", "u2", "f8e4m3", "f8e5m2", "f4e2m1")
_KNOWN = (*_FLOATS, *_CODES, "f8e8m0", "i32", "i16")
_UNITS = (1, 2, 4)  # bytes that can lie side by side


def code_planes(bits: int) -> tuple[int, ...]:
    """Bits of the parts that codes of ``bits`` are stored in, the lowest first."""
    return (2, 1) if bits == 3 else (bits,)


def code_pair(bits: int) -> int:
    """Codes of one feature that lie side by side."""
    return 32 // min(code_planes(bits))


@dataclass(frozen=True)
class Packing:
    """Layout of one [n, k] weight; ``text`` is its name in artifacts and ``pack`` makes it. ``pair`` 0 is the usual one.

    Where ``most`` is given, kernels count on no element being larger.
    """

    dtype: str
    n: int
    k: int
    panel: int
    pair: int = 0
    split: bool = False
    most: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in _KNOWN:
            raise ValueError(f"cannot pack {self.dtype} weights; known: {', '.join(_KNOWN)}")
        object.__setattr__(self, "pair", self.pair or self._usual_pair)
        fits = self.pair == self._usual_pair if self.bits < 8 else self.pair * self.bits // 8 in _UNITS
        if not fits:
            raise ValueError(f"cannot pack {self.dtype} in pairs of {self.pair}: 1, 2 or 4 bytes lie side by side")
        if self.split and (self._unit.itemsize != 4 or self.stored != "u8"):
            raise ValueError(f"cannot split {self.dtype} in pairs of {self.pair}: that is for codes in four bytes")

    @property
    def bits(self) -> int:
        """Of one element."""
        return DType(self.dtype).bits

    @property
    def stored(self) -> str:
        """Element type of the packed array: u8 for all but floats of 16 and 32 bits."""
        return self.dtype if self.dtype in _FLOATS else "u8"

    @property
    def words(self) -> int:
        """Units of one feature and step: 3 with codes of 3 bits, else 1."""
        return 3 if self.bits == 3 else 1

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
        return self.steps * self.words * self.panel * self.shape[-1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the packed array, in stored elements."""
        return self.panels, self.steps * self.words, self.panel, self._unit.itemsize // self._stored.itemsize

    @property
    def nbytes(self) -> int:
        return self.panels * self.panel_size * self._stored.itemsize

    @property
    def text(self) -> str:
        """Canonical text; ``Packing.parse`` gives an equal packing back."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return format_call("panels", {key: value for key, value in given.items() if key != "most" or value})

    @classmethod
    def parse(cls, text: str) -> Self:
        name, given = parse_call(text)
        if name != "panels" or [*given, "most"][:7] != [field.name for field in fields(cls)]:
            raise ValueError(f"{text!r} is not a packing; expected panels{{dtype= n= k= panel= pair= split=}}")
        return cls(given["dtype"], *(int(given[key]) for key in ("n", "k", "panel", "pair")), given["split"] == "true",
                   int(given.get("most", 0)))

    def pack(self, weight: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The packed copy of ``weight`` [n, k], written to ``out`` (of ``shape``) when given; no other large memory."""
        if weight.shape != (self.n, self.k) or weight.dtype != DType(self.dtype).np:
            raise ValueError(f"{self.text} cannot pack {weight.dtype} {weight.shape}")
        if self.most and int(weight.max(initial=0)) > self.most:
            raise CodegenError(f"a step of {weight.max()} in {self.text}: kernels expand codes by steps of at most "
                               f"{self.most}, which two-level schemes of this project keep to")
        packed = np.empty(self.shape, self._stored) if out is None else out
        # Elements that lie side by side move as one unsigned integer: numpy copies bf16 element by element.
        source = weight.view(f"u{weight.dtype.itemsize}")
        target = packed.view(self._stored).reshape(*self.shape[:2], -1).view(self._unit)
        for panel in range(self.panels):
            rows = source[panel * self.panel:(panel + 1) * self.panel]
            turn(self._units(rows), target[panel, :, :len(rows)])
            target[panel, :, len(rows):] = 0
        return packed

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        """The [n, k] weight back from ``pack``."""
        kind = DType(self.dtype).np
        flat = packed.view(self._stored).reshape(self.shape).transpose(0, 2, 1, 3).reshape(self.panels * self.panel, -1)
        rows = self._exchange(np.ascontiguousarray(flat[:self.n]))
        if self.bits < 8:
            rows = self._codes(rows)
        rows = np.ascontiguousarray(rows[:, :self.k])
        if bias := _BIAS.get(self.dtype):
            return (rows.astype(np.int16) - bias).astype(np.int8).astype(kind)
        return rows.view(kind)

    @property
    def _stored(self) -> np.dtype:
        return DType(self.stored).np

    @property
    def _usual_pair(self) -> int:
        if self.dtype in _CODES and self.dtype != "u8":  # u8 are zero points more often than weights
            return code_pair(self.bits)
        return 2 if self.dtype == "bf16" else 1

    @property
    def _unit(self) -> np.dtype:
        """The unsigned integer of one feature and one step, or of a third of it."""
        return np.dtype(f"u{4 if self.bits == 3 else self.pair * self.bits // 8}")

    def _units(self, rows: np.ndarray) -> np.ndarray:
        """Unsigned elements [features, k] -> units [features, steps * words]."""
        if self.bits < 8:
            rows = rows & np.uint8((1 << self.bits) - 1)
        if bias := _BIAS.get(self.dtype):
            rows = rows ^ np.uint8(bias)
        if self.pair > 1 and self.k % self.pair:
            rows = np.pad(rows, ((0, 0), (0, -self.k % self.pair)))
        if self.bits < 8:
            rows = self._bytes(rows)
        return self._exchange(np.ascontiguousarray(rows)).view(self._unit)

    def _bytes(self, rows: np.ndarray) -> np.ndarray:
        """Codes [features, steps * pair] -> bytes [features, steps * words * 4]."""
        parts, shift = [], 0
        for bits in code_planes(self.bits):
            plane = (rows >> np.uint8(shift)) & np.uint8((1 << bits) - 1)
            quads = plane.reshape(len(rows), self.steps, -1, 8 // bits, 4)
            shifts = (bits * np.arange(8 // bits)).astype(np.uint8)[:, None]
            parts.append(np.bitwise_or.reduce(quads << shifts, 3))
            shift += bits
        return np.concatenate(parts, 2).reshape(len(rows), -1)

    def _codes(self, rows: np.ndarray) -> np.ndarray:
        """The inverse of ``_bytes``."""
        words = rows.reshape(len(rows), self.steps, self.words, 1, 4)
        codes, shift, at = np.zeros((len(rows), self.steps, self.pair), np.uint8), 0, 0
        for bits in code_planes(self.bits):
            count = self.pair * bits // 32
            shifts = (bits * np.arange(8 // bits)).astype(np.uint8)[:, None]
            plane = (words[:, :, at:at + count] >> shifts) & np.uint8((1 << bits) - 1)
            codes |= plane.reshape(codes.shape) << np.uint8(shift)
            shift, at = shift + bits, at + count
        return codes.reshape(len(rows), -1)

    def _exchange(self, rows: np.ndarray) -> np.ndarray:
        """Bytes [features, 4 * units], the second and third of four exchanged where the layout has it so."""
        if not self.split:
            return rows
        return np.ascontiguousarray(rows.reshape(len(rows), -1, 4)[:, :, [0, 2, 1, 3]]).reshape(len(rows), -1)


@dataclass(frozen=True)
class RowPacking:
    """Layout of [n, k] codes row by row, of 4 bits or fewer, for rows that vectors run along.

    A row is blocks of ``lanes`` words of four bytes, in which neighbouring k's lie in neighbouring words: the first codes
    of all words, then the second, and so on; codes of 3 bits fill three times as many words, as in `Packing`. Rows past N,
    up to a multiple of ``panel``, and k's past the end are zero.
    """

    dtype: str
    n: int
    k: int
    panel: int
    lanes: int

    @property
    def bits(self) -> int:
        """Of one element."""
        return DType(self.dtype).bits

    @property
    def stored(self) -> str:
        """Element type of the packed array."""
        return "u8"

    @property
    def panels(self) -> int:
        return -(-self.n // self.panel)

    @property
    def block(self) -> int:
        """k's of a block."""
        return code_pair(self.bits) * self.lanes

    @property
    def row_size(self) -> int:
        """Bytes from one row to the next."""
        return -(-self.k // self.block) * self.block * self.bits // 8

    @property
    def panel_size(self) -> int:
        """Bytes from one panel to the next."""
        return self.panel * self.row_size

    @property
    def shape(self) -> tuple[int, int]:
        """Of the packed array."""
        return self.panels * self.panel, self.row_size

    @property
    def nbytes(self) -> int:
        return self.panels * self.panel_size

    @property
    def text(self) -> str:
        """Canonical text; ``parse_packing`` gives an equal packing back."""
        return format_call("rows", {field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def parse(cls, text: str) -> Self:
        name, given = parse_call(text)
        if name != "rows" or list(given) != [field.name for field in fields(cls)]:
            raise ValueError(f"{text!r} is not a packing; expected rows{{dtype= n= k= panel= lanes=}}")
        return cls(given["dtype"], *(int(given[key]) for key in ("n", "k", "panel", "lanes")))

    def pack(self, weight: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The packed copy of ``weight`` [n, k], written to ``out`` (of ``shape``) when given."""
        if weight.shape != (self.n, self.k) or weight.dtype != DType(self.dtype).np:
            raise ValueError(f"{self.text} cannot pack {weight.dtype} {weight.shape}")
        packed = np.zeros(self.shape, np.uint8) if out is None else out
        packed[self.n:] = 0
        pair, blocks = code_pair(self.bits), -(-self.k // self.block)
        words = Packing(self.dtype, self.lanes, blocks * pair, self.lanes)  # a row is the panel of ``lanes`` features
        for row, target in zip(weight, packed):
            wide = np.zeros(blocks * self.block, weight.dtype)
            wide[:self.k] = row
            spread = wide.reshape(blocks, pair, self.lanes).transpose(2, 0, 1).reshape(self.lanes, -1)
            words.pack(np.ascontiguousarray(spread), target.reshape(words.shape))
        return packed


AnyPacking = Packing | RowPacking | ColumnPacking


def parse_packing(text: str) -> AnyPacking:
    """The layout that ``text`` names. Raises ValueError."""
    kinds: dict[str, type[RowPacking | ColumnPacking]] = {"rows": RowPacking, "columns": ColumnPacking}
    return kinds.get(text.partition("{")[0], Packing).parse(text)
