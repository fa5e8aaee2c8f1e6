"""``linear(x, @q)``, ``linear(x, @k)``, ``linear(x, @v)`` -> slices of one ``linear(x, @q_k_v)``.

Weights are put together when the artifact is written, none is loaded here.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import numpy as np

from tilewright.ir import Function, Module, Rewriter, TensorType, Value, Weight, ops
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.match import replace
from tilewright.passes.weights import as_weight, derive, joined_name


@dataclass(frozen=True)
class FuseQkv(Pass):
    """Joins linear layers of one parent module that share their input into one product with more rows."""

    name: ClassVar[str] = "fuse-qkv"

    def run(self, module: Module, ctx: PassContext) -> bool:
        rw = Rewriter(module, pattern=self.name)
        for function in module.entries():
            for group in groups(function, rw):
                join(rw, group)
        return ctx.take(rw)


def groups(function: Function, rw: Rewriter) -> list[list[ops.Linear]]:
    """Linears that may be one: same input, element type and parent module; each weight used once."""
    found: dict[Hashable, list[ops.Linear]] = {}
    for op in function.walk(ops.Linear):
        if not isinstance(op, ops.Linear):
            continue
        reason = unfit(op)
        if reason is None:
            key = op.x, op.weight.dtype, op.loc.module.rpartition(".")[0]
            found.setdefault(key, []).append(op)
        elif len(op.x.users) > 1:
            rw.skip(op, reason)
    return [group for group in found.values() if len(group) > 1]


def unfit(op: ops.Linear) -> str | None:
    """Why a linear layer cannot be joined with others."""
    weight = as_weight(op.weight, 2)
    if weight is None or (op.bias is not None and as_weight(op.bias, 1) is None):
        return "its weight or bias is computed"
    return f"@{weight.name} has {len(weight.users)} users" if len(weight.users) > 1 else None


def join(rw: Rewriter, group: Sequence[ops.Linear]) -> None:
    """Replace the group by one layer, in the place of the first, and slices of its result."""
    first = group[0]
    weights = [w for op in group if (w := as_weight(op.weight, 2)) is not None]
    rows = [int(w.shape[0]) for w in weights]
    kind = TensorType((sum(rows), weights[0].shape[1]), first.weight.dtype)
    weight = derive(rw.module, joined_name([w.name for w in weights]), kind, weights, concatenated)
    whole = rw.before(first).add(ops.Linear(first.x, weight, joined_bias(rw.module, group, rows)))
    for op, (start, stop) in zip(group, pairwise(accumulate(rows, initial=0))):
        lead, rank = op.x.shape[:-1], len(op.x.shape)
        starts = (*(0,) * (rank - 1), start)
        replace(rw, op, ops.Slice(whole, starts, (*lead, stop), (1,) * rank))


def concatenated(*arrays: Any) -> Any:
    return np.concatenate(arrays)


def joined_bias(module: Module, group: Sequence[ops.Linear], rows: Sequence[int]) -> Value | None:
    """The biases one after the other, zeros for a layer without one; None when none has one."""
    biases = [as_weight(op.bias, 1) for op in group]
    given: list[Weight] = [b for b in biases if b is not None]
    if not given:
        return None
    kind = TensorType((sum(rows),), given[0].dtype)
    name = joined_name([b.name for b in given]) if len(given) > 1 else f"{given[0].name}.padded"
    make = partial(padded_with_zeros, tuple(b is not None for b in biases), tuple(rows))
    return derive(module, name, kind, given, make)


def padded_with_zeros(has: Sequence[bool], rows: Sequence[int], *arrays: Any) -> Any:
    left = iter(arrays)
    return np.concatenate([next(left) if h else np.zeros(n, arrays[0].dtype) for h, n in zip(has, rows)])
