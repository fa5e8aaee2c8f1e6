"""bf16 weights in fewer bytes, bit for bit: exponents differ little, so most take three bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tilewright.ir.core import Env, Op, Value
from tilewright.ir.ops.shapes import expect_dim, expect_rank
from tilewright.ir.types import DType, TensorType, Type

ROWS, COLUMNS = 16, 4
"""Of a block: 64 numbers."""
SHAPE, ORDER = (4, 4, 2, 2), (0, 2, 1, 3)
"""Of the numbers of a block, rows then columns: how their axes are cut, and in which order they lie."""
WINDOW = 7
"""Exponents that have a code of three bits; the last code stands for any other."""
SPARE = 64
"""Bytes behind the last escape, so that a vector of them can always be read."""


class Decompress(Op):
    """``[rows, columns]`` of bf16 from sign and mantissa, three bits of exponent, and the exponents that need more.

    As DFloat11 (arXiv:2504.11651) with a code of fixed length, which vectors decode. Blocks are 16 rows by four columns, 64
    numbers in the order in which vectors of bytes become those of bf16: four rows, and of these two columns after two.
    ``low`` ``[N / 16, K / 4, 64]`` (u8): the sign and seven bits of mantissa. ``planes`` ``[N / 16, K / 4, 3]`` (i64): bit
    i of plane j is bit j of the i-th number's code. A code below 7 is the exponent less ``base`` (u8, one number); 7 says
    that the exponent is the next of ``escapes`` (u8), which for each 16 rows begin at ``starts`` ``[N / 16]`` (i32).
    """

    name = "quant.decompress"
    low: Value
    planes: Value
    escapes: Value
    starts: Value
    base: Value
    rows: int
    columns: int

    def infer(self) -> tuple[Type, ...]:
        blocks, steps = -(-self.rows // ROWS), -(-self.columns // COLUMNS)
        self.expect(self.rows > 0 and self.columns > 0, f"rows are {self.rows}, columns {self.columns}")
        sizes: dict[str, tuple[Value, DType, Sequence[int | None]]] = {
            "low": (self.low, DType.u8, (blocks, steps, ROWS * COLUMNS)),
            "planes": (self.planes, DType.i64, (blocks, steps, 3)),
            "escapes": (self.escapes, DType.u8, (None,)),
            "starts": (self.starts, DType.i32, (blocks,)),
            "base": (self.base, DType.u8, (1,)),
        }
        for name, (value, dtype, shape) in sizes.items():
            self.expect(value.dtype is dtype, f"{name} is {value.dtype.value}, not {dtype.value}")
            expect_rank(self, name, value.shape, len(shape))
            for axis, size in enumerate(shape):
                if size is not None:
                    expect_dim(self, f"{name}, axis {axis}", value.shape[axis], size)
        return (TensorType((self.rows, self.columns), DType.bf16),)

    def evaluate(self, env: Env, low: Any, planes: Any, escapes: Any, starts: Any, base: Any) -> Any:
        places = np.arange(ROWS * COLUMNS, dtype=np.uint64)
        bits = (planes.view(np.uint64)[..., None] >> places & np.uint64(1)).astype(np.uint8)
        codes = (bits << np.arange(3, dtype=np.uint8)[:, None]).sum(2)
        exponents = (codes + base[0]).astype(np.uint16)
        for block, start in enumerate(starts):
            escaped = codes[block] == WINDOW
            exponents[block][escaped] = escapes[start : start + np.count_nonzero(escaped)]
        wide = low.astype(np.uint16)
        numbers = (wide & 0x80) << 8 | exponents << 7 | wide & 0x7F
        whole = from_blocks(numbers)
        return np.ascontiguousarray(whole[: self.rows, : self.columns]).view(DType.bf16.np)


def to_blocks(array: Any) -> Any:
    """``[N, K]`` as ``[N / 16, K / 4, 64]``; sizes are multiples of 16 and 4."""
    n, k = array.shape
    cut = array.reshape(n // ROWS, *SHAPE[:2], k // COLUMNS, *SHAPE[2:])
    return cut.transpose(0, 3, *(1 + axis + (axis > 1) for axis in ORDER)).reshape(n // ROWS, k // COLUMNS, -1)


def from_blocks(array: Any) -> Any:
    """What :func:`to_blocks` was made from."""
    blocks, steps = array.shape[:2]
    cut = array.reshape(blocks, steps, *(SHAPE[axis] for axis in ORDER))
    back = [2 + ORDER.index(axis) for axis in range(4)]
    return cut.transpose(0, *back[:2], 1, *back[2:]).reshape(blocks * ROWS, steps * COLUMNS)
