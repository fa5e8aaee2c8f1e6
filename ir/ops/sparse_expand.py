"""``sparse.expand``: weights of which only what is not zero is stored, and a mask of bits that says where it belongs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.ir.core import Env, Op, Value
from tilewright.ir.ops.shapes import expect_dim, expect_rank
from tilewright.ir.types import DType, TensorType, Type

ROWS = 16
"""Of a block."""
SEGMENT = 64
"""Steps of a block after which ``starts`` says anew where the values are."""
SPARE = 64
"""Bytes behind the last value, so that a vector of them can always be read."""
STORED = (DType.f32, DType.bf16, DType.f16, DType.i8, DType.f8e4m3, DType.f8e5m2, DType.i4, DType.f4e2m1)
"""Element types that weights may have."""
_SPLIT = [0, 2, 1, 3]
_BLOCKS_AT_ONCE = 64


@dataclass(frozen=True)
class MaskLayout:
    """How weights of ``dtype`` lie in steps of 16 rows, and for how many neighbours along K (``unit``) a bit stands.

    A step is 32 bits of each row: one f32, two bf16, four codes of 8 bits, eight of 4 bits; or 16 bits, one f16. A bit of
    the mask is one number, or all that a row has in a step (a word). Single codes of 4 bits come in steps of four, padded
    with a zero when their count is odd; their steps are even in number. ``split``: the second and third of four bytes are
    exchanged (see codegen/packing.py).
    """

    dtype: DType
    unit: int
    split: bool = False

    @property
    def refusal(self) -> str | None:
        """Why there is no such layout."""
        if self.dtype not in STORED:
            return f"dtype is {self.dtype.value}; there are {', '.join(d.value for d in STORED)}"
        if self.unit not in self.units(self.dtype):
            return f"unit is {self.unit}; of {self.dtype.value} it is {' or '.join(map(str, self.units(self.dtype)))}"
        return "split is for codes in four bytes" if self.split and self.dtype.bits > 8 else None

    @staticmethod
    def units(dtype: DType) -> tuple[int, ...]:
        """What ``unit`` may be: a number, or a word."""
        word = 1 if dtype is DType.f16 else 32 // dtype.bits
        return (1, word) if word > 1 else (1,)

    @property
    def nibbles(self) -> bool:
        """Whether values are single codes of 4 bits."""
        return self.dtype.bits == 4 and self.unit == 1

    @property
    def pair(self) -> int:
        """k's of a step."""
        return 4 if self.nibbles else max(self.units(self.dtype))

    @property
    def bits(self) -> int:
        """Of the mask of a step."""
        return ROWS * self.pair // self.unit

    @property
    def mask(self) -> DType:
        return DType(f"i{self.bits}")

    @property
    def stored(self) -> DType:
        """Element type of the values: bytes of integers and of two codes of 4 bits, else that of the weight."""
        return DType.u8 if self.dtype.bits == 4 or self.dtype is DType.i8 else self.dtype

    @property
    def bias(self) -> int:
        """What makes bytes of integers unsigned, as kernels want them: their highest bits flip."""
        return {DType.i8: 0x80, DType.i4: 0x08 if self.nibbles else 0x88}.get(self.dtype, 0)

    @property
    def size(self) -> int:
        """Elements of the values that a bit brings; 1 with single codes of 4 bits, of which two share a byte."""
        return 4 if self.dtype.bits == 4 and self.unit > 1 else self.unit

    @property
    def spare(self) -> int:
        """Elements of the values behind the last one."""
        return SPARE // self.stored.size

    def steps(self, columns: int) -> int:
        """Steps of a block; with single codes of 4 bits an even number."""
        return -(-columns // 8) * 2 if self.nibbles else -(-columns // self.pair)

    def advance(self, counts: Any) -> Any:
        """Elements of the values that steps with so many bits take."""
        return -(-counts // 2) if self.nibbles else counts * self.size

    def count(self, weight: Any) -> int:
        """Elements of the values that ``weight`` ``[rows, columns]`` takes, without spare ones."""
        raw = np.ascontiguousarray(weight).view(f"u{self.dtype.size}")
        if self.unit == 1 and not self.nibbles:
            return int(np.count_nonzero(raw))
        total, rows, wide = 0, ROWS * _BLOCKS_AT_ONCE, self.steps(weight.shape[1]) * self.pair
        for start in range(0, len(raw), rows):
            part = raw[start : start + rows] != 0
            part = np.pad(part, ((0, -len(part) % ROWS), (0, wide - part.shape[1])))
            part = part.reshape(-1, ROWS, wide // self.pair, self.pair)
            counts = part.sum((1, 3)) if self.nibbles else part.any(3)
            total += int(self.advance(counts).sum())
        return total

    def types(self, rows: int, columns: int, room: int) -> tuple[TensorType, TensorType, TensorType]:
        """Of values (``room`` and the spare ones), mask and starts."""
        blocks, steps = -(-rows // ROWS), self.steps(columns)
        return (TensorType((room + self.spare,), self.stored), TensorType((blocks, steps), self.mask),
                TensorType((blocks, -(-steps // SEGMENT)), DType.i32))  # fmt: skip

    def store(self, weight: Any, room: int) -> tuple[Any, Any, Any]:
        """Values (with place for ``room`` and the spare ones), mask and starts of ``weight`` ``[rows, columns]``."""
        rows, columns = weight.shape
        types, end = self.types(rows, columns, room), 0
        values, mask, starts = (np.zeros(tuple(map(int, t.shape)), t.dtype.np) for t in types)
        for first, flags, units in self.blocks(weight):
            here = slice(first, first + len(flags))
            packed = np.packbits(flags, axis=-1, bitorder="little")
            mask[here] = np.ascontiguousarray(packed).view(self.mask.np)[..., 0]
            sizes = self.advance(_counts(mask[here]))
            ends = end + np.cumsum(sizes).reshape(sizes.shape)
            starts[here] = (ends - sizes)[:, ::SEGMENT]
            found = self._biased(units[flags]).reshape(-1)
            found = self._paired(flags, found) if self.nibbles else found
            values[end : end + len(found)] = found
            end += len(found)
        return values, mask, starts

    def blocks(self, weight: Any) -> Iterator[tuple[int, Any, Any]]:
        """Some blocks of rows at a time: the first, which bits are set ``[blocks, steps, bits]``, elements of each bit."""
        rows = ROWS * _BLOCKS_AT_ONCE
        for start in range(0, len(weight), rows):
            part = np.ascontiguousarray(weight[start : start + rows])
            wide = self.steps(part.shape[1]) * self.pair
            units = self._units(np.pad(part, ((0, -len(part) % ROWS), (0, wide - part.shape[1]))))
            raw = units.view(f"u{units.dtype.itemsize}")  # the bits: a negative zero is stored
            yield start // ROWS, (raw != 0).any(3) if self.size > 1 else raw[..., 0] != 0, units

    def _units(self, weight: Any) -> Any:
        """Whole blocks and steps -> ``[blocks, steps, bits, size]`` of ``stored``."""
        cut = weight.reshape(len(weight) // ROWS, ROWS, -1, self.pair).transpose(0, 2, 1, 3)
        if self.stored is DType.u8:
            cut = np.ascontiguousarray(cut).view(np.uint8) & np.uint8((1 << self.dtype.bits) - 1)
        if self.dtype.bits == 4 and not self.nibbles:
            cut = cut[..., :4] | cut[..., 4:] << np.uint8(4)
        cut = cut[..., _SPLIT] if self.split else cut
        return np.ascontiguousarray(cut).reshape(*cut.shape[:2], self.bits, self.size)

    def _biased(self, values: Any) -> Any:
        return values ^ np.uint8(self.bias) if self.bias else values

    def _paired(self, flags: Any, found: Any) -> Any:
        """Bytes of two of the codes ``found``, those of a step together."""
        counts = flags.sum(2).reshape(-1)
        places = 2 * np.repeat(np.cumsum(self.advance(counts)) - self.advance(counts), counts) + _ranks(counts)
        codes = np.zeros(2 * int(self.advance(counts).sum()), np.uint8)
        codes[places] = found
        return codes[::2] | codes[1::2] << np.uint8(4)

    def expand(self, values: Any, mask: Any, starts: Any, rows: int, columns: int) -> Any:
        """The weight ``[rows, columns]`` again."""
        bits = np.ascontiguousarray(mask)[..., None].view(np.uint8)
        flags = np.unpackbits(bits, axis=-1, bitorder="little").astype(bool)
        counts = _counts(mask)
        sizes = self.advance(counts)
        before = np.cumsum(sizes, 1) - sizes
        base = np.repeat(starts.astype(np.int64) - before[:, ::SEGMENT], SEGMENT, 1)[:, : sizes.shape[1]] + before
        base, ranks = np.repeat(base.reshape(-1), counts.reshape(-1)), _ranks(counts.reshape(-1))
        units = np.zeros((*flags.shape, self.size), self.stored.np)
        if self.nibbles:
            codes = values[base + ranks // 2] >> (4 * (ranks % 2)).astype(np.uint8) & np.uint8(15)
            units[flags, 0] = self._biased(codes)
        else:
            units[flags] = self._biased(values[base[:, None] + self.size * ranks[:, None] + np.arange(self.size)])
        return np.ascontiguousarray(self._weight(units)[:rows, :columns])

    def _weight(self, units: Any) -> Any:
        """What ``_units`` was given."""
        blocks, steps = units.shape[:2]
        cut = units.reshape(blocks, steps, ROWS, -1)
        cut = cut[..., _SPLIT] if self.split else cut
        if self.dtype.bits == 4 and not self.nibbles:
            cut = np.concatenate([cut & np.uint8(15), cut >> np.uint8(4)], 3)
        if self.dtype is DType.i4:
            cut = ((cut ^ np.uint8(8)).astype(np.int8) - np.int8(8)).astype(DType.i4.np)
        weight = cut.transpose(0, 2, 1, 3).reshape(blocks * ROWS, steps * self.pair)
        return np.ascontiguousarray(weight).view(self.dtype.np)


def _counts(mask: Any) -> Any:
    """How many bits of each step are set."""
    return np.bitwise_count(mask.view(f"u{mask.itemsize}")).astype(np.int64)


def _ranks(counts: Any) -> Any:
    """0, 1, ... up to each of ``counts``, one after the other."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


class SparseExpand(Op):
    """A weight ``[rows, columns]`` of ``dtype`` from its ``values`` and a ``mask`` of where they belong; 0 elsewhere.

    Blocks are 16 rows; a step is 32 bits of each row: one f32, two bf16, four numbers of 8 bits, eight of 4 bits (of f16:
    one). A bit of ``mask`` ``[N / 16, steps]`` (i16, i32, i64) stands for ``unit`` neighbours along K: 1, or a whole word
    of 32 bits. Bits and values run step by step, row by row, then as the word lies in memory (``split`` with the second and
    third of its bytes exchanged); words of 4 bits have the first four codes in the lower halves of four bytes. ``values``
    (u8 for integers, whose highest bits are flipped, and for two codes of 4 bits) end in 64 spare bytes. With ``unit=1`` a
    step of 4 bits is four codes of each row, and starts at a byte; steps are even in number. ``starts``
    ``[N / 16, steps / 64]`` (i32) are the places of the values of every 64th step. The idea is that of Flash-LLM
    (arXiv:2309.10285): load as sparse, compute as dense.
    """

    name = "sparse.expand"
    values: Value
    mask: Value
    starts: Value
    rows: int
    columns: int
    dtype: DType
    unit: int = 1
    split: bool = False

    @property
    def layout(self) -> MaskLayout:
        return MaskLayout(self.dtype, self.unit, self.split)

    def infer(self) -> tuple[Type, ...]:
        self.expect(self.rows > 0 and self.columns > 0, f"rows are {self.rows}, columns {self.columns}")
        if reason := self.layout.refusal:
            self.fail(reason)
        types = self.layout.types(self.rows, self.columns, 0)
        for name, value, want in zip(("values", "mask", "starts"), self.operands, types):
            self.expect(value.dtype is want.dtype, f"{name} is {value.dtype.value}, not {want.dtype.value}")
            expect_rank(self, name, value.shape, len(want.shape))
            for axis, size in enumerate(want.shape if name != "values" else ()):
                expect_dim(self, f"{name}, axis {axis}", value.shape[axis], size)
        count = self.values.shape[0]
        self.expect(isinstance(count, int) and count >= self.layout.spare, "values end in 64 spare bytes")
        return (TensorType((self.rows, self.columns), self.dtype),)

    def evaluate(self, env: Env, values: Any, mask: Any, starts: Any) -> Any:
        return self.layout.expand(values, mask, starts, self.rows, self.columns)
