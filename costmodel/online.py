"""Learning from the search that is running: what a cost model got wrong about one workload, from its own measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tilewright.costmodel import boosters
from tilewright.costmodel.boosters import Growth, Trees
from tilewright.costmodel.features import Columns, Floats, Sample, log_times, with_failures
from tilewright.costmodel.model import CostModel

MEMBERS = 5  # without a model to start from
ENOUGH = 6  # times that something can be learned from
_CORRECT = Growth(rounds=25, depth=4, rate=0.25, rows=0.8, columns=0.7, least=1.0, shrink=2.0, bins=64)
_ALONE = Growth(rounds=40, depth=5, rate=0.2, rows=0.8, columns=0.7, least=1.0, shrink=1.0, bins=64)
_FOCUS = 1.0
_SLOWEST = np.log(16.0)


class Learner:
    """Predicts log(seconds) of schedules of one workload from ``samples`` of it and, where it knows the family, a model.

    Each member of the model's ensemble gets a small booster of its own for what it leaves unexplained, so that members
    agree where schedules were measured and differ elsewhere. Training takes some 0.1 s. Equal samples, in any order,
    give equal predictions.
    """

    def __init__(self, family: str, model: CostModel | None, samples: Sequence[Sample], seed: int = 0) -> None:
        self._family, self._model = family, model
        ordered = sorted(samples, key=lambda s: s.measurement.schedule)
        times = log_times([s.measurement for s in ordered])
        self._corrections: list[Trees] = []
        self._shift, self._offsets = 0.0, np.zeros(0)
        if np.any(~np.isnan(times)):
            self._anchor(ordered, times)
        if np.sum(~np.isnan(times)) >= ENOUGH:
            self._train(ordered, with_failures(times), seed)

    @property
    def ready(self) -> bool:
        """Whether predictions say anything."""
        return self._model is not None or bool(self._corrections)

    def predict(self, rows: Sequence[Mapping[str, float]]) -> tuple[Floats, Floats]:
        """Mean and standard deviation of log(seconds); a constant is missing until the first measurement."""
        members = self._base(rows)
        if self._corrections:
            matrix = self._columns.matrix(rows)
            members = members + np.array([trees.predict(matrix) for trees in self._corrections])
        return members.mean(axis=0) + self._shift, members.std(axis=0)

    def _base(self, rows: Sequence[Mapping[str, float]]) -> Floats:
        """What the model says, shape [members, rows], each member 0 on average over the samples."""
        if self._model is None:
            return np.zeros((MEMBERS, len(rows)))
        members = self._model.members(self._family, rows)
        return members - self._offsets[:, None] if len(self._offsets) else members

    def _anchor(self, samples: Sequence[Sample], times: Floats) -> None:
        there = ~np.isnan(times)
        self._shift = float(times[there].mean())
        if self._model is not None:
            timed = [s.features for s, ok in zip(samples, there) if ok]
            self._offsets = self._model.members(self._family, timed).mean(axis=1)

    def _train(self, samples: Sequence[Sample], times: Floats, seed: int) -> None:
        rows = [s.features for s in samples]
        slower = np.minimum(times - times.min(), _SLOWEST)
        target = slower + times.min() - self._shift
        weights = np.exp(-_FOCUS * slower)
        weights *= len(weights) / weights.sum()
        self._columns = Columns.varying(rows)
        matrix, growth = self._columns.matrix(rows), _ALONE if self._model is None else _CORRECT
        for index, base in enumerate(self._base(rows)):
            rng = np.random.default_rng([seed, index])
            drawn = weights * rng.exponential(size=len(weights))  # a Bayesian bootstrap: members differ off the samples
            trees = boosters.train(growth, matrix, target, seed=seed * 100 + index, weights=drawn, margin=base)
            self._corrections.append(trees)
