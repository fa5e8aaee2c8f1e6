"""From measurements to schedules: which of those tried are worth taking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tilewright.costmodel.layouts import grouped
from tilewright.costmodel.workload import Measurement, Task

CONFIRMED = "confirmed"
"""The metric of a measurement that was taken a second time, for longer."""
CLEARLY = 0.99
"""Time relative to the default from which on a schedule is faster."""
_DOUBT = 1.04  # the best of many short measurements looks better than it is

Known = Mapping[str, Measurement]


def believed(m: Measurement) -> float:
    """Time relative to the default, with a margin for what was not confirmed; infinite where there is none."""
    if m.ratio is None:
        return float("inf")
    return m.ratio if m.metrics.get(CONFIRMED) else m.ratio * _DOUBT


def decide(tasks: Sequence[Task], known: Sequence[Known]) -> list[Measurement | None]:
    """For each task the measurement of the schedule to take, None for the default.

    Nothing is taken that is slower than the default. Members of a group take one layout: that with which they are fastest
    together.
    """
    chosen: list[Measurement | None] = [None] * len(tasks)
    for members in grouped(tasks):
        options = [_best_by_layout(tasks[i], known[i]) for i in members]
        weights = [tasks[i].weight * _seconds(known[i]) for i in members]
        costs = {layout: _cost(options, weights, layout) for layout in options[0]}
        best = min(costs, key=lambda layout: costs[layout])
        for i, option in zip(members, options):
            chosen[i] = option[best]
    return chosen


def _best_by_layout(task: Task, known: Known) -> dict[str, Measurement | None]:
    """The fastest schedule of each layout that was tried; None stands for the default, whose layout is always there."""
    default = task.space.default
    best: dict[str, Measurement | None] = {task.layout(default): None}
    limits = {task.layout(default): CLEARLY}
    for m in sorted(known.values(), key=lambda m: (believed(m), m.schedule)):
        choice = task.space.parse(m.schedule)
        if choice is None or choice.text == default.text:
            continue
        layout = task.layout(choice)
        if believed(m) <= limits.get(layout, 1.0) and best.get(layout) is None:
            best[layout] = m
    return best


def _cost(options: Sequence[Mapping[str, Measurement | None]], weights: Sequence[float], layout: str) -> float:
    """Seconds of all members with ``layout``; infinite when one cannot have it, or it would not pay."""
    if any(layout not in option for option in options):
        return float("inf")
    found = [option[layout] for option in options]
    cost = sum(weight * (believed(m) if m else 1.0) for weight, m in zip(weights, found))
    default = next(iter(options[0]))
    pays = layout == default or cost < CLEARLY * sum(weights)
    return cost if pays else float("inf")


def _seconds(known: Known) -> float:
    """What the default takes; 1 where nothing was measured."""
    return next((m.baseline for m in known.values() if m.baseline), 1.0)
