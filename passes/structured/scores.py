"""What the units of a group are worth: one number a unit, the least goes first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tilewright.ir import PassError, Weight
from tilewright.ir.ops import numerics
from tilewright.passes.calibration.data import Array
from tilewright.passes.calibration.sites import fields
from tilewright.passes.calibration.statistics import blocks
from tilewright.passes.calibration.stream import Layer
from tilewright.passes.structured.groups import Group

Method = Literal["flap", "wanda", "magnitude"]
_AT_ONCE = 1 << 22  # elements of a weight that are widened at a time


@dataclass(frozen=True)
class Spread:
    """Mean and variance over all tokens of each channel, f64 ``[K]``."""

    mean: Array
    variance: Array


def spread(inputs: Sequence[Array]) -> Spread:
    """Of the inputs ``[..., K]`` of a layer."""
    count = sum(x.size // x.shape[-1] for x in inputs)
    mean = sum(block.sum(0, dtype=np.float64) for block in blocks(inputs)) / count
    around = mean.astype(np.float32)
    squares = sum(np.square(block - around).sum(0, dtype=np.float64) for block in blocks(inputs)) / count
    return Spread(mean, squares - np.square(mean - around))


def channel_scores(method: Method, op: Layer, seen: Spread) -> Array:
    """The worth of each input channel of a layer, f64 ``[K]``.

    ``flap`` (arXiv:2312.11983): variance of the channel times the squared norm of its column: what is constant can become a
    bias. ``wanda`` (arXiv:2306.11695): norm of the channel times the sum of its column's magnitudes.
    """
    weights = [w for name in fields(op) if isinstance(w := getattr(op, name), Weight)]
    if method == "flap":
        found = seen.variance * sum(_sums(w, 0, squares=True) for w in weights)
    else:
        found = np.sqrt(seen.variance + seen.mean**2) * sum(_sums(w, 0, squares=False) for w in weights)
    if not np.isfinite(found).all():
        raise PassError("inputs or weights of the layer are NaN or infinite", op.loc)
    return found


def unit_scores(group: Group, channels: Mapping[Layer, Array], standard: bool) -> Array:
    """For each unit the mean score of its channels, ``[U]``; ``standard`` makes scores of several groups comparable."""
    total = np.zeros(group.count)
    for op in group.readers:
        unit = group.columns(op)
        mine = unit >= 0
        score = standardized(channels[op][mine]) if standard else channels[op][mine]
        total += np.bincount(unit[mine], score, group.count) / np.bincount(unit[mine], minlength=group.count)
    return total


def magnitudes(group: Group, standard: bool) -> Array:
    """For each unit the norm of all weights that go with it, ``[U]``. Reads the weights, one at a time."""
    squares = np.zeros(group.count)
    for (value, axis), unit in group.index.items():
        if isinstance(value, Weight):
            others = tuple(i for i in range(value.tensor.rank) if i != axis)
            squares += np.bincount(unit + 1, _sums(value, others, squares=True), group.count + 1)[1:]
    return standardized(np.sqrt(squares)) if standard else np.sqrt(squares)


def standardized(score: Array) -> Array:
    """With mean 0 and deviation 1."""
    centred: Array = score - score.mean()
    return centred / score.std() if score.std() else centred


def _sums(weight: Weight, axes: int | tuple[int, ...], squares: bool) -> Array:
    """Sums of squares, or of magnitudes, over ``axes``, f64; a block of rows at a time."""
    array = weight.load()
    step = max(1, _AT_ONCE // max(1, array[:1].size))
    of = np.square if squares else np.abs
    parts = [of(numerics.wide(array[i : i + step])).sum(axes, dtype=np.float64) for i in range(0, len(array), step)]
    weight.release()
    rows_stay = 0 not in (axes if isinstance(axes, tuple) else (axes,))
    return np.concatenate(parts) if rows_stay else sum(parts, np.zeros(()))
