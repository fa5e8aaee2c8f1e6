"""Kernels that read the same weights agree on how these are stored: which layouts there are, and spaces held to one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tilewright.costmodel.workload import Choice, Space, Task

_TRIES = 200  # schedules drawn to find the layouts of a space, or one of a certain layout


@dataclass(frozen=True)
class HeldSpace:
    """The schedules of ``space`` that store weights as ``layout``; ``start`` is one of them."""

    space: Space
    layout_of: Callable[[Choice], str]
    layout: str
    start: Choice

    @property
    def default(self) -> Choice:
        return self.start

    def __iter__(self) -> Iterator[Choice]:
        return filter(self._fits, self.space)

    def parse(self, text: str) -> Choice | None:
        choice = self.space.parse(text)
        return choice if choice is not None and self._fits(choice) else None

    def sample(self, rng: np.random.Generator) -> Choice:
        return self._fitting(lambda: self.space.sample(rng))

    def mutate(self, choice: Choice, rng: np.random.Generator) -> Choice:
        return self._fitting(lambda: self.space.mutate(choice, rng))

    def cross(self, a: Choice, b: Choice, rng: np.random.Generator) -> Choice:
        return self._fitting(lambda: self.space.cross(a, b, rng))

    def _fits(self, choice: Choice) -> bool:
        return self.layout_of(choice) == self.layout

    def _fitting(self, make: Callable[[], Choice]) -> Choice:
        return next(filter(self._fits, (make() for _ in range(_TRIES))), self.start)


def by_layout(task: Task, rng: np.random.Generator) -> dict[str, list[Choice]]:
    """Schedules of ``task`` by layout: the default, those near it, and any; the default's layout comes first."""
    default = task.space.default
    drawn = [default, *(task.space.mutate(default, rng) for _ in range(_TRIES))]
    drawn += [task.space.sample(rng) for _ in range(_TRIES)]
    found: dict[str, dict[str, Choice]] = {}
    for choice in drawn:
        found.setdefault(task.layout(choice), {}).setdefault(choice.text, choice)
    return {layout: list(choices.values()) for layout, choices in found.items()}


def held(task: Task, layout: str, start: Choice) -> Task:
    """``task`` with its schedules held to ``layout``."""
    return replace(task, space=HeldSpace(task.space, task.layout, layout, start))


def grouped(tasks: Sequence[Task]) -> list[list[int]]:
    """Indices of the tasks that must agree, in order; a task that need not agree with any stands alone."""
    found: dict[str, list[int]] = {}
    for i, task in enumerate(tasks):
        found.setdefault(task.group or f"\0{i}", []).append(i)
    return list(found.values())


def common(layouts: Sequence[Iterable[str]]) -> list[str]:
    """The layouts that all have, in the order of the first."""
    first, *others = [list(names) for names in layouts]
    return [name for name in first if all(name in other for other in others)]
