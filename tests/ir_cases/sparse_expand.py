"""Weights from masks and values, bit by bit in plain Python."""

from functools import partial

import numpy as np

from tests.ir_cases.case import Case
from tilewright.ir import DType
from tilewright.ir import ops as o
from tilewright.ir.ops.sparse_expand import MaskLayout

ROWS, COLUMNS = 18, 270
LAYOUTS = [(DType.f32, 1, False), (DType.bf16, 2, False), (DType.i8, 1, True), (DType.i8, 4, False), (DType.i4, 8, True),
           (DType.i4, 1, False), (DType.f16, 1, False)]  # fmt: skip


def weight(dtype: DType) -> np.ndarray:
    rng = np.random.default_rng(0)
    numbers = rng.integers(-8, 8, (ROWS, COLUMNS)) if dtype.is_int else rng.standard_normal((ROWS, COLUMNS))
    return np.where(rng.random((ROWS, COLUMNS)) < 0.3, numbers, 0).astype(dtype.np)


def _places(layout: MaskLayout, bit: int) -> list[tuple[int, int]]:
    """Row and column within a step of what a bit stands for, in the order of the values."""
    row, first = divmod(bit * layout.unit, layout.pair)
    order = list(range(layout.pair))
    if layout.split:
        order = [4 * (i // 4) + (0, 2, 1, 3)[i % 4] for i in order]
    if layout.dtype is DType.i4 and layout.unit == 8:  # the halves of a byte are four apart
        order = [order[i] for byte in range(4) for i in (byte, byte + 4)]
    return [(row, column) for column in order[first : first + layout.unit]]


def _expand(layout, values, mask, starts):
    out, narrow, at = np.zeros((ROWS, COLUMNS), np.float32), layout.dtype.bits == 4, 0
    for block in range(mask.shape[0]):
        for step in range(mask.shape[1]):
            at = int(starts[block, step // 64]) * (1 + narrow) if step % 64 == 0 else at + at % 2 * narrow
            for bit in range(layout.bits):
                for row, column in _places(layout, bit) if int(mask[block, step]) >> bit & 1 else []:
                    value = (int(values[at // 2]) >> 4 * (at % 2) & 15) - 8 if narrow else float(values[at])
                    value -= 128 * (layout.dtype is DType.i8)
                    at += 1
                    place = 16 * block + row, layout.pair * step + column
                    if place[0] < ROWS and place[1] < COLUMNS:
                        out[place] = value
    return out.astype(layout.dtype.np)


def given(array):
    return lambda rng, dtype: array


def case(dtype: DType, unit: int, split: bool) -> Case:
    layout, numbers = MaskLayout(dtype, unit, split), weight(dtype)
    attrs = {"rows": ROWS, "columns": COLUMNS, "dtype": dtype, "unit": unit, "split": split}
    parts = [given(p) for p in layout.store(numbers, layout.count(numbers) + 2)]
    return Case(o.SparseExpand, parts, partial(_expand, layout), attrs, note=f"{dtype.value}-{unit}")


CASES = [case(*layout) for layout in LAYOUTS]
