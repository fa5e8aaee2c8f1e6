"""Filling in limits while calibration data run through the function that already has the thresholds.

Each place sees what the places before it left of their inputs, so the shares are those that the compiled model has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tilewright.ir import Function, PassError, Value
from tilewright.passes.activations.histogram import Histogram
from tilewright.passes.activations.places import Place
from tilewright.passes.calibration.data import Array, Batch
from tilewright.passes.calibration.statistics import blocks
from tilewright.passes.calibration.stream import Stream

Choose = Callable[[Place, Stream], Array]
"""The limits of a place that the run stands at."""
_ROUNDS = 2  # after which the one limit of all places and the inputs that it leaves fit each other


@dataclass(frozen=True)
class Reached:
    """The share of zeros among the inputs of a place, and the bytes of weights that they save, a token on average."""

    place: Place
    zeros: float

    @property
    def saved(self) -> float:
        return self.zeros * self.place.bytes - self.place.extra


def walk(run: Stream, places: Sequence[Place], limits: Mapping[Value, Array] | None = None) -> Iterator[Place]:
    """The places in the order of the run, which stands at each and goes past the last one; ``limits`` replace theirs."""
    stops = {place.stop: place for place in places}
    left = len(stops)
    while left:
        place = stops.get(run.body[run.at])
        if place is not None:
            left -= 1
            yield place
        run.step(limits)


def fill(function: Function, batches: Sequence[Batch], places: Sequence[Place], choose: Choose) -> list[Reached]:
    """Give each place the limits that ``choose`` makes; gives what they reach on the same data."""
    found = []
    run = Stream(function, batches)
    for place in walk(run, places):
        limits = choose(place, run)
        place.set(limits)
        found.append(Reached(place, zeros(run.values(place.judged), limits)))
        if place.low_rank is not None:
            place.low_rank.fill(second_moments(run.values(place.threshold.x), limits))
    return found


def by_shares(shares: Mapping[Place, float]) -> Choose:
    """Limits below which a share of a place's magnitudes are."""

    def choose(place: Place, run: Stream) -> Array:
        factors = place.factors(place, run) if place.factors is not None else None
        return place.array(magnitudes(place, run, factors).quantile(shares[place]), factors)

    return choose


def one_limit(function: Function, batches: Sequence[Batch], places: Sequence[Place], share: float) -> Choose:
    """The limit below which ``share`` of all inputs are, each counted as the bytes of weights it would save."""
    limit = 0.0
    for _ in range(_ROUNDS):
        total = Histogram()

        def choose(place: Place, run: Stream, total: Histogram = total, limit: float = limit) -> Array:
            weight = place.bytes / int(place.threshold.x.shape[-1])
            total.counts += magnitudes(place, run, None).counts * weight
            return place.array(limit, None)

        fill(function, batches, places, choose)
        limit = total.quantile(share)
    return lambda place, run: place.array(limit, None)


def magnitudes(place: Place, run: Stream, factors: Array | None) -> Histogram:
    """The magnitudes that a place compares. Raises PassError for inputs that are not finite."""
    found = Histogram()
    for block in blocks(run.values(place.judged)):
        with np.errstate(invalid="ignore"):
            found.add(np.abs(block) if factors is None else np.abs(block) * factors)
    if not found.is_finite:
        raise PassError("activations are NaN or infinite where limits are to be found", place.threshold.loc)
    return found


def zeros(values: Sequence[Array], limits: Array) -> float:
    """The share of ``values`` below ``limits``."""
    below = sum(int(np.count_nonzero(np.abs(block) < limits)) for block in blocks(values))
    return below / sum(v.size for v in values)


def second_moments(inputs: Sequence[Array], limits: Array) -> Array:
    """``mean over rows of r^T r`` of what ``limits`` take from ``inputs``: f64 ``[K, K]``."""
    k, rows = inputs[0].shape[-1], 0
    total = np.zeros((k, k))
    for block in blocks(inputs):
        rest = np.where(np.abs(block) < limits, block, np.float32(0))
        total += rest.T @ rest
        rows += len(rest)
    total /= rows
    return total
