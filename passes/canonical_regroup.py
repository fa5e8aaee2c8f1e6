"""``reshape(transpose(x))`` -> ``transpose(reshape(x))``: transposes meet also when axes are split or joined between."""

from __future__ import annotations

from tilewright.ir import Pattern, Rewriter, Shape, ops, product, same_dim
from tilewright.passes.canonical_transpose import inverse, sinking
from tilewright.passes.match import made_by, replace, used_once


def sink_reshape(op: ops.Reshape, rw: Rewriter) -> None:
    """A reshape that splits axes, or joins axes that were neighbours before the transpose, comes before it."""
    source = sinking([op.x])
    blocks = matching_axes(op.x.shape, op.shape) if source is not None else None
    if source is None or blocks is None:
        return
    moved = [([source.perm[i] for i in old], new) for old, new in blocks]
    if any(old != list(range(old[0], old[0] + len(old))) for old, _ in moved if old):
        return
    anchor = 0
    keyed: list[tuple[int, list[int]]] = []
    for old, new in moved:  # a new axis of size one stays with the axis before it
        anchor = old[0] if old else anchor
        keyed.append((anchor, new))
    places = [i for _, new in sorted(keyed, key=lambda item: item[0]) for i in new]
    if places == list(range(len(places))):
        return
    early = rw.before(op).add(ops.Reshape(source.x, tuple(op.shape[i] for i in places)))
    replace(rw, op, ops.Transpose(early, inverse(places)))


def matching_axes(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]] | None:
    """Shortest runs of axes of two shapes that hold the same number of elements, in order."""
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        ends = [(a, b) for a in range(i, len(old) + 1) for b in range(j, len(new) + 1) if a + b > i + j]
        ends.sort(key=sum)
        end = next((e for e in ends if same_dim(product(old[i : e[0]]), product(new[j : e[1]]))), None)
        if end is None:
            return None
        runs.append((list(range(i, end[0])), list(range(j, end[1]))))
        i, j = end
    return runs


def over_reshape(op: ops.Transpose, rw: Rewriter) -> None:
    """``transpose(reshape(transpose(x)))`` -> ``reshape(transpose(x))`` when the reshape joins what moves together."""
    regroup = made_by(op.x, ops.Reshape)
    inner = made_by(regroup.x, ops.Transpose) if regroup is not None else None
    if regroup is None or inner is None or not used_once(op.x) or not used_once(regroup.x):
        return
    runs = matching_axes(regroup.x.shape, regroup.shape)
    if runs is None:
        return
    run_of = {axis: i for i, (_, new) in enumerate(runs) for axis in new}
    order = list(dict.fromkeys(run_of[axis] for axis in op.perm))
    if [axis for i in order for axis in runs[i][1]] != list(op.perm):
        return  # a run is torn apart
    order += [i for i in range(len(runs)) if i not in order]
    perm = tuple(axis for i in order for axis in runs[i][0])
    early = rw.before(op).add(ops.Transpose(regroup.x, perm))
    replace(rw, op, ops.Reshape(early, op.result.shape))


PATTERNS: tuple[Pattern, ...] = (sink_reshape, over_reshape)
