"""``linear(x, @q)``, ``linear(x, @k)``, ``linear(x, @v)`` -> slices of one ``linear(x, @q_k_v)``.

So are layers whose weights are dequantized, when their codes and scales are alike. Weights are put together when the
artifact is written, none is loaded here.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import numpy as np

from tilewright.ir import Function, Module, Op, Rewriter, TensorType, Value, Weight, ops
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.match import only_user, replace
from tilewright.passes.stored import form, is_alone, joined, weights_of
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
    """Linears that may be one: same input, form of the weight and parent module; each weight used once."""
    found: dict[Hashable, list[ops.Linear]] = {}
    for op in function.walk(ops.Linear):
        if not isinstance(op, ops.Linear):
            continue
        reason = unfit(op)
        if reason is None:
            key = op.x, form(op.weight), op.loc.module.rpartition(".")[0]
            found.setdefault(key, []).append(op)
        elif len(op.x.users) > 1:
            rw.skip(op, reason)
    return [group for group in found.values() if len(group) > 1]


def unfit(op: ops.Linear) -> str | None:
    """Why a linear layer cannot be joined with others."""
    if form(op.weight) is None or (op.bias is not None and as_weight(op.bias, 1) is None):
        return "its weight or bias is computed"
    if is_alone(op.weight):
        return None
    shared = next((w for w in weights_of(op.weight) if len(w.users) > 1), None)
    return f"@{shared.name} has {len(shared.users)} users" if shared else "its weight has another user"


def join(rw: Rewriter, group: Sequence[ops.Linear]) -> None:
    """Replace the group by one layer, in the place of the first, and slices of its result."""
    first, b = group[0], rw.before(group[0])
    rows = [int(op.weight.shape[0]) for op in group]
    weight = joined(b, rw.module, [op.weight for op in group])
    whole = b.add(ops.Linear(first.x, weight, joined_bias(rw.module, group, rows)))
    ends = narrowed(group)
    whole = b.add(ops.Cast(whole, ends[0].result.dtype)) if ends[0] is not first else whole
    for op, end, (start, stop) in zip(group, ends, pairwise(accumulate(rows, initial=0))):
        lead, rank = op.x.shape[:-1], len(op.x.shape)
        starts = (*(0,) * (rank - 1), start)
        replace(rw, end, ops.Slice(whole, starts, (*lead, stop), (1,) * rank))


def narrowed(group: Sequence[ops.Linear]) -> Sequence[Op]:
    """The casts to one type that alone take the layers' results, as those with rounded inputs have; else the layers."""
    users = [only_user(op.result) for op in group]
    casts = [user for user in users if isinstance(user, ops.Cast)]
    alike = len(casts) == len(group) and len({c.result.dtype for c in casts}) == 1
    return casts if alike else group


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
