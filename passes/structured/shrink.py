"""The graph without some indices of some axes: operations anew with smaller operands, weights cut when they are written."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from tilewright.ir import Function, Module, Op, TensorType, Value, Weight
from tilewright.passes.calibration.data import Array
from tilewright.passes.structured.axes import Axis
from tilewright.passes.structured.rules import resized
from tilewright.passes.weights import derive


def shrink(module: Module, function: Function, kept: Mapping[Axis, Array]) -> None:
    """Make ``function`` anew with what is true in ``kept`` of each axis; it must hold all that is tied to what it holds."""
    touched = dict.fromkeys(value for value, _ in kept)
    new: dict[Value, Value] = {v: cut(module, v, kept) for v in touched if isinstance(v, Weight) and v.users}
    gone: list[Op] = []
    for op in function.walk():
        if not any(v in touched for v in (*op.operands, *op.results)):
            continue
        made = function.insert(function.body.index(op), op.clone(new, **resized(op, kept)))
        for old, result in zip(op.results, made.results):
            if old in touched:
                new[old] = result
            else:
                old.replace_all_uses(result)
        gone.append(op)
    for op in reversed(gone):
        op.drop()


def cut(module: Module, weight: Weight, kept: Mapping[Axis, Array]) -> Weight:
    """``weight`` with what stays of its axes, cut when the artifact is written."""
    masks = {axis: kept[weight, axis] for axis in range(weight.tensor.rank) if (weight, axis) in kept}
    shape = tuple(int(masks[i].sum()) if i in masks else d for i, d in enumerate(weight.shape))
    indices = tuple((axis, np.nonzero(mask)[0]) for axis, mask in masks.items())
    return derive(module, f"{weight.name}.kept", TensorType(shape, weight.dtype), [weight], partial(taken, indices))


def taken(indices: tuple[tuple[int, Array], ...], array: Array) -> Array:
    for axis, index in indices:
        array = array.take(index, axis)
    return array
