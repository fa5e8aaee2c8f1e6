"""Scores, budgets, corrections: against plain loops, brute force and least squares."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from tilewright.ir import PassError
from tilewright.passes.structured.ladder import Ladder, cheapest, evenly, lowest, means, steps_of
from tilewright.passes.structured.obs import Removal, corrected, damped
from tilewright.passes.structured.scores import spread

Array = np.ndarray[Any, Any]


def inputs(rng: np.random.Generator, rows: int = 400, k: int = 12) -> Array:
    """Correlated channels with means of their own."""
    mixed = rng.standard_normal((rows, k)) @ (np.eye(k) + 0.4 * rng.standard_normal((k, k)))
    return (mixed + rng.standard_normal(k)).astype(np.float32)


def covariance(x: Array) -> Array:
    return np.cov(x.T.astype(np.float64), bias=True)


def test_mean_and_variance_are_those_of_all_tokens() -> None:
    x = inputs(np.random.default_rng(0)) + 100
    found = spread([x[:90].reshape(9, 10, 12), x[90:].reshape(31, 10, 12)])
    np.testing.assert_allclose(found.mean, x.astype(np.float64).mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.variance, x.astype(np.float64).var(0), rtol=1e-4)


@pytest.mark.parametrize("gone", [[3], [0, 5, 7], [1, 2, 3, 4, 5, 6, 7, 8]])
def test_corrected_columns_are_the_least_squares(gone: list[int]) -> None:
    rng = np.random.default_rng(1)
    x, weight = inputs(rng), rng.standard_normal((5, 12))
    mask = np.isin(np.arange(12), gone)
    new, shares = corrected(weight, covariance(x), mask)
    bias = weight[:, mask] @ (x.mean(0)[mask] - shares @ x.mean(0)[~mask])
    known = np.column_stack([x[:, ~mask], np.ones(len(x))])
    best, *_ = np.linalg.lstsq(known, x @ weight.T, rcond=None)
    np.testing.assert_allclose(np.column_stack([new[:, ~mask], bias]), best.T, atol=1e-4)
    assert not new[:, mask].any()


@pytest.mark.parametrize("size", [1, 3])
def test_removals_cost_what_least_squares_leave(size: int) -> None:
    """Each round takes the units that cost least now, and costs add up to the error of the layer."""
    rng = np.random.default_rng(2)
    x, weight = inputs(rng), rng.standard_normal((5, 12))
    unit = np.repeat(np.arange(12 // size), size)
    c = covariance(x)

    def error(units: list[int]) -> float:
        mask = np.isin(unit, units)
        new, shares = corrected(weight, c, mask)
        rest = x @ (weight - new).T
        bias = weight[:, mask] @ (x.mean(0)[mask] - shares @ x.mean(0)[~mask])
        return float(np.square(rest - bias).sum(1).mean())

    work = Removal(weight.copy(), np.linalg.inv(c), unit, np.zeros(12 // size, np.int64))
    gone: list[int] = []
    total = 0.0
    for taken, harm in work.order(1):
        if len(gone) + 1 < 12 // size:
            alone = {u: error([*gone, u]) for u in range(12 // size) if u not in gone}
            assert taken[0] == min(alone, key=lambda u: alone[u])
            total += harm
            assert total == pytest.approx(alone[int(taken[0])], rel=1e-3)
        gone += taken.tolist()
    assert sorted(gone) == list(range(12 // size))


def test_parties_stay_of_one_size() -> None:
    rng = np.random.default_rng(3)
    x, weight = inputs(rng), rng.standard_normal((5, 12))
    parties = np.array([0, 0, 0, 1, 1, 1])
    work = Removal(weight, np.linalg.inv(covariance(x)), np.repeat(np.arange(6), 2), parties)
    assert all(sorted(parties[units]) == [0, 1] for units, _ in work.order(1))


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(PassError, match="NaN or infinite"):
        damped(np.full((2, 2), np.nan), 0.01)
    np.testing.assert_allclose(np.diag(damped(np.diag([2.0, 0.0]), 0.5)), [2.5, 1.0])


# ---- ladders -----------------------------------------------------------------------------------------------------


def group(count: int, kind: str = "channels", parties: list[int] | None = None) -> Any:
    return cast(Any, SimpleNamespace(count=count, kind=kind, parties=np.array(parties or [0] * count)))


@pytest.mark.parametrize(("count", "multiple"), [(12, 4), (13, 4), (3, 4), (8, 1)])
def test_sizes_that_stay_are_multiples(count: int, multiple: int) -> None:
    score = np.random.default_rng(0).standard_normal(count)
    steps = steps_of(group(count), score, multiple)
    left = [int((steps >= taken).sum()) for taken in range(1, int(steps.max()) + 1)]
    assert all(n % multiple == 0 for n in left)
    order = np.argsort(score)
    assert (np.diff(steps[order]) >= 0).all(), "the lowest go first"
    assert (np.diff(means(steps, score)) > 0).all()


def test_a_step_takes_one_head_of_each_party() -> None:
    steps = steps_of(group(6, "heads", [0, 0, 0, 1, 1, 1]), np.array([3.0, 1, 2, 9, 8, 7]), 32)
    assert steps.tolist() == [2, 0, 1, 2, 1, 0]


def ladders(rng: np.random.Generator, count: int = 4, most: int = 5) -> list[Ladder]:
    found = []
    for _ in range(count):
        steps = int(rng.integers(2, most + 1))
        costs = np.concatenate([np.cumsum(rng.integers(1, 9, steps))[::-1], [0]]).astype(float)
        found.append(Ladder(group(steps), np.arange(steps), np.sort(rng.random(steps)), costs))
    return found


def total(ladders: list[Ladder], taken: Any) -> float:
    return sum(float(lad.costs[n]) for lad, n in zip(ladders, taken))


@pytest.mark.parametrize("seed", range(5))
def test_the_cheapest_sizes_are_those_of_all_choices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = ladders(rng)
    budget = 0.6 * total(found, [0] * 4)
    choices = [c for c in product(*(range(lad.most + 1) for lad in found)) if total(found, c) <= budget]
    if not choices:
        with pytest.raises(PassError, match="at most"):
            cheapest(found, budget)
        return

    def harm(taken: Any) -> float:
        return sum(float(lad.harm[:n].sum()) for lad, n in zip(found, taken))

    taken = cheapest(found, budget)
    assert total(found, taken) <= budget
    assert harm(taken) == pytest.approx(min(map(harm, choices)))


@pytest.mark.parametrize("seed", range(3))
def test_the_lowest_steps_go_until_the_budget_is_met(seed: int) -> None:
    found = ladders(np.random.default_rng(seed))
    least, whole = (total(found, [lad.most if last else 0 for lad in found]) for last in (True, False))
    budget = (least + whole) / 2
    taken = lowest(found, budget)
    assert total(found, taken) <= budget
    last = max((float(lad.harm[n - 1]), i) for i, (lad, n) in enumerate(zip(found, taken)) if n)[1]
    assert total(found, [n - (i == last) for i, n in enumerate(taken)]) > budget, "the last step was needed"
    assert all(lad.harm[n] >= found[last].harm[taken[last] - 1] for lad, n in zip(found, taken) if n < lad.most)
    with pytest.raises(PassError, match=f"{1 - least / whole:.1%} at most"):
        lowest(found, least * 0.9)


def test_even_parts_follow_their_shares() -> None:
    costs = np.arange(20, -1, -1.0)
    found = [Ladder(group(20), np.arange(20), np.zeros(20), costs) for _ in range(3)]
    assert evenly(found, [1, 1, 1], 45) == [5, 5, 5]
    assert evenly(found, [1, 2, 3], 48) == [2, 4, 6]
