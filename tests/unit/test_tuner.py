"""The tuner: budgets, resuming, layouts, what is taken. A made-up machine stands for hardware."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar

import pytest

from tilewright.codegen.schedule import Schedule, Space, knob
from tilewright.codegen.target import parse_target
from tilewright.costmodel.choice import CONFIRMED, believed, decide
from tilewright.costmodel.search import RandomSearch
from tilewright.costmodel.tuner import Budget, Progress, Tuner
from tilewright.costmodel.workload import Measurement, Task, Workload

TARGET = parse_target("x86-64-v3")


@dataclass(frozen=True)
class Knobs(Schedule):
    """Best at a=5, b=2; ``panel`` is how weights are stored."""

    name: ClassVar[str] = "knobs"
    a: int = knob(1, tuple(range(8)))
    b: int = knob(0, tuple(range(4)))
    panel: int = knob(1, (1, 2, 3))


def cost(schedule: Knobs, likes: int) -> float:
    """Seconds; ``likes`` is the panel that a kernel is fastest with."""
    return 1e-3 * (1 + (schedule.a - 5) ** 2 + (schedule.b - 2) ** 2 + 3 * abs(schedule.panel - likes))


def features(schedule: Knobs) -> dict[str, float]:
    return {"a": schedule.a, "b": schedule.b, "panel": schedule.panel}


def task(name: str, weight: float = 1.0, group: str = "", likes: int = 1) -> Task:
    workload = Workload("toy", f"{name} {likes}", (), TARGET.text, 1, "made up")
    return Task(workload, Space(Knobs, TARGET), features, weight, name, group, lambda s: f"panel{s.panel}")


@dataclass
class Machine:
    """Measures by formula; ``bad`` schedules fail as they are told to."""

    bad: Mapping[str, str] = field(default_factory=dict)
    calls: list[tuple[str, int]] = field(default_factory=list)
    stop_after: int | None = None
    optimism: float = 1.0
    """What a short measurement of anything but the baseline makes of the time."""

    def measure(
        self, workload: Workload, baseline: str, schedules: Sequence[str], effort: float = 1.0
    ) -> list[Measurement]:
        space = Space(Knobs, TARGET)
        likes = int(workload.kernel.split()[1])
        base = cost(space.parse(baseline), likes)
        if self.stop_after is not None and sum(n for _, n in self.calls) + len(schedules) > self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((workload.kernel.split()[0], len(schedules)))
        found = []
        for text in schedules:
            seconds = cost(space.parse(text), likes) * (self.optimism if effort == 1 and text != baseline else 1.0)
            good = Measurement(text, "ok", seconds, 0.01, int(10 * effort), base)
            found.append(Measurement(text, self.bad[text], error="planted") if text in self.bad else good)  # type: ignore[arg-type]
        return found


class Notes:
    """A database in memory."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], dict[str, Measurement]] = {}
        self.added: list[str] = []

    def add(self, workload: Workload, compiler: str, measurements: Sequence[Measurement]) -> None:
        self.rows.setdefault((workload.key, compiler), {}).update({m.schedule: m for m in measurements})
        self.added += [m.schedule for m in measurements]

    def find(self, workload: Workload, compiler: str) -> Mapping[str, Measurement]:
        return dict(self.rows.get((workload.key, compiler), {}))

    def timeless(self) -> dict[tuple[str, str], dict[str, Measurement]]:
        """All but what measuring itself took."""
        return {key: {text: replace(m, metrics={**m.metrics, "wall": 0}) for text, m in found.items()}
                for key, found in self.rows.items()}  # fmt: skip


def tune(tasks: Sequence[Task], machine: Machine, notes: Notes | None = None, trials: int = 120, **options):
    tuner = Tuner(tasks, machine, notes or Notes(), "v1", batch=options.pop("batch", 8), **options)
    return tuner.run(Budget(trials))


def test_it_finds_the_best_schedule_and_says_what_it_gained() -> None:
    result = tune([task("k")], Machine(), trials=96)
    [row] = result.rows
    assert row.schedule == "knobs{a=5 b=2 panel=1}"
    assert result.gain == row.ratio == pytest.approx(1 / 21)
    assert [name for name, _ in result.history] == ["k"] * 96
    assert result.history[0][1].ratio == 1.0, "the default comes first"


def test_the_budget_of_trials_is_kept() -> None:
    machine = Machine()
    result = tune([task("a"), task("b")], machine, trials=37)
    assert result.trials == 37 == len(result.history)
    short = sum(count for _, count in machine.calls) - result.trials
    assert 0 <= short <= 4, "only finalists are measured beyond it"


def test_kernels_that_matter_more_get_more_trials() -> None:
    result = tune([task("dear", 100.0), task("cheap", 0.01)], Machine(), trials=60)
    dear, cheap = result.rows
    assert dear.trials > 2 * cheap.trials


def test_equal_seeds_go_the_same_way_and_others_do_not() -> None:
    runs = []
    for seed in (3, 3, 4):
        notes = Notes()
        tune([task("k")], Machine(), notes, trials=40, seed=seed, strategy=RandomSearch)
        runs.append(notes.added)
    assert runs[0] == runs[1] != runs[2]


def test_a_job_that_was_killed_goes_on_where_it_was() -> None:
    whole, parts = Notes(), Notes()
    tune([task("a"), task("b", 3.0)], Machine(), whole, trials=64, seed=1)
    first = Machine(stop_after=30)
    stopped = tune([task("a"), task("b", 3.0)], first, parts, trials=64, seed=1)
    assert stopped.interrupted
    assert len(parts.added) >= 30 - 8, "at most a batch is lost"
    second = Machine()
    again = tune([task("a"), task("b", 3.0)], second, parts, trials=64, seed=1, resume=True)
    assert again.trials == 64
    assert parts.timeless() == whole.timeless()
    assert sum(n for _, n in first.calls) + sum(n for _, n in second.calls) == len(whole.added)


def test_what_is_known_is_not_measured_again() -> None:
    notes, machine = Notes(), Machine()
    tune([task("k")], Machine(), notes, trials=40)
    tune([task("k")], machine, notes, trials=40, resume=True)
    assert sum(n for _, n in machine.calls) == 0


@pytest.mark.parametrize("status", ["wrong", "crashed", "timeout", "refused"])
def test_what_fails_never_wins(status: str) -> None:
    best = "knobs{a=5 b=2 panel=1}"
    [row] = tune([task("k")], Machine({best: status}), trials=96).rows
    assert row.failures == {status: 1}
    assert row.schedule != best
    assert row.ratio == pytest.approx(2 / 21), "the second best"


def test_without_a_time_of_the_default_the_default_stays() -> None:
    default = Space(Knobs, TARGET).default.text
    [row] = tune([task("k")], Machine({default: "crashed"})).rows
    assert (row.schedule, row.ratio, row.trials) == (default, 1.0, 1)


def test_luck_is_not_taken_for_speed() -> None:
    """Short measurements that flatter are found out by the longer one."""
    flat = replace(task("k"), space=Space(Knobs, TARGET, Knobs(5, 2, 1)))
    [row] = tune([flat], Machine(optimism=0.5), trials=40).rows
    assert row.schedule == "knobs{a=5 b=2 panel=1}", "the default is the best there is"
    assert row.ratio == 1.0


def test_the_result_is_what_the_database_decides() -> None:
    """Also where it keeps the first measurement, since that had more repeats than the longer look."""

    class Stubborn(Notes):
        def add(self, workload: Workload, compiler: str, measurements: Sequence[Measurement]) -> None:
            super().add(workload, compiler, [m for m in measurements if m.schedule not in self.find(workload, compiler)])

    notes, one = Stubborn(), task("k")
    [row] = tune([one], Machine(optimism=0.9), notes, trials=40).rows
    [best] = decide([one], [notes.find(one.workload, "v1")])
    assert best is not None
    assert (row.schedule, row.ratio) == (best.schedule, best.ratio)


def test_kernels_of_a_group_agree_on_a_layout_that_makes_none_slower() -> None:
    pair = [task("decode", 10.0, "g", likes=2), task("prefill", 1.0, "g", likes=2)]
    rows = tune(pair, Machine(), trials=160).rows
    assert [row.schedule for row in rows] == ["knobs{a=5 b=2 panel=2}"] * 2
    split = [task("decode", 1.0, "g", likes=1), task("prefill", 1.0, "g", likes=3)]
    layouts = {row.schedule.split("panel=")[1] for row in tune(split, Machine(), trials=160).rows}
    assert len(layouts) == 1


def test_interrupted_results_are_taken_with_a_margin() -> None:
    machine = Machine(stop_after=60)
    result = tune([task("k")], machine, trials=500)
    assert result.interrupted
    assert result.rows[0].ratio < 0.9


def test_progress_is_told() -> None:
    told: list[Progress] = []
    tune([task("k")], Machine(), trials=24, report=told.append)
    assert told[0].stage == "defaults"
    assert told[-1].stage == "confirming"
    assert all(a.used <= b.used and a.gain >= b.gain for a, b in pairwise(told))


def test_deciding_from_a_database() -> None:
    one = task("k")
    slow = Measurement("knobs{a=2 b=2 panel=1}", "ok", 0.97, 0.01, 9, 1.0)
    assert believed(slow) > 1 > believed(replace(slow, metrics={CONFIRMED: 1.0}))
    assert decide([one], [{slow.schedule: slow}]) == [None], "not sure enough"
    sure = replace(slow, metrics={CONFIRMED: 1.0})
    assert decide([one], [{slow.schedule: sure}]) == [sure]
    assert decide([one], [{}]) == [None]


def test_deciding_for_a_group_wants_all_members_measured() -> None:
    pair = [task("a", group="g"), task("b", group="g")]
    fast = Measurement("knobs{a=5 b=2 panel=2}", "ok", 0.2, 0.01, 9, 1.0)
    same = Measurement("knobs{a=5 b=2 panel=1}", "ok", 0.5, 0.01, 9, 1.0)
    assert decide(pair, [{fast.schedule: fast}, {}]) == [None, None]
    assert decide(pair, [{fast.schedule: fast, same.schedule: same}, {}]) == [same, None]
    assert decide(pair, [{fast.schedule: fast, same.schedule: same}, {fast.schedule: fast}]) == [fast, fast]
    slower = replace(fast, seconds=1.1)
    assert decide(pair, [{fast.schedule: fast}, {slower.schedule: slower}]) == [None, None], "b would be slower"
