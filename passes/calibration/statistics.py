"""What methods ask about the inputs of a layer ``[..., K]``: magnitudes of channels and their second moments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.ir.ops import numerics
from tilewright.passes.calibration.data import Array

_ROWS = 2048  # that are widened at a time


@dataclass(frozen=True)
class Moments:
    """Of each channel, f32 ``[K]``: the largest magnitude, the mean magnitude, the mean square."""

    top: Array
    mean: Array
    square: Array
    rows: int


def moments(inputs: Sequence[Array]) -> Moments:
    """Magnitudes of the channels of ``inputs``, arrays ``[..., K]``."""
    k = inputs[0].shape[-1]
    top, mean, square, rows = np.zeros(k, np.float32), np.zeros(k), np.zeros(k), 0
    for block in blocks(inputs):
        size = np.abs(block)
        np.maximum(top, size.max(0), out=top)
        mean += size.sum(0)
        square += np.einsum("rk,rk->k", block, block)
        rows += len(block)
    return Moments(top, (mean / rows).astype(np.float32), (square / rows).astype(np.float32), rows)


def hessian(inputs: Sequence[Array]) -> Array:
    """``mean over rows of x^T x``: f64 ``[K, K]``, half the Hessian of a layer's squared error in a row of its weight.

    Products are f32 in blocks of rows, their sum is f64.
    """
    k, rows = inputs[0].shape[-1], 0
    total = np.zeros((k, k))
    for block in blocks(inputs):
        total += block.T @ block
        rows += len(block)
    total /= rows
    return total


def sample(inputs: Sequence[Array], most: int) -> Array:
    """At most ``most`` rows f32 ``[rows, K]``, evenly taken from all of ``inputs``."""
    total = sum(x.size // x.shape[-1] for x in inputs)
    picked = np.unique(np.linspace(0, total - 1, min(most, total)).astype(np.int64))
    found, start = [], 0
    for x in inputs:
        flat = x.reshape(-1, x.shape[-1])
        here = picked[(picked >= start) & (picked < start + len(flat))] - start
        found.append(numerics.wide(flat[here]).astype(np.float32))
        start += len(flat)
    return np.concatenate(found)


def blocks(inputs: Sequence[Array]) -> Iterator[Any]:
    """The rows of all inputs in f32, some at a time."""
    for x in inputs:
        flat = x.reshape(-1, x.shape[-1])
        for start in range(0, len(flat), _ROWS):
            yield numerics.wide(flat[start : start + _ROWS]).astype(np.float32, copy=False)
