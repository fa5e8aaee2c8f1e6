"""Sparse weights for a kernel of which only the text is known: masks with as many bits as there are values."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright.ir import ops
from tilewright.ir.ops.sparse_expand import SEGMENT

Array = np.ndarray[Any, Any]

_STEPS = 1021
"""Masks after which they repeat themselves."""


def bits_of_step(op: ops.SparseExpand) -> int:
    """Bits that are set in each step, so that the values suffice."""
    layout, (blocks, steps) = op.layout, map(int, op.mask.shape)
    room = (int(op.values.shape[0]) - layout.spare) // (blocks * steps)  # elements of a step
    return min(2 * room if layout.nibbles else room // layout.size, layout.bits)


def masks(op: ops.SparseExpand, rng: np.random.Generator) -> Array:
    """As many bits in each step, anywhere."""
    layout, (blocks, steps) = op.layout, map(int, op.mask.shape)
    order = rng.random((_STEPS, layout.bits)).argsort(1)
    packed = np.packbits(order < bits_of_step(op), axis=1, bitorder="little")
    return np.resize(np.ascontiguousarray(packed).view(layout.mask.np)[:, 0], (blocks, steps))


def starts(op: ops.SparseExpand) -> Array:
    """Where the values of each segment begin when all steps take as many."""
    blocks, steps = map(int, op.mask.shape)
    every = np.arange(blocks * steps, dtype=np.int64).reshape(blocks, steps)[:, ::SEGMENT]
    return (every * int(op.layout.advance(bits_of_step(op)))).astype(np.int32)
