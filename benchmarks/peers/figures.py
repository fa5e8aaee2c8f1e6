"""Figures of several rounds and their ratios."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.peers.results import Sample
from benchmarks.peers.tasks import TASKS

DISTURBED = 0.2
"""Share of the machine's time taken by other processes from which on a figure is left out."""


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
    """What one variant of a system reached in one task on one model, by round."""

    model: str
    system: str
    variant: str
    task: str
    by_round: dict[int, float]

    @property
    def spread(self) -> Spread:
        return Spread(tuple(self.by_round.values()))

    def is_better_than(self, other: Series) -> bool:
        better, worse = self.spread.median, other.spread.median
        return better > worse if TASKS[self.task].higher_is_better else better < worse

    def ratios(self, other: Series) -> Spread:
        """Own figure over that of ``other``, in the rounds that both have; medians if they share none."""
        both = self.by_round.keys() & other.by_round.keys()
        pairs = tuple(self.by_round[i] / other.by_round[i] for i in sorted(both))
        return Spread(pairs or (self.spread.median / other.spread.median,))


def series(samples: Iterable[Sample]) -> list[Series]:
    """Figures by model, system, variant and task; of disturbed ones only if there are no others."""
    found: dict[tuple[str, str, str, str], dict[int, float]] = {}
    disturbed: dict[tuple[str, str, str, str], dict[int, float]] = {}
    for sample in samples:
        for task, seconds in sample.get("seconds", {}).items():
            at = (sample["model"], sample["system"], sample["variant"], task)
            kind = disturbed if sample["others"][task] > DISTURBED else found
            kind.setdefault(at, {})[sample["round"]] = TASKS[task].figure(seconds)
    return [Series(*at, by_round=values) for at, values in {**disturbed, **found}.items()]


def limit(samples: Sequence[Sample], model: str, name: str) -> float | None:
    """A limit of the machine while ``model`` was measured: of all times it was measured, nine tenths gave less."""
    values = sorted(s["limits"][name] for s in samples if s["model"] == model and name in s["limits"])
    return values[int(0.9 * (len(values) - 1))] if values else None


def best(candidates: Sequence[Series]) -> Series | None:
    """The one with the best median."""
    chosen: Series | None = None
    for one in candidates:
        if chosen is None or one.is_better_than(chosen):
            chosen = one
    return chosen
