"""k-means of numbers on a line, many rows at once: exact Lloyd steps on sorted rows, without R * K * C distances."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"

_STEPS = 50
_AT_ONCE = 1 << 20  # elements that are sorted at a time


def clusters(rows: Array, count: int, importance: Array | None = None) -> Array:
    """``count`` ascending centres a row, f32 ``[R, count]``, that nearly minimise the weighted squared distance.

    ``rows`` f32 ``[R, K]``; ``importance`` (K numbers, not negative) weighs columns. Where it begins depends on the row
    alone, so that equal rows get equal centres. Lloyd steps end when no element changes its cluster, or after 50.
    """
    weights = None if importance is None else _positive(importance)
    step = max(1, _AT_ONCE // rows.shape[1])
    return np.concatenate([_block(rows[i : i + step], count, weights) for i in range(0, len(rows), step)])


def _block(rows: Array, count: int, weights: Array | None) -> Array:
    if weights is None:
        x, w = np.sort(rows, 1).astype(np.float64), np.ones(rows.shape)
    else:
        order = np.argsort(rows, 1, kind="stable")
        x, w = np.take_along_axis(rows, order, 1).astype(np.float64), weights[order]
    centres = _first(x, w, count)
    work = (x, _sums(w), _sums(w * x))
    cuts = np.full((len(rows), count - 1), -1, np.int64)
    moving = np.arange(len(rows))
    for _ in range(_STEPS):
        new = _below(work[0], (centres[moving, 1:] + centres[moving, :-1]) / 2)
        changed = (new != cuts).any(1)
        if not changed.any():
            break
        if 2 * changed.sum() < len(changed):  # work on the rest alone
            moving, new, work = moving[changed], new[changed], tuple(a[changed] for a in work)
        centres[moving] = _means(new, *work[1:], centres[moving])
        cuts = new
    return centres.astype(np.float32)


def _means(cuts: Array, mass: Array, moment: Array, centres: Array) -> Array:
    """The means of the clusters between ``cuts``; an empty one keeps its centre, in order."""
    edges = np.pad(cuts, ((0, 0), (1, 1)))
    edges[:, -1] = mass.shape[1] - 1
    inside, total = (np.diff(np.take_along_axis(sums, edges, 1)) for sums in (mass, moment))
    return np.maximum.accumulate(np.where(inside > 0, total / np.where(inside > 0, inside, 1), centres), 1)


def _positive(importance: Array) -> Array:
    """One number a column, above zero: what nothing reads should still be near."""
    flat = importance.reshape(-1).astype(np.float64)
    return np.maximum(flat, flat.max() * 1e-6) if flat.max() > 0 else np.ones_like(flat)


def _sums(x: Array) -> Array:
    """Sums of the first 0, 1, ..., K elements of each row."""
    return np.pad(np.cumsum(x, 1), ((0, 0), (1, 0)))


def _first(x: Array, w: Array, count: int) -> Array:
    """The quantiles of the cube root of the density, which is how many good centres lie dense (Panter and Dite, 1951).

    Between neighbours of a sorted row the density is about ``w / gap``, the share of its root ``gap * (w / gap)^(1/3)``.
    A gap counts for one centre at most: beyond an outlier there is nothing to be near to.
    """
    share = np.square(np.diff(x)) * (w[:, 1:] + w[:, :-1])
    share = np.cbrt(np.pad(share, ((0, 0), (1, 0))))
    share = np.minimum(share, share.sum(1, keepdims=True) / count)
    reached = np.cumsum(share, 1)
    wanted = reached[:, -1:] * ((np.arange(count) + 0.5) / count)
    return np.take_along_axis(x, np.minimum(_below(reached, wanted), x.shape[1] - 1), 1)


def _below(rows: Array, limits: Array) -> Array:
    """How many elements of each sorted row are not above each of its ``limits`` ``[R, L]``: a binary search."""
    low, high = np.zeros(limits.shape, np.int64), np.full(limits.shape, rows.shape[1], np.int64)
    for _ in range(rows.shape[1].bit_length()):
        middle = (low + high) // 2
        under = np.take_along_axis(rows, np.minimum(middle, rows.shape[1] - 1), 1) <= limits
        under &= low < high
        low, high = np.where(under, middle + 1, low), np.where(under, high, middle)
    return low
