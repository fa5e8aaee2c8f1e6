"""Searching the schedules of one task: by evolution under a cost model, or at random.

``ask`` names schedules to measure, ``tell`` takes what came of them; nothing here touches hardware. Equal seeds and equal
measurements lead to equal schedules, in any process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from tilewright.costmodel.features import Floats, Sample, log_times
from tilewright.costmodel.model import CostModel
from tilewright.costmodel.online import Learner
from tilewright.costmodel.workload import Choice, Measurement, Task

_PATIENCE = 200  # draws without anything new before a space counts as exhausted, and at least
_PATIENCE_EACH = 8  # so many for each schedule that was drawn already
_NOISE = 0.01  # a better time by less than this is none
_TRUST = 0.7  # a batch without improvement leaves so much of the gain that is hoped for
_POPULATION, _GENERATIONS, _ELITE = 96, 4, 24
_DOUBT, _DOUBT_ALONE = 1.0, 2.0  # standard deviations that an uncertain schedule is taken as faster; without a model
_RANDOM, _RANDOM_ALONE = 0.1, 0.25  # share of a batch that is drawn at random; without a model


class Searching(Protocol):
    """A search over the schedules of one task."""

    def ask(self, count: int) -> list[Choice]: ...

    def tell(self, measurements: Sequence[Measurement]) -> None: ...

    def expected_gain(self) -> float: ...


Strategy = Callable[[Task, int], Searching]
"""Makes the search of a task from a seed."""


class RandomSearch:
    """Schedules drawn at random, the default first.

    ``known`` are measurements from before; ``hints`` are texts of schedules to try early, such as the best of kernels
    like this one, those outside the space are passed over. ``best`` is the fastest schedule with a time, by its ratio to
    the baseline.
    """

    def __init__(
        self, task: Task, seed: int = 0, known: Mapping[str, Measurement] | None = None, hints: Iterable[str] = ()
    ) -> None:
        self.task, self.seed = task, seed
        self.best: Measurement | None = None
        self.told: dict[str, Measurement] = {}
        self._asked: set[str] = set()
        self._first = [task.space.default, *(c for text in hints if (c := task.space.parse(text)) is not None)]
        self._stale = 0
        self._recent = 0.0
        self._exhausted = False
        self._take([m for _, m in sorted((known or {}).items())])

    def ask(self, count: int) -> list[Choice]:
        """Up to ``count`` schedules that were never asked for nor told, [] when there are none left."""
        chosen: dict[str, Choice] = {}
        known = len(self._asked | self.told.keys())
        rng = np.random.default_rng([self.seed, int(self.task.workload.key[:16], 16), known])

        def take(choices: Iterable[Choice]) -> None:
            for choice in choices:
                if len(chosen) < count and self._is_new(choice, chosen):
                    chosen[choice.text] = choice

        take(self._first)
        if len(chosen) < count:
            take(self._propose(count - len(chosen), rng))
        while len(chosen) < count and (drawn := self._draw(rng, chosen)) is not None:
            chosen[drawn.text] = drawn
        self._exhausted = len(chosen) < count
        self._asked |= chosen.keys()
        return list(chosen.values())

    def tell(self, measurements: Sequence[Measurement]) -> None:
        """Take one batch of measurements, asked for or not."""
        earlier = set(self.told)
        self._take(measurements)
        before, after = self._seconds(earlier), self._seconds(self.told)
        gained = before - after if math.isfinite(before) else 0.0
        improved = not math.isfinite(before) or gained > _NOISE * before
        self._stale = 0 if improved else self._stale + 1
        self._recent = (self._recent + max(0.0, gained)) / 2

    def expected_gain(self) -> float:
        """Seconds, times the task's weight, that a further batch may save: only good for comparing tasks.

        Infinite before anything was measured, 0 for an exhausted space. As in Ansor's task scheduler (Zheng et al., OSDI
        2020) it is the mean of what the latest batches brought and of what is hoped for, less for each batch in vain.
        """
        if not self.told and not self._exhausted:
            return math.inf
        seconds = self._seconds(self.told)
        if self._exhausted or not math.isfinite(seconds):
            return 0.0
        hoped = seconds * self._hoped() * _TRUST**self._stale
        return self.task.weight * (self._recent + hoped) / 2

    def _hoped(self) -> float:
        """The share of the best time that may be saved."""
        return 1 / (1 + len(self.told))

    def _propose(self, count: int, rng: np.random.Generator) -> Iterable[Choice]:
        return ()

    def _take(self, measurements: Sequence[Measurement]) -> None:
        self.told |= {m.schedule: m for m in measurements if self.task.space.parse(m.schedule) is not None}
        measured = list(self.told.values())
        times = log_times(measured)
        if np.any(~np.isnan(times)):
            self.best = measured[int(np.nanargmin(times))]

    def _seconds(self, schedules: Container[str]) -> float:
        """Of the fastest of ``schedules``, at the speed that the machine had in the middle of the search; else infinite."""
        times = log_times(self.told.values())
        there = [t for t, text in zip(times, self.told) if text in schedules and not math.isnan(t)]
        return math.exp(min(there, default=math.inf))

    def _is_new(self, choice: Choice, beside: Mapping[str, object]) -> bool:
        return choice.text not in beside and choice.text not in self._asked and choice.text not in self.told

    def _draw(self, rng: np.random.Generator, beside: Mapping[str, object]) -> Choice | None:
        """A new schedule at random; None when so many draws in a row gave known ones that there can be none left."""
        seen = len(beside) + len(self._asked | self.told.keys())
        for _ in range(max(_PATIENCE, _PATIENCE_EACH * seen)):
            choice = self.task.space.sample(rng)
            if self._is_new(choice, beside):
                return choice
        return None


class Search(RandomSearch):
    """Evolution: schedules that a cost model takes for fast, bred from those measured as fast and from random ones.

    ``model`` may be None, or not know the family: then it learns from this task's measurements alone, the first batch
    being random. A measured batch corrects it either way.
    """

    def __init__(
        self,
        task: Task,
        seed: int = 0,
        model: CostModel | None = None,
        known: Mapping[str, Measurement] | None = None,
        hints: Iterable[str] = (),
    ) -> None:
        w = task.workload
        self._model = model if model is not None and model.knows(w.target, w.family) else None
        self._doubt, self._random = (_DOUBT, _RANDOM) if self._model else (_DOUBT_ALONE, _RANDOM_ALONE)
        self._features: dict[str, Mapping[str, float]] = {}
        self._learner: Learner | None = None
        self._pool: list[Choice] = []
        super().__init__(task, seed, known, hints)

    def _take(self, measurements: Sequence[Measurement]) -> None:
        super()._take(measurements)
        self._learner = None

    def _propose(self, count: int, rng: np.random.Generator) -> Iterable[Choice]:
        learner = self._learned()
        if not learner.ready:
            return ()
        pool = self._evolve(learner, rng)
        ranked = [pool[text] for text in self._ranked(learner, pool)]
        self._pool = ranked[: 4 * count]
        return ranked[: count - int(self._random * count + rng.random())]

    def _learned(self) -> Learner:
        if self._learner is None:
            samples = [Sample(self._describe(self._parsed(text)), m) for text, m in self.told.items()]
            self._learner = Learner(self.task.workload.family, self._model, samples, self.seed)
        return self._learner

    def _evolve(self, learner: Learner, rng: np.random.Generator) -> dict[str, Choice]:
        """New schedules by text: a population and its children, generation by generation."""
        space = self.task.space
        population: dict[str, Choice] = {c.text: c for c in self._fastest()}
        for _ in range(_POPULATION):
            drawn = space.sample(rng)
            population.setdefault(drawn.text, drawn)
        pool = {text: choice for text, choice in population.items() if self._is_new(choice, {})}
        for _ in range(_GENERATIONS):
            parents = [population[text] for text in self._ranked(learner, population)][:_POPULATION]
            children = [self._child(parents, rng) for _ in range(_POPULATION)]
            population = {c.text: c for c in (*parents, *children)}
            pool |= {c.text: c for c in children if self._is_new(c, {})}
        return pool

    def _child(self, parents: Sequence[Choice], rng: np.random.Generator) -> Choice:
        """Of two of ``parents``, the first ones being likelier, or of one that is mutated."""
        a, b = (parents[int(len(parents) * rng.random() ** 2)] for _ in range(2))
        child = self.task.space.cross(a, b, rng) if rng.random() < 0.4 else a
        return child if child.text not in (a.text, b.text) else self.task.space.mutate(child, rng)

    def _ranked(self, learner: Learner, choices: Mapping[str, Choice]) -> list[str]:
        """The texts of ``choices``, the most promising first."""
        texts = sorted(choices)
        mean, std = self._predict(learner, [choices[text] for text in texts])
        return [texts[index] for index in np.argsort(mean - self._doubt * std, kind="stable")]

    def _fastest(self) -> list[Choice]:
        """The best that were measured."""
        texts = sorted(self.told)
        times = log_times([self.told[text] for text in texts])
        order = [int(index) for index in np.argsort(times, kind="stable") if not math.isnan(times[index])]
        return [self._parsed(texts[index]) for index in order[:_ELITE]]

    def _hoped(self) -> float:
        """By what is predicted of schedules that are not measured yet, the uncertain ones getting some of the doubt."""
        left = [choice for choice in self._pool if self._is_new(choice, {})]
        learner = self._learned()
        if not left or not learner.ready:
            return super()._hoped()
        mean, std = self._predict(learner, left)
        best = math.log(self._seconds(self.told))
        return float(np.max(-np.expm1(np.minimum(mean - self._doubt * std - best, 0.0))))

    def _predict(self, learner: Learner, choices: Sequence[Choice]) -> tuple[Floats, Floats]:
        return learner.predict([self._describe(choice) for choice in choices])

    def _describe(self, choice: Choice) -> Mapping[str, float]:
        if choice.text not in self._features:
            self._features[choice.text] = self.task.features(choice)
        return self._features[choice.text]

    def _parsed(self, text: str) -> Choice:
        choice = self.task.space.parse(text)
        assert choice is not None  # told keeps none that is not of the space
        return choice
