"""The comparisons of searches and with MetaSchedule: what is counted, and the pages. Nothing is measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tuning import metaschedule, searching
from benchmarks.tuning.searching import ALONE, MODEL, RANDOM, Times, curve, reached
from tests.synthetic_tuning import ToyRunner, task, workload
from tilewright.costmodel.database import Database
from tilewright.costmodel.search import RandomSearch, Search
from tilewright.costmodel.workload import Measurement

SMALL = workload("loops", 64, 1000)  # 112 schedules


class Counting(ToyRunner):
    """Keeps what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def measure(self, *args: Any, **kwargs: Any) -> list[Measurement]:
        self.asked += args[2] if args[3] == 1.0 else []
        return super().measure(*args, **kwargs)


def seed(random: list[float], model: list[float], alone: list[float]) -> dict[str, list[float]]:
    return {RANDOM: random, MODEL: model, ALONE: alone}


def search_case(**more: Any) -> dict[str, Any]:
    about = {"name": "decode-int4-linear", "model": "L", "operations": "k1 linear", "space": 480, "measured": 30}
    when = {"host": "a CPU", "threads": 2, "date": "2026-01-01", "commit": "abc"}
    seeds = [seed([1.0, 0.9, 0.9, 0.8], [1.0, 0.8], [1.0, 1.0, 1.0, 1.0]), seed([1.0] * 9 + [0.5], [0.505], [0.5])]
    return {**about, **when, "asked": 10, "seeds": seeds, **more}


def test_searches_share_measurements_and_a_second_run_measures_nothing(tmp_path: Path) -> None:
    runner = Counting()
    with Database(tmp_path / "times.db") as database:
        first = [curve(make(task(SMALL), 3), Times(task(SMALL), database, runner), 60) for make in (RandomSearch, Search)]
        assert len(runner.asked) == len(set(runner.asked))
        count = len(runner.asked)
        again = [curve(make(task(SMALL), 3), Times(task(SMALL), database, runner), 60) for make in (RandomSearch, Search)]
    assert again == first
    assert len(runner.asked) == count


def test_a_curve_falls_and_ends_with_its_goal_the_trials_or_the_space(tmp_path: Path) -> None:
    with Database(tmp_path / "times.db") as database:
        times = Times(task(SMALL), database, ToyRunner())
        whole = curve(RandomSearch(task(SMALL), 0), times, 500)
        assert len(whole) == len(list(task(SMALL).space))
        assert whole == sorted(whole, reverse=True)
        assert len(curve(RandomSearch(task(SMALL), 0), times, 10)) == 10
        assert len(curve(RandomSearch(task(SMALL), 0), times, 500, whole[0])) == searching.BATCH


def test_counts_begin_at_one() -> None:
    assert reached([1.0, 0.9, 0.9], 1.0) == 1
    assert reached([1.0, 0.9, 0.9], 0.9) == 2
    assert reached([1.0, 0.9, math.inf], 0.8) is None


def test_medians_count_seeds_that_never_got_there() -> None:
    assert searching.counts(search_case(), RANDOM) == [4, 10]
    assert searching.counts(search_case(), MODEL) == [2, None]
    assert searching.counts(search_case(), MODEL, 1.01) == [2, 1]
    assert searching.median([2, None, 3]) == 3
    assert searching.middle([2, None, None]) == "-"


@pytest.mark.parametrize(("model", "verdict"), [([1.0, 0.5], "hit"), ([1.0, 1.0, 0.5], "missed"), ([1.0], "missed")])
def test_the_goal_is_a_fifth_of_the_trials(model: list[float], verdict: str) -> None:
    case = search_case(seeds=[seed([1.0] * 9 + [0.5], model, [0.5])])
    assert f"| {verdict} |" in searching.table([case])
    assert verdict in searching.page([case])


def test_results_of_a_case_take_the_place_of_earlier_ones(tmp_path: Path) -> None:
    path = tmp_path / "searching.json"
    searching.keep(path, search_case())
    searching.keep(path, search_case(name="prefill-int8-linear"))
    cases = searching.keep(path, search_case(space=7))
    assert [(c["name"], c["space"]) for c in cases] == [("prefill-int8-linear", 480), ("decode-int4-linear", 7)]


def product(name: str) -> dict[str, Any]:
    theirs = {"trials": 64, "wall": 100.0, "packed": True}
    own = {"trials": 64, "wall": 10.0, "schedule": "linear{tile_m=4}"}
    case = metaschedule.CASES[name]
    seconds = [1.0, 2.0, 3.0]
    rounds = [{"peak": 2 * case.work / s, metaschedule.THEIRS: 2 * s, metaschedule.TUNED: s} for s in seconds]
    when = {"host": "a CPU", "threads": 2, "date": "2026-01-01", "commit": "abc", "copies": 3, "asked": 64}
    what = {"name": name, "rows": case.rows, "features": case.features, "k": case.k}
    return {**what, **when, "rounds": rounds, "systems": {metaschedule.THEIRS: theirs, metaschedule.TUNED: own}}


def test_the_page_has_ratios_and_shares_taken_within_rounds() -> None:
    page = metaschedule.page([product("gemm"), product("gemv")])
    assert "| tuned | 2.1 | 50 % | 2.00 (2.00-2.00) | 64 | 10 s | `linear{tile_m=4}` |" in page
    assert "| MetaSchedule | 1.1 | 25 % |  | 64 | 100 s | weight packed: yes |" in page
    assert "GB/s" in page


def test_who_began_a_round_is_last_in_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metaschedule, "PAUSE", 0.0)
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return 1.0

    metaschedule.in_turns({"a": lambda: run("a"), "b": lambda: run("b")}, lambda: run("peak"))
    assert order[:6] == ["peak", "a", "b", "peak", "b", "a"]
