"""Figures of several rounds and their ratios."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter

from benchmarks.peers.results import Sample, key
from benchmarks.peers.tasks import TASKS

DISTURBED = 0.25
"""Share of the machine's time taken by other processes from which on a figure is left out; llama-bench reads its model
from the disk each time, of which the kernel's part counts as others': up to 0.2."""
SAME = 1.15
"""Limits that differ by less than this factor are those of one state of the machine."""
ENOUGH = 3
"""So many comparable rounds are better than more that are not."""


@dataclass(frozen=True)
class Spread:
    """Figures of several rounds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    @property
    def iqr(self) -> float:
        """The distance of the quartiles; 0 for a single figure."""
        if len(self.values) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.values, n=4, method="inclusive")
        return third - first


@dataclass(frozen=True)
class Series:
    """What one variant of a system reached in one task on one model: a sample a round."""

    model: str
    system: str
    variant: str
    task: str
    by_round: dict[int, Sample]

    @property
    def spread(self) -> Spread:
        """The figures of all rounds."""
        return Spread(tuple(self._figure(i) for i in self.by_round))

    def _figure(self, number: int) -> float:
        return TASKS[self.task].figure(self.by_round[number]["seconds"])

    def is_better_than(self, other: Series) -> bool:
        better, worse = self.spread.median, other.spread.median
        return better > worse if TASKS[self.task].higher_is_better else better < worse

    def ratios(self, other: Series) -> Chosen | None:
        """Own figure over that of ``other``, in rounds that both have; where memory decides, in comparable ones."""
        both = sorted(self.by_round.keys() & other.by_round.keys())
        return choose((self._figure(i) / other._figure(i), self._memory(i) + other._memory(i)) for i in both)

    def _memory(self, number: int) -> list[float]:
        """The limits of memory around a sample; where memory does not decide, always the same."""
        return limits_of(self.by_round[number], "read") if TASKS[self.task].reads else [1.0]

    def shares(self, of: str, demand: float) -> Chosen | None:
        """``demand`` bytes or operations, over what the limit ``of`` allowed in the time that each round took."""
        samples = [(sample["seconds"], limits_of(sample, of)) for sample in self.by_round.values()]
        return choose((demand / seconds / (statistics.mean(limits) * 1e9), limits) for seconds, limits in samples)


@dataclass(frozen=True)
class Chosen:
    """Values of comparable rounds, each with the limit during it, ``of`` so many; of all if those are too few."""

    values: tuple[tuple[float, float], ...]
    of: int
    comparable: bool = True

    @property
    def rounds(self) -> str:
        """How many: ``5/7``, or ``all 7``."""
        return f"{len(self.values)}/{self.of}" if self.comparable else f"all {self.of}"

    @property
    def spread(self) -> Spread:
        return Spread(tuple(value for value, _ in self.values))

    def states(self) -> list[tuple[float, Spread]]:
        """The values by state of the machine: limit and values, from the lowest limit on; none if they are mixed."""
        found: list[list[tuple[float, float]]] = []
        for value, limit in sorted(self.values if self.comparable else (), key=itemgetter(1)):
            if not found or not agree([found[-1][0][1], limit]):
                found.append([])
            found[-1].append((value, limit))
        return [(statistics.median(limit for _, limit in state), Spread(tuple(value for value, _ in state)))
                for state in found]  # fmt: skip


def choose(values: Iterable[tuple[float, Sequence[float]]]) -> Chosen | None:
    """Of values and the limits around them, those where these agree, if ``ENOUGH`` (or all) do, else all; None of none."""
    every = list(values)
    good = [(value, limits) for value, limits in every if agree(limits)]
    comparable = len(good) >= min(ENOUGH, len(every))
    values = tuple((value, statistics.mean(limits)) for value, limits in (good if comparable else every))
    return Chosen(values, len(every), comparable) if every else None


def limits_of(sample: Sample, name: str) -> list[float]:
    """A limit before and after ``sample``."""
    return list(sample["limits"][name])


def agree(limits: Sequence[float]) -> bool:
    """Whether the machine was in the same state at all these times."""
    return max(limits) <= SAME * min(limits)


def series(samples: Iterable[Sample]) -> list[Series]:
    """Samples by model, system, variant and task; disturbed ones only if there are no others."""
    found: dict[tuple[str, str, str, str], dict[int, Sample]] = {}
    disturbed: dict[tuple[str, str, str, str], dict[int, Sample]] = {}
    for sample in samples:
        if "error" not in sample:
            kind = disturbed if sample["others"] > DISTURBED else found
            *at, number = key(sample)
            kind.setdefault(tuple(at), {})[number] = sample
    return [Series(*at, by_round=values) for at, values in {**disturbed, **found}.items()]


def best(candidates: Sequence[Series]) -> Series | None:
    """The one with the best median."""
    chosen: Series | None = None
    for one in candidates:
        if chosen is None or one.is_better_than(chosen):
            chosen = one
    return chosen
