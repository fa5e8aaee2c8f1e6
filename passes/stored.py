"""Matrices of linear layers as they are stored: one weight, or codes and what makes numbers of them. Joined, cut by rows.

Nothing is loaded: codes, scales and zero points are put together when the artifact is written.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import numpy as np

from tilewright.ir import Builder, Module, Op, TensorType, Value, Weight, ops
from tilewright.passes.match import used_once
from tilewright.passes.weights import as_weight, derive, joined_name

_CODED = (ops.Dequantize, ops.Lookup, ops.Expand)


def form(value: Value) -> Hashable | None:
    """What matrices that can be joined along their rows have in common; None for one that is computed otherwise."""
    if isinstance(value, Weight):
        return (value.dtype, value.shape[1:]) if value.tensor.rank == 2 else None
    op = value.owner
    if not isinstance(op, _CODED) or (isinstance(op, ops.Lookup) and op.table.shape[0] != op.codes.shape[0]):
        return None
    parts = tuple(v and form(v) for v in op.operand_slots())
    given = [v for v in op.operand_slots() if v is not None]
    return None if any(form(v) is None for v in given) else (op.name, tuple(op.attrs.items()), parts)


def weights_of(value: Value) -> list[Weight]:
    """The weights that a matrix is made of."""
    if isinstance(value, Weight):
        return [value]
    return [w for v in (value.owner.operands if value.owner is not None else ()) for w in weights_of(v)]


def is_alone(value: Value) -> bool:
    """Whether one operation alone takes the matrix, and all that it is made of is for it only."""
    made = isinstance(value, Weight) or value.owner is None
    return used_once(value) and (made or all(map(is_alone, value.owner.operands)))  # type: ignore[union-attr]


def joined(b: Builder, module: Module, values: Sequence[Value]) -> Value:
    """The rows of matrices of one form, one after the other."""
    return _rebuilt(b, values, lambda weights: _concatenated(module, weights))


def cut(b: Builder, module: Module, value: Value, start: int, stop: int) -> Value:
    """The rows ``[start, stop)`` of a matrix."""
    return _rebuilt(b, [value], lambda weights: _taken(module, weights[0], start, stop))


def _rebuilt(b: Builder, values: Sequence[Value], leaf: Callable[[list[Weight]], Value]) -> Value:
    """The operations of the first of ``values``, with ``leaf`` of all in the place of their weights."""
    weights = [v for v in values if isinstance(v, Weight)]
    if weights:
        return leaf(weights)
    makers: list[Op] = [v.owner for v in values if v.owner is not None]
    names = [f.name for f in makers[0].fields if f.is_operand and getattr(makers[0], f.name) is not None]
    return b.add(makers[0].clone({}, **{n: _rebuilt(b, [getattr(m, n) for m in makers], leaf) for n in names}))


def _concatenated(module: Module, weights: Sequence[Weight]) -> Weight:
    kind = TensorType((sum(int(w.shape[0]) for w in weights), *weights[0].shape[1:]), weights[0].dtype)
    return derive(module, joined_name([w.name for w in weights]), kind, weights, concatenated)


def _taken(module: Module, weight: Weight, start: int, stop: int) -> Weight:
    kind = TensorType((stop - start, *weight.shape[1:]), weight.dtype)
    return derive(module, f"{weight.name}.{start}_{stop}", kind, [weight], partial(taken, start, stop))


def cut_bias(module: Module, value: Value | None, start: int, stop: int) -> Weight | None:
    """The elements ``[start, stop)`` of a bias."""
    bias = as_weight(value, 1)
    return None if bias is None else _taken(module, bias, start, stop)


def concatenated(*arrays: Any) -> Any:
    return np.concatenate(arrays)


def taken(start: int, stop: int, array: Any) -> Any:
    return array[start:stop]
