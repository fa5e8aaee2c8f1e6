"""How good a cost model is on workloads that it was not trained on.

Scores are those of TenSet (Zheng et al., NeurIPS Datasets 2021): the best time over the best time among the model's k
picks, averaged over workloads, beside what random picks and the rule-based default reach on the same candidates.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from tilewright.costmodel.features import Floats, Trials, log_times, with_failures
from tilewright.costmodel.model import CostModel
from tilewright.costmodel.training import Recipe, train
from tilewright.costmodel.workload import Workload

ALL = "all"
LEAST = 8  # candidates with a time: five picks of fewer prove nothing


@dataclass(frozen=True)
class Scores:
    """Means over workloads; 1 is perfect but for ``spearman`` and ``pairwise``, where 0 and 0.5 are chance.

    ``top1``, ``top5``: best time over that of the best among the model's picks, a pick without a time counting 0;
    ``random1``, ``random5``: what as many random picks reach on average; ``rule``: the default's, NaN when unknown.
    """

    workloads: int
    candidates: int
    top1: float
    top5: float
    pairwise: float
    spearman: float
    random1: float
    random5: float
    rule: float


@dataclass(frozen=True)
class Point:
    """A candidate of a held-out workload: log(time), both relative to the mean of the workload's candidates."""

    family: str
    predicted: float
    measured: float


@dataclass(frozen=True)
class HeldOut:
    """``scores`` by family, and under "all"; ``points`` for a plot."""

    scores: Mapping[str, Scores]
    points: Sequence[Point]


def shape_of(workload: Workload) -> str:
    """Equal for workloads that differ in threads, target or host at most."""
    return repr((workload.family, workload.kernel, workload.sizes))


def kernel_of(workload: Workload) -> str:
    """Equal for all sizes of a kernel's symbolic dims: stricter than ``shape_of``."""
    return repr((workload.family, workload.kernel))


def folds(data: Sequence[Trials], count: int, group: Callable[[Workload], str] = shape_of) -> list[list[Trials]]:
    """``data`` in ``count`` parts, each with its share of each family, no group in two of them."""
    place: dict[str, int] = {}
    for family in sorted({t.workload.family for t in data}):
        groups = {group(t.workload) for t in data if t.workload.family == family}
        shuffled = sorted(groups, key=lambda name: hashlib.sha256(name.encode()).digest())
        place |= {name: (len(place) + index) % count for index, name in enumerate(shuffled)}
    return [[t for t in data if place[group(t.workload)] == index] for index in range(count)]


def cross_validate(
    data: Sequence[Trials],
    recipe: Recipe | None = None,
    count: int = 5,
    seed: int = 0,
    group: Callable[[Workload], str] = shape_of,
) -> HeldOut:
    """Every workload scored by a model trained without its group."""
    rows, points = [], []
    parts = folds(data, count, group)
    for index, held in enumerate(parts):
        rest = [t for other, part in enumerate(parts) if other != index for t in part]
        model = train(rest, recipe, seed)
        rows += list(_rows(model, held))
        points += [point for trials in held for point in points_of(model, trials)]
    return HeldOut(_by_family(rows), points)


def evaluate(model: CostModel, data: Sequence[Trials]) -> dict[str, Scores]:
    """Scores of ``model`` on ``data``, by family and over all of it."""
    return _by_family(list(_rows(model, data)))


def score(times: Floats, predicted: Floats, rule: float = math.nan) -> Scores:
    """Scores of one workload from log(seconds), NaN without a time, what was predicted, and the default's log(seconds)."""
    full = with_failures(times)
    order = np.argsort(predicted, kind="stable")
    return Scores(
        workloads=1,
        candidates=len(times),
        top1=top(times[order], 1),
        top5=top(times[order], 5),
        pairwise=pairwise(full, predicted),
        spearman=spearman(full, predicted),
        random1=random_top(times, 1),
        random5=random_top(times, 5),
        rule=math.exp(np.minimum(0.0, np.nanmin(times) - rule)),  # unlike min, NaN stays NaN
    )


def top(picked: Floats, count: int) -> float:
    """Best time over the best of the first ``count``, from log(seconds) in the order of preference."""
    first = picked[:count]
    return 0.0 if np.all(np.isnan(first)) else math.exp(np.nanmin(picked) - np.nanmin(first))


def random_top(times: Floats, count: int) -> float:
    """The expected ``top`` of ``count`` different candidates drawn at random: exact, by which of them is the best."""
    total = len(times)
    count = min(count, total)
    ordered = np.sort(times)  # NaN last: without a time
    gains = np.where(np.isnan(ordered), 0.0, np.exp(ordered[0] - ordered))
    ways = [math.comb(total - 1 - place, count - 1) / math.comb(total, count) for place in range(total)]
    return float(gains @ np.array(ways))


def pairwise(times: Floats, predicted: Floats) -> float:
    """The share of pairs of different times that are ordered rightly; equal predictions count half. NaN without pairs."""
    left, right = np.triu_indices(len(times), 1)
    faster = np.sign(times[left] - times[right])
    agree = faster * np.sign(predicted[left] - predicted[right])
    return float(np.mean((agree[faster != 0] + 1) / 2)) if np.any(faster) else math.nan


def spearman(times: Floats, predicted: Floats) -> float:
    """Spearman's rank correlation; NaN when one of the two is constant."""
    a, b = _ranks(times), _ranks(predicted)
    a, b = a - a.mean(), b - b.mean()
    length = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / length if length else math.nan


def _ranks(values: Floats) -> Floats:
    """Ranks from 0; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts + 1) / 2)[place], dtype=np.float64)


def _rows(model: CostModel, data: Sequence[Trials]) -> Iterator[tuple[str, Scores]]:
    for trials in data:
        times = log_times(trials.measurements)
        if np.sum(~np.isnan(times)) < LEAST:
            continue
        predicted = model.predict(trials.workload.family, [s.features for s in trials.samples]).mean
        yield trials.workload.family, score(times, predicted, _rule(trials, times))


def _rule(trials: Trials, times: Floats) -> float:
    """log(seconds) of the default: its own measurement, or what the others tell of the baseline."""
    own = [time for time, m in zip(times, trials.measurements) if m.schedule == trials.default and not math.isnan(time)]
    baselines = [m.baseline for m in trials.measurements if m.baseline]
    if own or not baselines:
        return float(own[0]) if own else math.nan
    return math.log(float(np.median(np.array(baselines))))


def points_of(model: CostModel, trials: Trials) -> Iterator[Point]:
    """Each candidate of a workload, for a plot."""
    times = log_times(trials.measurements)
    there = ~np.isnan(times)
    if not np.any(there):
        return
    predicted = model.predict(trials.workload.family, [s.features for s in trials.samples]).mean[there]
    for p, t in zip(predicted - predicted.mean(), times[there] - times[there].mean()):
        yield Point(trials.workload.family, float(p), float(t))


def _by_family(rows: Sequence[tuple[str, Scores]]) -> dict[str, Scores]:
    families = sorted({family for family, _ in rows})
    result = {name: _mean([s for family, s in rows if family == name]) for name in families}
    return {**result, ALL: _mean([s for _, s in rows])} if rows else {}


def _mean(rows: Sequence[Scores]) -> Scores:
    def mean(name: str) -> float:
        values = [v for row in rows if not math.isnan(v := getattr(row, name))]
        return float(np.mean(values)) if values else math.nan

    means = {f.name: mean(f.name) for f in fields(Scores) if f.name not in ("workloads", "candidates")}
    return Scores(len(rows), sum(row.candidates for row in rows), **means)
