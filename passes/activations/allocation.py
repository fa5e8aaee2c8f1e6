"""How places share the zeros: two searches, with magnitudes of the inputs that the function has without any zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tilewright.ir import Function, Module, Value
from tilewright.ir.ops import numerics
from tilewright.passes.activations.blocks import Block, blocks_of
from tilewright.passes.activations.histogram import Histogram
from tilewright.passes.activations.limits import magnitudes, walk
from tilewright.passes.activations.places import Place
from tilewright.passes.calibration.budget import Unit
from tilewright.passes.calibration.budget import greedy as cheapest
from tilewright.passes.calibration.data import Array, Batch
from tilewright.passes.calibration.outputs import Outputs
from tilewright.passes.calibration.stream import Stream

STEP, WAYS = 0.02, 49
"""Of a block's bytes, or of a place's inputs, that one step makes zero; shares of a place are 0 to 48 steps."""
MOST = STEP * (WAYS - 1)
MEASURED = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
"""Shares at which the harm to the results is measured; between these its third root is taken to be straight."""


class _Sizes:
    """The magnitudes of places, and the limits that follow."""

    def __init__(self) -> None:
        self.known: dict[Place, tuple[Histogram, Array | None]] = {}

    def add(self, place: Place, run: Stream) -> None:
        """Look at ``place``, where ``run`` stands."""
        factors = place.factors(place, run) if place.factors is not None else None
        self.known[place] = magnitudes(place, run, factors), factors

    def limit(self, place: Place, share: float) -> Array:
        if not share:
            return np.zeros(place.limits.shape, np.float32)
        sizes, factors = self.known[place]
        return place.array(sizes.quantile(share), factors)

    def limits(self, places: Sequence[Place], shares: Mapping[Place, float]) -> dict[Value, Array]:
        """The limits of ``places``; none becomes zero in one that has no share."""
        return {place.limits: self.limit(place, shares.get(place, 0.0)) for place in places}


# ---- by the results ------------------------------------------------------------------------------------------------


def by_results(
    module: Module, function: Function, batches: Sequence[Batch], places: Sequence[Place], share: float
) -> dict[Place, float]:
    """The share of each place, so that ``share`` of all bytes are saved where that harms the results of the model least.

    The harm of each place alone is measured at some shares: the KL divergence of a language model's next tokens, the
    squared error of others. Harms are taken to add up.
    """
    sizes = _Sizes()
    dense = sizes.limits(places, {})
    for place in places:
        place.set(dense[place.limits])
    outputs, run = Outputs.of(module, function, batches), Stream(function, batches)
    units: dict[Place, Unit] = {}
    for place in walk(run, places):
        sizes.add(place, run)
        harms = [0.0]
        for some in MEASURED:
            fork = run.fork({})
            _run(fork, len(fork.body), {place.limits: sizes.limit(place, some)})
            harms.append(outputs.distance(fork))
        units[place] = unit(place, harms)
    choice = cheapest(list(units.values()), int((1 - share) * sum(place.bytes for place in places)))
    return {place: STEP * way for place, way in zip(units, choice)}


def unit(place: Place, harms: Sequence[float]) -> Unit:
    """Bytes that are read, and harm, at each number of steps; ``harms`` are those without zeros and at ``MEASURED``."""
    roots = np.cbrt(np.maximum.accumulate(harms))
    shares = STEP * np.arange(WAYS)
    between = np.interp(shares, [0.0, *MEASURED], roots) ** 3
    return Unit({i: round((1 - s) * place.bytes) for i, s in enumerate(shares)}, dict(enumerate(between.tolist())))


# ---- block by block ------------------------------------------------------------------------------------------------


def by_blocks(function: Function, batches: Sequence[Batch], places: Sequence[Place], share: float) -> dict[Place, float]:
    """The share of each place, so that each block saves ``share`` of the bytes of its weights (TEAL, arXiv:2408.14690,
    algorithm 1)."""
    found: dict[Place, float] = {}
    run = Stream(function, batches)
    for block in blocks_of(function, places):
        search = _Search(block, run)
        shares = search.shares(share)
        _finish(run, block, search.sizes.limits(block.places, shares))
        found.update(shares)
    return found


class _Search:
    """Shares of one block, in front of which ``run`` stands."""

    def __init__(self, block: Block, run: Stream) -> None:
        self.block, self.run, self.sizes = block, run, _Sizes()
        base, dense = run.fork({}), self.sizes.limits(block.places, {})
        for place in walk(base, block.places, dense):
            self.sizes.add(place, base)
        self.want = _finish(base, block, dense)

    def shares(self, share: float) -> dict[Place, float]:
        """From none on, take the step that changes the block's result least; all steps save as many bytes."""
        whole = sum(place.bytes for place in self.block.places)
        found, left = dict.fromkeys(self.block.places, 0.0), share * whole
        while left > 1e-6 * whole:
            step = min(STEP * whole, left)
            tried = {p: min(old + step / p.bytes, MOST) for p, old in found.items() if old < MOST}
            errors = self.errors(found, tried)
            best = min(errors, key=lambda p: errors[p])
            left -= (tried[best] - found[best]) * best.bytes
            found[best] = tried[best]
        return found

    def errors(self, shares: Mapping[Place, float], tried: Mapping[Place, float]) -> dict[Place, float]:
        """The squared change of the block's result when one place has the share in ``tried``: a fork begins at each."""
        found: dict[Place, float] = {}
        base, limits = self.run.fork({}), self.sizes.limits(self.block.places, shares)
        for place in walk(base, list(tried), limits):
            changed = {**limits, place.limits: self.sizes.limit(place, tried[place])}
            got = _finish(base.fork({}), self.block, changed)
            found[place] = sum(float(np.square(a - b, dtype=np.float64).sum()) for a, b in zip(got, self.want))
        return found


def _finish(run: Stream, block: Block, limits: Mapping[Value, Array]) -> list[Array]:
    """Run to the end of ``block``; gives its result in f32."""
    _run(run, run.body.index(block.last) + 1, limits)
    return [numerics.wide(array) for array in run.values(block.result)]


def _run(run: Stream, end: int, limits: Mapping[Value, Array]) -> None:
    """Run up to the operation ``end``."""
    while run.at < end:
        run.step(limits)
