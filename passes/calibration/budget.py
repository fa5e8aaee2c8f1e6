"""Which of several ways each unit takes under a budget of bytes: greedily, or by evolution from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

Choice = tuple[int, ...]
"""For each unit, the index of its way."""


@dataclass(frozen=True)
class Unit:
    """``bytes`` that each way takes, and the harm it does alone; an index that is missing is no way for this unit."""

    bytes: Mapping[int, int]
    harm: Mapping[int, float]

    @property
    def least(self) -> int:
        """The way of fewest bytes, the one that does least harm among equals."""
        return min(self.bytes, key=lambda way: (self.bytes[way], self.harm[way]))


def size(units: Sequence[Unit], choice: Choice) -> int:
    """Bytes of all units."""
    return sum(unit.bytes[way] for unit, way in zip(units, choice))


def greedy(units: Sequence[Unit], budget: int) -> Choice:
    """From the fewest bytes on, take the change that lowers the harm most for each byte, while it fits the budget."""
    choice = [unit.least for unit in units]
    left = budget - size(units, tuple(choice))
    while True:
        best: tuple[float, int, int] | None = None
        for i, unit in enumerate(units):
            for way, bytes in unit.bytes.items():
                cost, gain = bytes - unit.bytes[choice[i]], unit.harm[choice[i]] - unit.harm[way]
                rate = gain / max(cost, 1e-9)
                if gain > 0 and cost <= left and (best is None or rate > best[0]):
                    best = (rate, i, way)
        if best is None:
            return tuple(choice)
        _, i, way = best
        left -= units[i].bytes[way] - units[i].bytes[choice[i]]
        choice[i] = way


@dataclass(frozen=True)
class Evolution:
    """EvoPress (Sieberling et al., arXiv:2410.14649): mutations that keep the budget, and selection in several steps.

    ``judge(choice, stage)`` measures a choice; the last of ``stages`` is on all data, earlier ones on fewer. Of n young
    ones a stage lets the best ``sqrt(n)`` go on; after the last the best one competes with its parent.
    """

    units: Sequence[Unit]
    budget: int
    judge: Callable[[Choice, int], float]
    stages: int
    offspring: int
    seed: int

    def run(self, start: Choice, generations: int) -> tuple[Choice, float]:
        """The best choice that was found, and its measure."""
        rng = Random(self.seed)
        best, harm = start, self.judge(start, self.stages - 1)
        for _ in range(generations):
            young = sorted({m for _ in range(self.offspring) if (m := self.mutated(best, rng)) != best})
            for stage in range(self.stages):
                ranked = sorted((self.judge(choice, stage), choice) for choice in young)
                young = [choice for _, choice in ranked[: max(1, round(len(ranked) ** 0.5))]]
            if ranked and ranked[0][0] < harm:
                harm, best = ranked[0]
        return best, harm

    def mutated(self, choice: Choice, rng: Random) -> Choice:
        """One to three units with other ways; then others give bytes back until the budget holds."""
        new = list(choice)
        for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
            i = rng.randrange(len(new))
            new[i] = rng.choice(sorted(self.units[i].bytes))
        while (over := size(self.units, tuple(new)) - self.budget) > 0:
            smaller = [(i, w) for i, u in enumerate(self.units) for w, b in u.bytes.items() if b < u.bytes[new[i]]]
            enough = [(i, w) for i, w in smaller if self.units[i].bytes[new[i]] - self.units[i].bytes[w] >= over]
            i, way = rng.choice(enough or smaller)
            new[i] = way
        return tuple(new)
