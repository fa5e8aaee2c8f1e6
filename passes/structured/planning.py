"""From groups to ladders: scores by calibration data, orders in which units go, and how far to go in each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tilewright.ir import Function, Op
from tilewright.ir.ops import numerics
from tilewright.passes.calibration.data import Array, Batch
from tilewright.passes.calibration.sites import fields
from tilewright.passes.calibration.statistics import hessian
from tilewright.passes.calibration.stream import Layer, stream
from tilewright.passes.structured.branches import Influence, find_branches, influences
from tilewright.passes.structured.groups import Group
from tilewright.passes.structured.ladder import Cost, Ladder, ladder, means, steps_of
from tilewright.passes.structured.obs import Removal, damped
from tilewright.passes.structured.scores import Method, Spread, channel_scores, magnitudes, spread, unit_scores


@dataclass
class Scored:
    """Ladders by a score a unit. ``seen`` is what calibration said of the readers' inputs, none without data."""

    ladders: list[Ladder]
    seen: dict[Layer, Spread] = field(default_factory=dict)


def scored(function: Function, groups: Sequence[Group], batches: Sequence[Batch], method: Method, standard: bool,
           multiple: int, cost: Cost) -> Scored:  # fmt: skip
    """Ladders in which the units of the lowest scores go first; one run over the data, if there are some."""
    seen: dict[Layer, Spread] = {}
    channels: dict[Layer, Array] = {}

    def visit(op: Layer, inputs: Sequence[Array]) -> None:
        seen[op] = spread(inputs)
        if method != "magnitude":
            channels[op] = channel_scores(method, op, seen[op])

    if batches:
        stream(function, batches, visit, list(dict.fromkeys(op for g in groups for op in g.readers)))
    found = []
    for group in groups:
        score = magnitudes(group, standard) if method == "magnitude" else unit_scores(group, channels, standard)
        steps = steps_of(group, score, multiple)
        found.append(ladder(group, steps, means(steps, score), cost))
    return Scored(found, seen)


def by_saliency(function: Function, groups: Sequence[Group], batches: Sequence[Batch], damping: float, multiple: int,
                cost: Cost) -> Scored:  # fmt: skip
    """Ladders in the order of ZipLM: each removal is made up for before the next is chosen.

    The harm of a step is the squared error that it adds to the outputs of the readers, relative to the energy of the hidden
    state that they are added to; outside of residual branches relative to their own.
    """
    behind = {op: seen.energy for op, seen in influence_at(function, batches).items()}
    found: dict[Group, Ladder] = {}
    at: dict[Layer, list[Group]] = {}
    for group in groups:
        at.setdefault(group.readers[0], []).append(group)
    seen: dict[Layer, Spread] = {}

    def visit(op: Layer, inputs: Sequence[Array]) -> None:
        seen[op] = spread(inputs)
        moments, mean = hessian(inputs), seen[op].mean
        inverse = np.linalg.inv(damped(moments - np.outer(mean, mean), damping))
        for group in at[op]:
            weight = np.concatenate([wide_weight(reader, name) for reader in group.readers for name in fields(reader)])
            energy = behind.get(op) or float(np.einsum("nk,nk->", weight @ moments, weight))
            work = Removal(weight, inverse.copy(), group.columns(op), group.parties)
            found[group] = removed(group, work, energy, multiple, cost)

    stream(function, batches, visit, list(at))
    return Scored([found[group] for group in groups], seen)


def removed(group: Group, work: Removal, energy: float, multiple: int, cost: Cost) -> Ladder:
    """The ladder of taking all of ``group`` away, errors relative to ``energy``."""
    rounds = list(work.order(size_of(group, multiple)))
    steps = np.empty(group.count, np.int64)
    for i, (units, _) in enumerate(rounds):
        steps[units] = i
    return ladder(group, steps, np.array([harm for _, harm in rounds]) / max(energy, 1e-300), cost)


def size_of(group: Group, multiple: int) -> int:
    """Units of a party that go with a step."""
    return multiple if group.kind == "channels" else 1


def wide_weight(op: Layer, field: str) -> Array:
    """A weight in f64."""
    weight = getattr(op, field)
    array = numerics.wide(weight.load()).astype(np.float64)
    weight.release()
    return array


def shares(function: Function, ladders: Sequence[Ladder], batches: Sequence[Batch]) -> list[float]:
    """What part of each group goes relative to others: less of blocks that turn the hidden state far.

    The coarse half of CFSP (arXiv:2409.13199): a block's influence is the angle between its input and output, shares are
    the sigmoids of standardised influences. A group outside of all blocks counts as the mean one.
    """
    where = influence_at(function, batches)
    angles = [seen.angle for seen in dict.fromkeys(where.values())] or [0.0]
    mean, deviation = float(np.mean(angles)), float(np.std(angles)) or 1.0
    found = np.array([where[op].angle if (op := lad.group.readers[0]) in where else mean for lad in ladders])
    return list(1 / (1 + np.exp((found - mean) / deviation)))


def influence_at(function: Function, batches: Sequence[Batch]) -> dict[Op, Influence]:
    """What the residual branch that an operation is in does to the hidden state."""
    branches = find_branches(function)
    seen = influences(function, [(b,) for b in branches], batches) if branches else []
    return {op: influence for branch, influence in zip(branches, seen) for op in branch.body}


def lost(groups: Sequence[Group], gone: Mapping[Group, Array]) -> dict[Layer, Array]:
    """Of the input channels of each reader which go, bool ``[K]``; readers that lose none are left out."""
    found: dict[Layer, Array] = {}
    for group in groups:
        for op in group.readers if gone[group].size else ():
            mask = np.isin(group.columns(op), gone[group])
            found[op] = found.get(op, False) | mask
    return found
