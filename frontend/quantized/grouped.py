"""Groups whose columns lie apart: the order in which they lie together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from tilewright.frontend.quantized.packed import Layer, Packed, Part


def ordered(packed: Packed, layer: Layer, name: str) -> Packed:
    """``packed`` with its columns in an order that makes groups neighbours, given the group of each column.

    Raises CheckpointError for groups that are unknown, or not all of one size.
    """
    k, groups = packed.shape[1], int(packed.parts["scale"].type.shape[1])
    layer.expect(name, ("I32", "I64"), [k], "the group of each column")
    index = layer.array(name)
    size = k // groups
    if np.array_equal(index, np.arange(k) // size):
        return packed
    if index.min() == -1 and index.max() == -1:  # never filled in: the columns are where they were
        return packed
    if index.min() < 0 or index.max() >= groups:
        layer.fail(name, f"names the groups {index.min()} to {index.max()}, and there are {groups}")
    counts = np.bincount(index, minlength=groups)
    if (counts != size).any():
        layer.fail(name, f"has groups of {counts.min()} to {counts.max()} columns, expected {size} in each")
    order = np.argsort(index, kind="stable")
    codes, *others = packed.parts
    part = packed.parts[codes]
    moved = {codes: Part(part.type, partial(_columns, part.make, order)), **{n: packed.parts[n] for n in others}}
    return replace(packed, parts=moved, order=order)


def _columns(make: Callable[[], np.ndarray], order: np.ndarray) -> np.ndarray:
    return make()[:, order]
