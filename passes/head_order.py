"""Heads of attention in another order: rows of the weights that make them, columns of those that read them.

The graph stays as it is; weights are put in order when the artifact is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from tilewright.ir import Module, Weight, ops
from tilewright.passes.calibration.data import Array
from tilewright.passes.structured.groups import Group
from tilewright.passes.structured.rules import HEADS
from tilewright.passes.structured.shrink import taken
from tilewright.passes.weights import derive


def reorder(module: Module, group: Group, order: Sequence[int]) -> None:
    """Head i of keys and values, with its queries, becomes what head ``order[i]`` was."""
    assert isinstance(group.attention, ops.Attention)
    units = group.index[group.attention.k, HEADS]
    moved = np.empty(group.count, np.int64)
    moved[units] = units[list(order)]
    places: dict[Weight, list[tuple[int, Array]]] = {}
    for (value, axis), index in group.index.items():
        if isinstance(value, Weight):
            places.setdefault(value, []).append((axis, _from(index, moved)))
    for weight, indices in places.items():
        new = derive(module, f"{weight.name}.heads", weight.tensor, [weight], partial(taken, tuple(indices)))
        weight.replace_all_uses(new)


def unfit(group: Group) -> str | None:
    """Why the heads cannot change places, if they cannot."""
    if group.shared:
        return f"@{next(iter(group.shared)).name} is a weight of other heads too"
    counts = (np.bincount(index[index >= 0], minlength=group.count) for index in group.index.values())
    return None if all((n == n[0]).all() for n in counts) else "its heads are not of one size"


def _from(index: Array, moved: Array) -> Array:
    """For each place of an axis the one whose numbers come there; ``index`` says whose place it is, -1 nobody's."""
    out = np.arange(index.size)
    for unit, source in enumerate(moved):
        out[index == unit] = np.flatnonzero(index == source)
    return out
