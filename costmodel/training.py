"""Trials to a cost model.

What matters is the order of the schedules of one workload, so times are taken relative to a reference of their workload,
and whole workloads, not rows, are drawn for each member of the ensemble.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from tilewright.costmodel import boosters
from tilewright.costmodel.boosters import Growth, Trees
from tilewright.costmodel.features import Columns, Floats, Sample, Trials, log_times, with_failures
from tilewright.costmodel.model import FACTS, CostModel, ModelError, Part, with_family

_FACT_GROWTH = Growth(rounds=60, depth=5, rate=0.2)
_LEAST_FACTS = 20  # rows that tell a fact of the code


@dataclass(frozen=True)
class Recipe:
    """How a model is made of trials.

    ``joint``: one set of trees for all families, with the family as a feature. ``objective``: ``squared`` regresses
    log(time), ``pairwise`` orders (LambdaRank with the pairwise loss). ``reference``: what a time is relative to, the
    geometric mean of the workload's times or the best. ``focus``: a schedule slower than the best by a factor r counts
    as r ** -focus. ``slowest``: slower ones than the best by this factor are taken as slower by it.
    """

    joint: bool = False
    objective: Literal["squared", "pairwise"] = "squared"
    reference: Literal["mean", "best"] = "mean"
    focus: float = 1.5
    slowest: float = 16.0
    members: int = 6
    growth: Growth = field(default_factory=Growth)


@dataclass(frozen=True)
class _Rows:
    """The trials of one workload, ready for training."""

    family: str
    features: tuple[Mapping[str, float], ...]
    target: Floats
    weights: Floats
    samples: tuple[Sample, ...]


def train(
    data: Sequence[Trials], recipe: Recipe | None = None, seed: int = 0, meta: Mapping[str, Any] | None = None
) -> CostModel:
    """A model of ``data``; equal arguments give equal models, in whatever order the trials come.

    Raises ModelError when no workload has two schedules with a time.
    """
    recipe = recipe or Recipe()
    usable = sorted((t for t in data if _usable(t)), key=lambda t: t.workload.key)
    if not usable:
        raise ModelError("no workload has two schedules with a time: nothing to learn from; measure more")
    rows = [_prepare(trials, recipe) for trials in usable]
    families = [""] if recipe.joint else sorted({r.family for r in rows})
    parts = {f: _part([r for r in rows if recipe.joint or r.family == f], recipe, seed) for f in families}
    counts: dict[str, Counter[str]] = {}
    for trials in usable:
        counts.setdefault(trials.workload.target, Counter())[trials.workload.family] += 1
    known = {target: dict(by_family) for target, by_family in counts.items()}
    return CostModel(parts, known, {"recipe": asdict(recipe), "seed": seed, **(meta or {})})


def _usable(trials: Trials) -> bool:
    times = log_times(trials.measurements)
    return bool(np.sum(~np.isnan(times)) >= 2)


def _prepare(trials: Trials, recipe: Recipe) -> _Rows:
    samples = tuple(sorted(trials.samples, key=lambda s: s.measurement.schedule))
    times = with_failures(log_times([s.measurement for s in samples]))
    slower = np.minimum(times - times.min(), np.log(recipe.slowest))
    family = trials.workload.family
    features = tuple(with_family(s.features, family) if recipe.joint else s.features for s in samples)
    target = slower - slower.mean() if recipe.reference == "mean" else slower
    return _Rows(family, features, target, np.exp(-recipe.focus * slower), samples)


def _part(rows: Sequence[_Rows], recipe: Recipe, seed: int) -> Part:
    every = [features for r in rows for features in r.features]
    columns = Columns.of(every)
    required = frozenset.intersection(*(frozenset(features) for features in every))
    matrices = [columns.matrix(r.features) for r in rows]
    seen = np.concatenate(matrices).astype(np.float64)
    low, high = (np.nan_to_num(end.reduce(seen, axis=0)) for end in (np.fmin, np.fmax))  # these pass over NaN
    members, scales = [], []
    for index in range(recipe.members):
        drawn = _draw(len(rows), index, seed)
        trees = _member(recipe, [rows[i] for i in drawn], [matrices[i] for i in drawn], seed * 1000 + index)
        members.append(trees)
        scales.append(_scale(trees, rows, matrices) if recipe.objective == "pairwise" else 1.0)
    facts = {name: _fact(name, rows, columns, seed) for name in FACTS}
    told = {name: trees for name, trees in facts.items() if trees is not None}
    return Part(columns, low, high, required, tuple(members), tuple(scales), told)


def _draw(count: int, index: int, seed: int) -> list[int]:
    """Four workloads of five for each member; few are not thinned out."""
    if count < 5:
        return list(range(count))
    rng = np.random.default_rng([seed, index])
    return sorted(int(i) for i in rng.permutation(count)[: max(4, count * 4 // 5)])


def _member(recipe: Recipe, rows: Sequence[_Rows], matrices: Sequence[boosters.Matrix], seed: int) -> Trees:
    matrix, target = np.concatenate(matrices), np.concatenate([r.target for r in rows])
    if recipe.objective == "squared":
        weights = np.concatenate([r.weights for r in rows])
        return boosters.train(recipe.growth, matrix, target, seed=seed, weights=weights)
    groups = [len(r.target) for r in rows]
    return boosters.train(recipe.growth, matrix, -target, seed=seed, objective="rank:pairwise", groups=groups)


def _scale(trees: Trees, rows: Sequence[_Rows], matrices: Sequence[boosters.Matrix]) -> float:
    """What makes log(time) of a ranking's score: the slope of the one over the other within workloads."""
    above = below = 0.0
    for r, matrix in zip(rows, matrices):
        score = trees.predict(matrix)
        score -= score.mean()
        above += float(score @ (r.target - r.target.mean()))
        below += float(score @ score)
    return above / below if below else -1.0


def _fact(name: str, rows: Sequence[_Rows], columns: Columns, seed: int) -> Trees | None:
    told = [
        (features, sample.measurement.metrics[name])
        for r in rows
        for features, sample in zip(r.features, r.samples)
        if name in sample.measurement.metrics
    ]
    if len(told) < _LEAST_FACTS:
        return None
    target = np.log1p(np.maximum(np.array([value for _, value in told], dtype=np.float64), 0.0))
    return boosters.train(_FACT_GROWTH, columns.matrix([features for features, _ in told]), target, seed=seed)
