"""What a mask says that a model keeps as a constant: ``slice(@tril) != 0`` -> causal."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright.ir import Env, Op, Value, Weight, as_dim, ops, same_dim
from tilewright.ir.ops.attention import visible
from tilewright.passes.match import is_one, scalar

_LARGEST = 2**26  # elements of a mask that is loaded to be looked at


def constant_window(mask: Value, q: Value, k: Value) -> int | None:
    """The window of the causal mask that ``mask`` is, -1 for a causal mask without one, None for anything else."""
    steps: list[Op] = []
    value = mask
    while value.owner is not None:
        op = value.owner
        if not _keeps_places(op):
            return None
        steps.append(op)
        value = op.operands[0]
    sizes = (q.shape[1], k.shape[1])
    slices = [op for op in steps if isinstance(op, ops.Slice)]
    if not isinstance(value, Weight) or value.source is None or not _is_square(value):
        return None
    if not (_cuts(slices[0], sizes) if len(slices) == 1 else not slices and _fits(value, sizes)):
        return None
    array: Any = value.load().reshape(value.shape[-2:])
    for op in reversed(steps):
        array = array if isinstance(op, (ops.Slice, ops.Reshape, ops.Broadcast)) else _apply(op, array)
    return _read(array) if array.dtype == np.bool_ else None


def _keeps_places(op: Op) -> bool:
    """Whether an operation leaves queries and keys where they are."""
    if isinstance(op, ops.Compare):
        return scalar(op.b) is not None
    if isinstance(op, (ops.Reshape, ops.Broadcast)):
        return all(map(is_one, op.x.shape[:-2])) and all(map(same_dim, op.x.shape[-2:], op.result.shape[-2:]))
    return isinstance(op, (ops.Not, ops.Cast, ops.Slice))


def _is_square(weight: Weight) -> bool:
    *lead, rows, columns = weight.shape if len(weight.shape) >= 2 else (0, 1)
    return all(map(is_one, lead)) and rows == columns and int(rows) ** 2 <= _LARGEST


def _fits(weight: Weight, sizes: tuple[Any, Any]) -> bool:
    return all(map(same_dim, weight.shape[-2:], sizes))


def _cuts(op: ops.Slice, sizes: tuple[Any, Any]) -> bool:
    """Whether a slice takes the last S of the first T rows and the first T columns."""
    s, t = sizes
    want = ((as_dim(t - s), t), (0, t))
    got = list(zip(op.starts, op.stops))[-2:]
    whole = all(map(is_one, op.x.shape[:-2])) and all(step == 1 for step in op.steps)
    return whole and all(same_dim(a, c) and same_dim(b, d) for (a, b), (c, d) in zip(got, want))


def _apply(op: Op, array: Any) -> Any:
    env = Env({})
    if isinstance(op, ops.Compare):
        return op.evaluate(env, array, np.asarray(scalar(op.b), array.dtype))
    return op.evaluate(env, array)


def _read(array: Any) -> int | None:
    places = np.arange(len(array))
    window = int(array[-1].sum())
    window = -1 if window == len(array) else window
    same = window != 0 and np.array_equal(array, visible(places, places, True, window, -1, 0))
    return window if same else None
