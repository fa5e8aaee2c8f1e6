"""What is taken from numbers before they become codes, and kept of the error that codes leave (GEAR, arXiv:2403.05527).

All is computed in f32. A backend that adds in another order finds the same factors within rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

STEPS = 3
"""Of subspace iteration."""
LEAST = 1e-6
"""Of a column's square, what must be left without the columns before it: else all of it is theirs, but for rounding."""
_ROOTS = (2, 3, 5, 7, 11, 13, 17, 19)


def extremes(numbers: Array, axis: int, count: int) -> Array:
    """Places along ``axis`` of the ``count`` greatest numbers and then of as many of the least, the greater ones first.

    Of equal numbers the earlier one counts as greater.
    """
    order = np.argsort(-numbers, axis, kind="stable")
    size = numbers.shape[axis]
    return np.take(order, [*range(count), *range(size - count, size)], axis)


def marked(places: Array, axis: int, shape: tuple[int, ...]) -> Array:
    """Whether a number is at one of ``places`` along ``axis``: bool of ``shape``."""
    found = np.zeros(shape, bool)
    np.put_along_axis(found, places, True, axis)
    return found


def starts(size: int, rank: int) -> Array:
    """``[size, rank]`` numbers from -1 to 1 to begin with: multiples of irrational numbers, without their integers."""
    turns = np.arange(1.0, size + 1)[:, None] * np.sqrt(np.array(_ROOTS[:rank], np.float64))
    return (2 * (turns % 1) - 1).astype(np.float32)


def factors(error: Array, rank: int) -> tuple[Array, Array]:
    """``a [..., tokens, rank]`` and ``b [..., size, rank]``: ``a @ b.T`` is near ``error [..., tokens, size]``.

    Columns of ``a`` are orthonormal; one that is a mixture of those before it is zero.
    """
    b = np.broadcast_to(starts(error.shape[-1], rank), (*error.shape[:-2], error.shape[-1], rank))
    for _ in range(STEPS):
        a = _orthonormal(error @ b)
        b = np.swapaxes(error, -1, -2) @ a
    return a, b


def _orthonormal(columns: Array) -> Array:
    """Gram and Schmidt, one column after the other."""
    done: list[Array] = []
    for column in np.moveaxis(columns, -1, 0):
        before, left = _square(column), column
        for other in done:
            left = left - (left * other).sum(-1, keepdims=True) * other
        after = _square(left)
        kept = after > np.float32(LEAST) * before
        done.append(np.where(kept, left / np.sqrt(np.where(kept, after, np.float32(1))), np.float32(0)))
    return np.stack(done, -1)


def _square(column: Array) -> Array:
    return np.asarray((column * column).sum(-1, keepdims=True))
