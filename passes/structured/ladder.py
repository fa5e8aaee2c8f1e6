"""What may go from a group, in which order and how much at once, and what each size of it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tilewright.ir import DType, Function, PassError, Weight
from tilewright.passes.calibration.data import Array
from tilewright.passes.calibration.stream import LAYERS
from tilewright.passes.structured.axes import Axis
from tilewright.passes.structured.groups import Group

Cost = Callable[[int, int, DType], float]
"""What a linear layer with a weight ``[N, K]`` of an element type costs."""


def bytes_of(rows: int, columns: int, dtype: DType) -> float:
    """Bytes of the weight: one token's time is that of reading it."""
    return rows * columns * dtype.bits / 8


@dataclass(frozen=True, eq=False)
class Ladder:
    """A group's units in the order in which they go. ``steps`` ``[U]`` says with which step each goes, 0 with the first.

    ``harm`` ``[steps]`` is what each step does, ``costs`` ``[steps + 1]`` what the group costs after so many. The last step
    is never taken: something of a group stays.
    """

    group: Group
    steps: Array
    harm: Array
    costs: Array

    @property
    def most(self) -> int:
        """Steps that may be taken."""
        return len(self.harm) - 1

    def gone(self, taken: int) -> Array:
        """The units that go with the first ``taken`` steps."""
        return np.nonzero(self.steps < taken)[0]


def steps_of(group: Group, score: Array, multiple: int) -> Array:
    """The step of each unit ``[U]``, the lowest ``score`` first, so that sizes that stay are of ``multiple`` channels.

    With parties a step takes one unit of each.
    """
    steps = np.empty(group.count, np.int64)
    size = multiple if group.kind == "channels" else 1
    for party in np.unique(group.parties):
        units = np.nonzero(group.parties == party)[0]
        order = units[np.argsort(score[units], kind="stable")]
        first = (len(order) - 1) % size + 1  # what is too many for a multiple goes first
        steps[order] = np.maximum(0, (np.arange(len(order)) - first) // size + 1)
    return steps


def ladder(group: Group, steps: Array, harm: Array, cost: Cost) -> Ladder:
    """The ladder of ``steps`` ``[U]`` whose harms are ``harm`` ``[steps]``."""
    costs = [cost_of(group, np.nonzero(steps < taken)[0], cost) for taken in range(len(harm) + 1)]
    return Ladder(group, steps, harm, np.array(costs))


def means(steps: Array, score: Array) -> Array:
    """The mean score of the units of each step."""
    return np.bincount(steps, score) / np.bincount(steps)


def cost_of(group: Group, gone: Array, cost: Cost) -> float:
    """What the matrices of ``group`` cost without the units ``gone``."""
    kept, least = group.kept(gone), group.kept(np.arange(group.count))
    total = 0.0
    for weight in group.weights():
        total += _matrix_cost(weight, kept, cost)
        if weight in group.shared:  # without what is left of it when all of the group is gone: that is for others to count
            total -= _matrix_cost(weight, least, cost)
    return total


def _matrix_cost(weight: Weight, kept: Mapping[Axis, Array], cost: Cost) -> float:
    """What is left of a matrix costs; of anything else nothing."""
    if weight.tensor.rank != 2:
        return 0.0
    rows, columns = (int(kept[weight, i].sum()) if (weight, i) in kept else int(weight.shape[i]) for i in (0, 1))
    return cost(rows, columns, weight.dtype) if rows and columns else 0.0


def fixed_cost(function: Function, ladders: Iterable[Ladder], cost: Cost) -> float:
    """What the linear layers cost beside what groups count."""
    layers = [op for op in function.walk() if isinstance(op, LAYERS)]
    whole = sum(_matrix_cost(w, {}, cost) for op in layers for w in op.operands if isinstance(w, Weight))
    return whole - sum(float(lad.costs[0]) for lad in ladders)


_SLACK = 1e-9  # sums of costs are not exact

# ---- how far to go -----------------------------------------------------------------------------------------------


def evenly(ladders: Sequence[Ladder], shares: Sequence[float], budget: float) -> list[int]:
    """Steps such that groups lose parts of their costs in proportion to ``shares``, until what is left costs ``budget``.

    Raises PassError where something of a group would not stay.
    """
    parts = [(lad.costs[0] - (lad.costs[:-1] + lad.costs[1:]) / 2) / lad.costs[0] for lad in ladders]
    return lowest([replace(lad, harm=p / share) for lad, p, share in zip(ladders, parts, shares)], budget)


def lowest(ladders: Sequence[Ladder], budget: float) -> list[int]:
    """The steps of least harm of all ladders, until what is left costs at most ``budget``.

    Raises PassError where something of a group would not stay.
    """
    steps = [(h, i, j) for i, lad in enumerate(ladders) for j, h in enumerate(np.maximum.accumulate(lad.harm)[:-1])]
    steps.sort()
    saved = np.array([0.0, *(ladders[i].costs[j] - ladders[i].costs[j + 1] for _, i, j in steps)]).cumsum()
    wanted = sum(float(lad.costs[0]) for lad in ladders) - budget
    count = int(np.searchsorted(saved, wanted * (1 - _SLACK)))
    if count > len(steps):
        raise PassError(too_much(ladders))
    taken = np.bincount([i for _, i, _ in steps[:count]], minlength=len(ladders))
    return [int(n) for n in taken]


def cheapest(ladders: Sequence[Ladder], budget: float, parts: int = 4096) -> list[int]:
    """The steps of least total harm whose costs are at most ``budget`` together (dynamic programming over its parts).

    ``budget`` is cut into ``parts``, costs are rounded up to them. Raises PassError when the smallest sizes cost more.
    """
    unit = budget / parts
    best = np.zeros(parts + 1)
    chosen: list[Array] = []
    for lad in ladders:
        harm = np.concatenate([[0.0], np.cumsum(lad.harm[:-1])])
        new = np.full(parts + 1, np.inf)
        choice = np.zeros(parts + 1, np.int64)
        for taken, (cost, h) in enumerate(zip(lad.costs[:-1], harm)):
            size = int(np.ceil(cost / unit - _SLACK)) if unit > 0 else parts + 1
            if size > parts:
                continue
            tried = best[: parts + 1 - size] + h
            better = tried < new[size:]
            new[size:][better], choice[size:][better] = tried[better], taken
        best = new
        chosen.append(choice)
    if not np.isfinite(best[parts]):
        raise PassError(too_much(ladders))
    left, found = parts, []
    for lad, choice in zip(reversed(ladders), reversed(chosen)):
        found.append(int(choice[left]))
        left -= int(np.ceil(lad.costs[found[-1]] / unit - _SLACK))
    return found[::-1]


def too_much(ladders: Sequence[Ladder]) -> str:
    """What to say when more is asked for than can go."""
    whole, least = (sum(float(lad.costs[i]) for lad in ladders) for i in (0, -2))
    return f"so much cannot go: of what can be pruned {1 - least / whole:.1%} at most, as something of each structure stays"
