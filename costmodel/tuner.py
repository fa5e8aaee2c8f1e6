"""Tuning the kernels of a model under one budget.

A round picks the kernel that promises to save the most time in the whole (in the manner of Ansor's task scheduler, Zheng
et al. 2020, arXiv:2006.06762), asks its search for a batch, measures that and keeps it in the database. What is known there
is not measured again, so the same seed goes the same way and a job that was stopped continues where it was. In the end
each kernel's best schedule is measured once more beside the default, for longer: only what is faster then is taken.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Protocol

import numpy as np

from tilewright.costmodel.choice import CLEARLY, CONFIRMED, decide
from tilewright.costmodel.layouts import by_layout, common, grouped, held
from tilewright.costmodel.model import CostModel
from tilewright.costmodel.search import RandomSearch, Search
from tilewright.costmodel.workload import Choice, Measurement, Runner, Task, Workload

Strategy = Callable[[Task, int], RandomSearch]
"""Makes the search of a task from a seed."""
_FINALISTS = 2
_LONGER = 4.0


class Memory(Protocol):
    """What the tuner asks of a database."""

    def add(self, workload: Workload, compiler: str, measurements: Sequence[Measurement]) -> None: ...

    def find(self, workload: Workload, compiler: str) -> Mapping[str, Measurement]: ...


@dataclass(frozen=True)
class Budget:
    """How much may be tried: ``trials`` schedules, ``seconds`` of measuring, or whichever ends first."""

    trials: int | None = None
    seconds: float | None = None

    def used(self, trials: int, seconds: float) -> float:
        """The share of it that is spent."""
        shares = [trials / self.trials if self.trials else 0.0, seconds / self.seconds if self.seconds else 0.0]
        return max(shares)


@dataclass(frozen=True)
class Progress:
    """Where a tuning job stands. ``gain``: time of all kernels with the best schedules relative to the defaults."""

    stage: str
    task: str
    trials: int
    seconds: float
    used: float
    gain: float


@dataclass(frozen=True)
class Row:
    """What became of one kernel. ``ratio``: time relative to the default, at most 1; ``seconds`` are the default's."""

    task: Task
    schedule: str
    ratio: float
    seconds: float
    trials: int
    failures: Mapping[str, int]


@dataclass(frozen=True)
class TuningResult:
    """``gain`` as in `Progress`; ``history`` has each trial with its task's name. ``interrupted``: ended too early."""

    rows: tuple[Row, ...]
    trials: int
    seconds: float
    gain: float
    history: tuple[tuple[str, Measurement], ...]
    interrupted: bool = False
    model: CostModel | None = field(default=None, repr=False)
    """What guided the search."""


@dataclass
class _State:
    """A task being tuned."""

    task: Task
    search: RandomSearch
    told: dict[str, Measurement] = field(default_factory=dict)
    baseline: float = 0.0
    best: Measurement | None = None
    done: bool = False

    @property
    def ratio(self) -> float:
        """The best time relative to the default."""
        return min(1.0, self.best.ratio) if self.best and self.best.ratio else 1.0

    @property
    def promise(self) -> float:
        """Seconds of the whole that another batch may save."""
        return 0.0 if self.done else self.search.expected_gain()


class Tuner:
    """Tunes ``tasks`` with ``runner``; ``memory`` keeps every measurement under the version of the ``compiler``.

    With ``resume`` what is found in the memory counts as spent, as if this job had measured it. ``strategy`` makes the
    search of a task; left out, it is evolution under ``model``.
    """

    def __init__(self, tasks: Sequence[Task], runner: Runner, memory: Memory, compiler: str, model: CostModel | None = None,
                 *, seed: int = 0, batch: int = 16, resume: bool = False, strategy: Strategy | None = None,
                 report: Callable[[Progress], None] = lambda progress: None) -> None:  # fmt: skip
        self.tasks, self.runner, self.memory, self.compiler, self.model = tuple(tasks), runner, memory, compiler, model
        self.seed, self.batch, self.resume, self.report = seed, batch, resume, report
        self.strategy: Strategy = strategy or (lambda task, seed: Search(task, seed, model))
        self.states: list[_State] = []
        self.trials, self.seconds = 0, 0.0
        self.history: list[tuple[str, Measurement]] = []

    def run(self, budget: Budget) -> TuningResult:
        """Spend the budget; an interruption (Ctrl-C) ends it early and loses what the current batch measured."""
        interrupted = False
        self.budget = budget
        try:
            self._start()
            while self.budget.used(self.trials, self.seconds) < 1 and (state := self._most_promising()):
                choices = state.search.ask(self._room())
                if choices:
                    self._measure(state, choices, "search")
                else:
                    state.done = True
        except KeyboardInterrupt:
            interrupted = True
        rows = tuple(self._settle(interrupted))
        gain = mean_ratio([(row.seconds * row.task.weight, row.ratio) for row in rows])
        return TuningResult(rows, self.trials, self.seconds, gain, tuple(self.history), interrupted, self.model)

    # --- stages -------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Measure the defaults, then let kernels that share weights agree on their layout."""
        for i, task in enumerate(self.tasks):
            self.states.append(_State(task, self._search(task, i)))
        for state in self.states:
            if not self._spent():
                self._measure(state, [state.task.space.default], "defaults")
            state.done = state.best is None  # without a time of the default there is nothing to compare with
        for members in grouped(self.tasks):
            if len(members) > 1:
                self._agree(members)

    def _agree(self, members: Sequence[int]) -> None:
        """Try the likeliest schedule of each layout that all of ``members`` have, and hold them to the best layout."""
        states = [self.states[i] for i in members]
        options = [by_layout(state.task, self._rng(i, "layouts")) for i, state in zip(members, states)]
        costs = {}
        for layout in common(options):
            if self._spent() or self._room() < len(states):
                break
            for state, own in zip(states, options):
                self._measure(state, [self._likeliest(state.task, own[layout])], "layouts")
            costs[layout] = sum(self._best_seconds(state, layout) * state.task.weight for state in states)
        chosen = min(costs, key=lambda layout: costs[layout], default=None)
        if chosen is None:
            return
        for i, state, own in zip(members, states, options):
            start = min(own[chosen], key=lambda c: (self._known_ratio(state, c), c.text))
            state.task = held(state.task, chosen, start)
            state.search = self._search(state.task, i)
            state.search.tell(list(state.told.values()))
            fitting = [m for m in state.told.values() if m.ratio and state.task.space.parse(m.schedule)]
            state.best = min(fitting, key=lambda m: m.ratio or 1.0, default=None)

    def _settle(self, interrupted: bool) -> list[Row]:
        """Decide, after a second and longer look at the finalists."""
        for i, state in enumerate(self.states):
            if not interrupted and (state.ratio < CLEARLY or self._is_moved(i)):
                self._confirm(state)
        told = [state.told for state in self.states]
        chosen = decide(self.tasks[: len(told)], told)
        return [self._row(task, state, m) for task, state, m in zip(self.tasks, self.states, chosen)]

    def _is_moved(self, index: int) -> bool:
        """Whether a task is held to another layout than the default's."""
        task, own = self.states[index].task, self.tasks[index]
        return own.layout(task.space.default) != own.layout(own.space.default)

    def _confirm(self, state: _State) -> None:
        """Time the finalists beside the default for longer; the better founded of both times is what is known."""
        parsed = [(m, state.task.space.parse(m.schedule)) for m in state.told.values() if m.ratio and m.ratio < 1]
        ranked = sorted((m.ratio or 1.0, m.schedule) for m, choice in parsed if choice is not None)
        finalists = [text for _, text in ranked[:_FINALISTS] if CONFIRMED not in state.told[text].metrics]
        if not finalists:
            return
        self._tell("confirming", state)
        workload = state.task.workload
        found = self.runner.measure(workload, self._default(state), finalists, effort=_LONGER)
        found = [replace(m, metrics={**m.metrics, CONFIRMED: 1.0}) for m in found]
        self.memory.add(workload, self.compiler, found)
        known = self.memory.find(workload, self.compiler)
        state.told |= {m.schedule: known[m.schedule] for m in found}

    # --- parts --------------------------------------------------------------------------------------------------------

    def _measure(self, state: _State, choices: Sequence[Choice], stage: str) -> None:
        """Find out the times of ``choices``: from the memory, or by measuring."""
        workload = state.task.workload
        wanted = [choice.text for choice in choices if choice.text not in state.told]
        known = self.memory.find(workload, self.compiler)
        missing = [text for text in wanted if text not in known]
        self._tell(stage, state)
        start = time.perf_counter()
        fresh = {m.schedule: m for m in self.runner.measure(workload, self._default(state), missing)} if missing else {}
        wall = (time.perf_counter() - start) / max(len(missing), 1)
        fresh = {text: replace(m, metrics={**m.metrics, "wall": wall}) for text, m in fresh.items()}
        if fresh:
            self.memory.add(workload, self.compiler, list(fresh.values()))
        found = [fresh.get(text) or known[text] for text in wanted]
        for m in found:
            self._take(state, m, counts=m.schedule in fresh or self.resume)
        state.search.tell(found)

    def _take(self, state: _State, m: Measurement, counts: bool) -> None:
        state.told[m.schedule] = m
        if counts:
            self.trials += 1
            self.seconds += m.metrics.get("wall", 0.0)
        if m.ratio is not None:
            state.baseline = state.baseline or m.baseline or 0.0
            if state.best is None or m.ratio < (state.best.ratio or 1.0):
                state.best = m
        self.history.append((state.task.name, m))

    def _most_promising(self) -> _State | None:
        open_ = [state for state in self.states if not state.done]
        return max(open_, key=lambda state: (state.promise, -self.states.index(state)), default=None)

    def _room(self) -> int:
        """How many trials the next batch may have."""
        left = self.budget.trials - self.trials if self.budget.trials else self.batch
        return max(1, min(self.batch, left))

    def _spent(self) -> bool:
        return self.budget.used(self.trials, self.seconds) >= 1

    def _likeliest(self, task: Task, choices: Sequence[Choice]) -> Choice:
        """The schedule that the model likes best, or the first one without a model."""
        family = task.workload.family
        if self.model is None or not self.model.knows(task.workload.target, family):
            return choices[0]
        mean = self.model.predict(family, [task.features(choice) for choice in choices]).mean
        return choices[int(np.argmin(mean))]

    def _search(self, task: Task, index: int) -> RandomSearch:
        return self.strategy(task, int(self._rng(index, "search").integers(1 << 31)))

    def _rng(self, index: int, purpose: str) -> np.random.Generator:
        digest = sha256(f"{self.seed} {purpose} {self.tasks[index].workload.key}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little"))

    def _default(self, state: _State) -> str:
        """The schedule that all times of a task are relative to."""
        index = self.states.index(state)
        return self.tasks[index].space.default.text

    def _known_ratio(self, state: _State, choice: Choice) -> float:
        m = state.told.get(choice.text)
        return m.ratio if m is not None and m.ratio is not None else float("inf")

    def _best_seconds(self, state: _State, layout: str) -> float:
        """The least time that was measured with ``layout``."""
        found = [m.ratio for m in state.told.values() if m.ratio and self._has_layout(state.task, m, layout)]
        return min(found, default=float("inf")) * state.baseline

    @staticmethod
    def _has_layout(task: Task, m: Measurement, layout: str) -> bool:
        choice = task.space.parse(m.schedule)
        return choice is not None and task.layout(choice) == layout

    @staticmethod
    def _row(task: Task, state: _State, m: Measurement | None) -> Row:
        failures: Counter[str] = Counter(told.status for told in state.told.values() if told.status != "ok")
        schedule, ratio = (m.schedule, m.ratio or 1.0) if m else (task.space.default.text, 1.0)
        return Row(task, schedule, ratio, state.baseline, len(state.told), failures)

    def _gain(self) -> float:
        return mean_ratio([(state.baseline * state.task.weight, state.ratio) for state in self.states])

    def _tell(self, stage: str, state: _State) -> None:
        used = self.budget.used(self.trials, self.seconds)
        self.report(Progress(stage, state.task.name, self.trials, self.seconds, min(used, 1.0), self._gain()))


def mean_ratio(rows: Sequence[tuple[float, float]]) -> float:
    """The mean of ratios with weights: rows of (weight, ratio); 1 when nothing weighs anything."""
    total = sum(weight for weight, _ in rows)
    return sum(weight * ratio for weight, ratio in rows) / total if total else 1.0
