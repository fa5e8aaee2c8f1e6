"""Searching spaces whose best schedule is known."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.synthetic_tuning import (
    FAMILIES,
    ToyRunner,
    ToySpace,
    many_trials,
    measure,
    optimum,
    task,
    true_seconds,
    workload,
)
from tilewright.costmodel.boosters import Growth
from tilewright.costmodel.features import Sample
from tilewright.costmodel.model import CostModel
from tilewright.costmodel.online import Learner
from tilewright.costmodel.search import RandomSearch, Search
from tilewright.costmodel.training import Recipe, train
from tilewright.costmodel.workload import Measurement, Workload

WORKLOADS = (workload("linear", 200, 5120, 3000), workload("linear", 1, 4096, 4000), workload("linear", 37, 1000, 6000))
SMALL = workload("loops", 64, 1000)  # 112 schedules


@cache
def model() -> CostModel:
    """Trained on other sizes than those searched."""
    shapes = {w.sizes for w in WORKLOADS}
    data = [t for t in many_trials({"linear": 40}, seed=5, least=20, most=40) if t.workload.sizes not in shapes]
    return train(data, Recipe(members=4, growth=Growth(rounds=60, depth=5, rate=0.15)))


def drive(search: RandomSearch, trials: int, batch: int = 10) -> list[Measurement]:
    """Ask, measure and tell until ``trials`` are spent."""
    runner, told = ToyRunner(), []
    while len(told) < trials and (choices := search.ask(min(batch, trials - len(told)))):
        found = runner.measure(search.task.workload, search.task.space.default.text, [c.text for c in choices])
        search.tell(found)
        told += found
    return told


def reached(w: Workload, told: list[Measurement]) -> list[float]:
    """After each trial, the noiseless time of the best until then, relative to the optimum."""
    space = ToySpace(FAMILIES[w.family])
    times = [math.inf if m.status != "ok" else true_seconds(w, space.parse(m.schedule)) / optimum(w) for m in told]
    return [float(t) for t in np.minimum.accumulate(times)]


@pytest.mark.parametrize("w", WORKLOADS, ids=lambda w: "x".join(str(size) for _, size in w.sizes))
def test_a_fifth_of_the_trials_that_random_search_takes(w: Workload) -> None:
    ratios = []
    for seed in range(5):
        goal = reached(w, drive(RandomSearch(task(w), seed), 150))[-1]
        ratios.append(reached(w, drive(Search(task(w), seed, model()), 30))[-1] / goal)
    assert np.median(ratios) <= 1.001


def test_without_a_model_it_learns_from_its_own_trials() -> None:
    ends = [reached(WORKLOADS[0], drive(Search(task(WORKLOADS[0]), seed), 70))[-1] for seed in range(3)]
    random = [reached(WORKLOADS[0], drive(RandomSearch(task(WORKLOADS[0]), seed), 70))[-1] for seed in range(3)]
    assert np.mean(ends) < np.mean(random)
    assert np.median(ends) < 1.03


MAKERS: list[Callable[[], RandomSearch]] = [
    lambda: RandomSearch(task(SMALL), 1),
    lambda: Search(task(SMALL), 1),
    lambda: Search(task(WORKLOADS[0]), 1, model()),
]


@pytest.mark.parametrize("make", MAKERS, ids=["random", "alone", "model"])
def test_the_default_is_first_and_nothing_comes_twice(make: Callable[[], RandomSearch]) -> None:
    search = make()
    told = drive(search, 60)
    assert told[0].schedule == search.task.space.default.text
    assert len({m.schedule for m in told}) == 60


@pytest.mark.parametrize("make", MAKERS, ids=["random", "alone", "model"])
def test_equal_seeds_and_measurements_lead_the_same_way(make: Callable[[], RandomSearch]) -> None:
    assert drive(make(), 40) == drive(make(), 40)


def test_another_seed_leads_another_way() -> None:
    first, second = (drive(Search(task(WORKLOADS[0]), seed), 30) for seed in (0, 1))
    assert {m.schedule for m in first} != {m.schedule for m in second}


def test_the_same_in_another_process(tmp_path: Path) -> None:
    """Whatever order sets and dicts have there."""
    model().save(tmp_path / "m")
    program = (
        "import json, sys\n"
        "from tests.unit.test_search import *\n"
        "search = Search(task(WORKLOADS[0]), 7, CostModel.load(sys.argv[1]))\n"
        "print(json.dumps([m.schedule for m in drive(search, 25)]))"
    )
    found = []
    for hashing in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hashing, "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", program, str(tmp_path / "m")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=200)
        found.append(json.loads(done.stdout))
    assert found[0] == found[1] == [m.schedule for m in drive(Search(task(WORKLOADS[0]), 7, model()), 25)]


@pytest.mark.parametrize("kind", [RandomSearch, Search])
def test_a_space_is_exhausted_in_the_end(kind: type[RandomSearch]) -> None:
    search = kind(task(SMALL), 3)
    told = drive(search, 1000, batch=25)
    assert len(told) == len(list(ToySpace(FAMILIES["loops"])))
    assert search.ask(5) == []
    assert search.expected_gain() == 0.0


def test_what_failed_is_never_the_best() -> None:
    search = Search(task(SMALL), 0)
    (default,) = search.ask(1)
    others = [c.text for c in search.ask(5)]
    bad = [
        Measurement(others[0], "wrong", seconds=1e-9, baseline=1e-3),
        Measurement(others[1], "crashed"),
        Measurement(others[2], "timeout"),
        Measurement(others[3], "ok", seconds=0.0, baseline=1e-3),
        Measurement(others[4], "ok", seconds=float("nan"), baseline=1e-3),
    ]
    search.tell(bad)
    assert search.best is None
    search.tell([Measurement(default.text, "ok", seconds=1e-3, baseline=1e-3)])
    assert search.best is not None
    assert search.best.schedule == default.text


def test_the_best_is_by_ratio_not_by_seconds() -> None:
    search = RandomSearch(task(SMALL), 0)
    a, b = (c.text for c in search.ask(2))
    search.tell([Measurement(a, "ok", seconds=1.0, baseline=1.0), Measurement(b, "ok", seconds=1.8, baseline=2.0)])
    assert search.best is not None
    assert search.best.schedule == b


def test_schedules_that_crash_are_avoided() -> None:
    """Half of the space fails: the search learns which half."""
    search = Search(task(WORKLOADS[2]), 0)
    for _ in range(6):
        choices = search.ask(10)
        found = [measure(WORKLOADS[2], c) for c in choices]
        search.tell([replace(m, status="crashed", seconds=None) if "order=1" in m.schedule else m for m in found])
    assert sum("order=1" in c.text for c in search.ask(10)) <= 3  # of a quarter drawn at random


def test_known_measurements_count_and_hints_come_early() -> None:
    space = ToySpace(FAMILIES["linear"])
    known = {m.schedule: m for m in drive(RandomSearch(task(WORKLOADS[0]), 5), 20)}
    rng = np.random.default_rng(0)
    hint = next(c for c in (space.sample(rng) for _ in range(100)) if c.text not in known)
    search = Search(task(WORKLOADS[0]), 0, known=known, hints=["conv{a=1}", hint.text, *known])
    assert search.best is not None
    asked = [c.text for c in search.ask(30)]
    assert asked[0] == hint.text  # the default is known already
    assert not known.keys() & set(asked)
    backwards = Search(task(WORKLOADS[0]), 0, known=dict(reversed(known.items())), hints=[hint.text])
    assert [c.text for c in backwards.ask(30)] == asked


def test_measurements_of_another_space_are_passed_over() -> None:
    search = Search(task(SMALL), 0, known={"conv{a=1}": Measurement("conv{a=1}", "ok", seconds=1e-9, baseline=1.0)})
    assert search.best is None


def test_a_model_that_does_not_know_the_target_is_left_aside() -> None:
    w = replace(WORKLOADS[0], target="cpu{arch=other}")
    assert drive(Search(task(w), 1, model()), 20) == drive(Search(task(w), 1, None), 20)


# --- expected gain ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RandomSearch, Search])
def test_gain_is_infinite_at_first_and_falls_when_batches_are_in_vain(kind: type[RandomSearch]) -> None:
    search = kind(task(WORKLOADS[0]), 0)
    assert search.expected_gain() == math.inf
    drive(search, 30)
    gains = []
    for _ in range(6):
        assert search.best is not None
        search.tell([replace(search.best, schedule=c.text, seconds=1.0) for c in search.ask(5)])
        gains.append(search.expected_gain())
    assert all(math.isfinite(gain) and gain >= 0 for gain in gains)
    assert gains[-1] < gains[0] / 4, gains


def test_gain_counts_the_weight_and_what_came_of_the_last_batch() -> None:
    once, often = (RandomSearch(task(SMALL, weight), 0) for weight in (1.0, 5.0))
    drive(once, 20), drive(often, 20)
    assert often.expected_gain() == pytest.approx(5 * once.expected_gain())
    choice = once.ask(1)[0].text
    before = once.expected_gain()
    assert once.best is not None
    once.tell([replace(once.best, schedule=choice, seconds=once.best.seconds / 2)])
    assert once.expected_gain() > before


def test_gain_is_none_when_nothing_works() -> None:
    search = Search(task(SMALL), 0)
    search.tell([Measurement(c.text, "crashed") for c in search.ask(4)])
    assert search.expected_gain() == 0.0


# --- learning online --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True], ids=["alone", "model"])
def test_measuring_corrects_the_predictions(known: bool) -> None:
    w, space, rng = WORKLOADS[0], ToySpace(FAMILIES["linear"]), np.random.default_rng(0)
    features = task(w).features
    choices = list({c.text: c for c in (space.sample(rng) for _ in range(260))}.values())
    samples = [Sample(features(c), measure(w, c)) for c in choices[:160]]
    rest = [features(c) for c in choices[160:]]
    truth = np.log([true_seconds(w, c) for c in choices[160:]])

    def error(count: int) -> float:
        mean, _ = Learner("linear", model() if known else None, samples[:count]).predict(rest)
        return float(np.std(mean - truth))

    assert error(160) < 0.75 * error(8)
    mean, std = Learner("linear", model() if known else None, samples).predict(rest)
    assert abs(np.median(mean - truth)) < 0.1  # seconds, not only an order
    seen = Learner("linear", model() if known else None, samples).predict([s.features for s in samples])[1]
    assert np.median(seen) < np.median(std)


def test_a_learner_with_nothing_says_so() -> None:
    assert not Learner("linear", None, []).ready
    assert Learner("linear", model(), []).ready
