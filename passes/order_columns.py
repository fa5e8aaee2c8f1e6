"""``slice(reshape(linear(x, @w), [.., H, 3, D]))`` -> ``reshape(slice(linear(x, @w.ordered)))``: whole columns.

Models that store queries, keys and values of a head side by side get the rows of the weight in the order that makes
each of them one range of columns, which attention reads in place. The rows are moved when the artifact is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from tilewright.ir import Module, Rewriter, Value, ops, rewrite, same_dim
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.canonical_moves import is_zero
from tilewright.passes.match import only_user, replace, same_shape, used_once
from tilewright.passes.weights import as_weight, derive


@dataclass(frozen=True)
class OrderColumns(Pass):
    """Orders what a linear layer gives by how it is cut up afterwards."""

    name: ClassVar[str] = "order-columns"

    def run(self, module: Module, ctx: PassContext) -> bool:
        return ctx.take(rewrite(module, ordered, functions=module.entries()))


def ordered(op: ops.Linear, rw: Rewriter) -> None:
    regroup, lead = only_user(op.result), len(op.x.shape) - 1
    if not isinstance(regroup, ops.Reshape) or not same_shape(regroup.shape[:lead], op.x.shape[:-1]):
        return
    cuts = [u for u in regroup.result.users if isinstance(u, ops.Slice) and _is_plain(u, lead)]
    if len(cuts) < len(regroup.result.users) or len(cuts) < 2 or len(regroup.shape) == lead + 1:
        return
    columns = {c: _columns(c, lead) for c in cuts}
    cuts.sort(key=lambda c: int(columns[c][0]))
    order = np.concatenate([columns[c] for c in cuts])
    if not np.array_equal(np.sort(order), np.arange(op.weight.shape[0])):
        rw.skip(op, "parts of the result are taken twice, or not at all")
        return
    whole: Value = op.result
    if not np.array_equal(order, np.sort(order)):
        new = _reordered(op, rw, order)
        if new is None:
            return
        whole = rw.before(op).add(new)
    first = 0
    for cut in cuts:
        stop = first + len(columns[cut])
        starts = (*(0,) * lead, first)
        part = rw.before(cut).add(ops.Slice(whole, starts, (*op.x.shape[:-1], stop), (1,) * (lead + 1)))
        replace(rw, cut, ops.Reshape(part, cut.result.shape))
        first = stop


def _is_plain(cut: ops.Slice, lead: int) -> bool:
    """Whether a slice takes whole leading axes, and neighbours in a part of static size."""
    whole = zip(cut.starts[:lead], cut.stops[:lead], cut.x.shape[:lead])
    static = all(isinstance(d, int) for d in (*cut.starts[lead:], *cut.stops[lead:], *cut.x.shape[lead:]))
    return static and all(s == 1 for s in cut.steps) and all(is_zero(a) and same_dim(b, n) for a, b, n in whole)


def _columns(cut: ops.Slice, lead: int) -> Any:
    """The columns of the layer's result that a slice of the regrouped result takes, in its order."""
    sizes = [int(d) for d in cut.x.shape[lead:]]
    ranges = tuple(slice(int(a), int(b)) for a, b in zip(cut.starts[lead:], cut.stops[lead:]))
    return np.arange(np.prod(sizes)).reshape(sizes)[ranges].reshape(-1)


def _reordered(op: ops.Linear, rw: Rewriter, order: Any) -> ops.Linear | None:
    """The layer with its rows in another order."""
    weight, bias = as_weight(op.weight, 2), as_weight(op.bias, 1)
    if weight is None or not used_once(weight) or (op.bias is not None and bias is None):
        rw.skip(op, "its weight is computed, or used elsewhere too")
        return None
    take = partial(taken, order)
    moved = [derive(rw.module, f"{w.name}.ordered", w.tensor, [w], take) for w in (weight, bias) if w is not None]
    return ops.Linear(op.x, *moved, loc=op.loc)


def taken(order: Any, array: Any) -> Any:
    return array[order]
