"""Schedules by prediction alone: what the cost model takes for the fastest, before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from tilewright.costmodel.layouts import grouped
from tilewright.costmodel.model import CostModel
from tilewright.costmodel.workload import Choice, Task

_MOST = 4096  # schedules that are looked at; larger spaces are sampled
_CAUTION = 2.0  # standard deviations that are added to what is predicted
_CLEARLY = 0.95  # predicted time relative to the default from which on a schedule is taken
_READ, _COMPUTE = 20e9, 50e9  # bytes and operations a second: how kernels compare with each other, roughly


@dataclass(frozen=True)
class Pick:
    """``ratio``: the time of ``choice`` relative to the default's, as predicted and with its uncertainty added."""

    choice: Choice
    ratio: float


def pick(tasks: Sequence[Task], model: CostModel, held: Mapping[int, str] | None = None) -> list[Pick | None]:
    """For each task the schedule to take; None for the default, and for what the model does not know.

    Members of a group take one layout, that with which they should be fastest together. ``held`` gives some tasks, by
    index, a layout that is settled already.
    """
    found: list[Pick | None] = [None] * len(tasks)
    for members in grouped(tasks):
        options = [_best_by_layout(tasks[i], model) for i in members]
        settled = [held[i] for i in members if held and i in held]
        costs = {layout: _cost([tasks[i] for i in members], options, layout) for layout in settled or options[0]}
        usual = next(iter(options[0]))
        best = min(costs, key=lambda layout: costs[layout])
        if not settled and costs[best] > _CLEARLY * costs[usual]:
            best = usual
        for i, option in zip(members, options):
            chosen = option.get(best)
            if chosen is not None and chosen.choice.text != tasks[i].space.default.text:
                found[i] = chosen
    return found


def candidates(task: Task) -> list[Choice]:
    """The default, then all other schedules of the space, or as many drawn at random, always the same."""
    default = task.space.default
    whole = list(islice(task.space, _MOST + 1))
    if len(whole) > _MOST:
        rng = np.random.default_rng(0)
        drawn = [task.space.mutate(default, rng) for _ in range(_MOST // 4)]
        whole = drawn + [task.space.sample(rng) for _ in range(_MOST // 4)]
    return list({choice.text: choice for choice in (default, *whole)}.values())


def _best_by_layout(task: Task, model: CostModel) -> dict[str, Pick]:
    """The likeliest schedule of each layout; the default where there is no other, or the model knows nothing."""
    default = task.space.default
    layout = task.layout(default)
    choices = candidates(task) if model.knows(task.workload.target, task.workload.family) else [default]
    if len(choices) == 1:
        return {layout: Pick(default, 1.0)}
    times = model.members(task.workload.family, [task.features(choice) for choice in choices])
    relative = times - times[:, :1]  # each member's opinion of a schedule beside the default
    ratios = np.exp(relative.mean(axis=0) + _CAUTION * relative.std(axis=0))
    best = {layout: Pick(default, _CLEARLY)}
    for choice, ratio in zip(choices, ratios.tolist()):
        own = task.layout(choice)
        if own not in best or ratio < best[own].ratio:
            best[own] = Pick(choice, ratio)
    return best | ({layout: Pick(default, 1.0)} if best[layout].choice is default else {})


def _cost(tasks: Sequence[Task], options: Sequence[Mapping[str, Pick]], layout: str) -> float:
    """About how many seconds the members take with ``layout``; infinite when one cannot have it."""
    if any(layout not in option for option in options):
        return float("inf")
    return sum(task.weight * about(task) * option[layout].ratio for task, option in zip(tasks, options))


def about(task: Task) -> float:
    """Seconds of one call, very roughly, by its bytes and operations."""
    features = task.features(task.space.default)
    read, flops = (2.0 ** features.get(name, 0.0) for name in ("read", "flops"))
    return float(max(read / _READ, flops / _COMPUTE))
