"""Scores against values worked out by hand, against scipy, and against draws."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from tests.synthetic_tuning import many_trials
from tilewright.costmodel.boosters import Growth
from tilewright.costmodel.features import Sample, Trials
from tilewright.costmodel.scores import cross_validate, folds, kernel_of, pairwise, random_top, score, shape_of, spearman
from tilewright.costmodel.training import Recipe
from tilewright.costmodel.workload import Measurement, Workload

TIMES = np.log([4.0, 1.0, 2.0, 8.0, np.nan, 5.0, 10.0])
PREDICTED = np.array([0.3, 0.2, 0.1, 0.9, 0.0, 0.5, 0.7])  # picks in order: NaN, 2, 1, 4, 5, 10, 8


def test_scores_of_one_workload_by_hand() -> None:
    s = score(TIMES, PREDICTED, rule=math.log(4.0))
    assert s.top1 == 0.0  # the pick gave no time
    assert s.top5 == pytest.approx(1.0)
    assert s.rule == pytest.approx(1 / 4)
    assert s.random1 == pytest.approx((1 / 4 + 1 + 1 / 2 + 1 / 8 + 0 + 1 / 5 + 1 / 10) / 7)
    assert score(TIMES[:4], PREDICTED[:4]).top1 == pytest.approx(1 / 2)
    assert math.isnan(score(TIMES, PREDICTED).rule)


def test_random_picks_are_exact() -> None:
    def reached(drawn: tuple[float, ...]) -> float:
        there = [t for t in drawn if not math.isnan(t)]
        return math.exp(np.nanmin(TIMES) - min(there)) if there else 0.0

    for count in (1, 2, 5):
        every = [reached(drawn) for drawn in itertools.combinations(TIMES, count)]
        assert random_top(TIMES, count) == pytest.approx(np.mean(every))
    assert random_top(TIMES[:3], 5) == pytest.approx(1.0)  # fewer candidates than picks


def test_pairwise_by_hand() -> None:
    assert pairwise(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0])) == 1
    assert pairwise(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])) == 0
    assert pairwise(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])) == pytest.approx(2 / 3)
    assert pairwise(np.array([1.0, 2.0, 2.0]), np.array([5.0, 5.0, 6.0])) == pytest.approx((0.5 + 1) / 2)
    assert math.isnan(pairwise(np.array([1.0, 1.0]), np.array([1.0, 2.0])))


def test_spearman_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, 15).astype(float), rng.normal(size=15)
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert math.isnan(spearman(np.ones(4), np.arange(4.0)))


def test_folds_part_shapes_and_families() -> None:
    data = many_trials({"linear": 11, "loops": 7}, least=5, most=5)
    first = data[0]
    twin = Trials(Workload(**{**vars_of(first.workload), "threads": 1}), first.samples)
    parts = folds([*data, twin], 3)
    assert sorted(t.workload.key for part in parts for t in part) == sorted(t.workload.key for t in [*data, twin])
    shapes = [{shape_of(t.workload) for t in part} for part in parts]
    assert all(not a & b for a, b in itertools.combinations(shapes, 2))
    for family, least in (("linear", 3), ("loops", 2)):
        assert all(sum(t.workload.family == family for t in part) >= least for part in parts)
    assert folds([twin, *reversed(data)], 3)[0][0].workload.key in {t.workload.key for t in parts[0]}
    assert [len(part) for part in folds(data, 3, kernel_of)].count(0) == 1  # two kernels only


def vars_of(w: Workload) -> dict[str, object]:
    return {name: getattr(w, name) for name in ("family", "kernel", "sizes", "target", "threads", "host")}


def test_cross_validation_scores_every_workload_beside_random_and_rule() -> None:
    data = many_trials({"linear": 12, "loops": 9}, least=10, most=20)
    failed = [Sample({"a": 1.0}, Measurement(str(i), "crashed")) for i in range(9)]
    none = Trials(Workload("loops", "module", (("m", 3),), "t", 1, "h"), tuple(failed))
    recipe = Recipe(members=2, growth=Growth(rounds=20, depth=4, rate=0.3))
    held = cross_validate([*data, none], recipe, 3)
    assert set(held.scores) == {"linear", "loops", "all"}
    whole = held.scores["all"]
    assert whole.workloads == 21
    assert whole.candidates == sum(len(t.samples) for t in data)
    assert whole.top1 == pytest.approx((12 * held.scores["linear"].top1 + 9 * held.scores["loops"].top1) / 21)
    assert whole.random1 < whole.top1 <= whole.top5 <= 1
    assert whole.random1 < whole.random5
    assert whole.rule < whole.top1
    assert {p.family for p in held.points} == {"linear", "loops"}
    measured, predicted = (np.array([getattr(p, name) for p in held.points]) for name in ("measured", "predicted"))
    assert np.corrcoef(measured, predicted)[0, 1] > 0.5
