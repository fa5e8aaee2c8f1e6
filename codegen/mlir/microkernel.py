"""The inner loop of linear and attention kernels: a register tile of sums, fed by packed weights and rows of x.

A feed says how one step along K is loaded and multiplied. `Feed` is that of floats, which accumulate in f32:

- bf16 x bf16 on a bf16-dot target: vdpbf16ps on pairs;
- bf16 weights otherwise: a pair splits into two f32 by a shift and a mask;
- f32 and f16 weights: widened, then fma.

Those of codes are in linear_codes.py and linear_floats.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from tilewright.codegen.mlir.builder import Buffer, Function, Kernel
from tilewright.codegen.mlir.value import SIZES, Val, constant, fma, intrinsic

_HIGH_HALF = -0x10000
_MIN_CHAINS = 8  # independent accumulators that hide the latency of fma


class Reading(Protocol):
    """Weights that come one after the other, in the place of a buffer (see linear_sparse.py).

    ``carried`` says how far each of them was read, which loops hand on.
    """

    carried: list[Val]

    def after(self, steps: Val) -> Reading:
        """Steps are counted from here on."""

    def at_step(self, step: Val) -> Reading:
        """Loads are of this step."""

    def load(self, place: Val | int, lanes: int) -> Val:
        """As of a buffer, from the start of the step."""

    def prefetch(self, ahead: Val | int, masks: bool) -> None:
        """Ask for what comes so many bytes later, of several steps at once for the ``masks``."""


Weights = Buffer | Reading


class AnyFeed(Protocol):
    """How x meets the weights of ``lanes`` features, one step of some k's after the other."""

    @property
    def x_dtype(self) -> str: ...

    @property
    def w_dtype(self) -> str:
        """Elements of the buffer of packed weights."""

    @property
    def lanes(self) -> int: ...

    @property
    def panel(self) -> int:
        """Features of a panel of weights."""

    @property
    def acc(self) -> str:
        """What sums are kept in: f32 or i32."""

    @property
    def step(self) -> int:
        """k's that one step consumes."""

    @property
    def factors(self) -> int:
        """k's that one lane consumes in a step."""

    @property
    def stride(self) -> int:
        """Elements of the weights from one step to the next."""

    @property
    def spread(self) -> tuple[int, ...]:
        """Where, from the place of a vector of features, the vectors of one step begin."""

    @property
    def parts(self) -> int:
        """Factors of one step."""

    def bound(self, more: Sequence[Buffer]) -> AnyFeed:
        """The feed inside of a function that has ``more`` buffers: the tables that weights are looked up in."""

    def weights(self, w: Weights, place: Val | int, tail: bool = False) -> list[Val]:
        """The factors of one step for the vector of features at ``place``; ``tail``: only what K has beyond whole steps."""

    def inputs(self, x: Buffer, place: Val | int, tail: bool = False) -> list[Val]:
        """The factors of one row of x, in every lane."""

    def accumulate(self, total: Val, weights: Sequence[Val], inputs: Sequence[Val]) -> Val:
        """``total`` plus the products."""


@dataclass(frozen=True)
class Feed:
    """How x (``x_dtype``) meets weights stored as ``w_dtype``; ``panel`` elements lie between one k and the next."""

    x_dtype: str
    w_dtype: str
    panel: int
    lanes: int
    dot: bool

    @property
    def step(self) -> int:
        """k's that one step consumes: 2 when either side comes in bf16 pairs."""
        return 2 if "bf16" in (self.x_dtype, self.w_dtype) else 1

    @property
    def factors(self) -> int:
        return self.step

    @property
    def pair(self) -> int:
        """k's of one feature that lie side by side in the weights."""
        return 2 if self.w_dtype == "bf16" else 1

    @property
    def acc(self) -> str:
        return "f32"

    @property
    def stride(self) -> int:
        return self.step * self.panel

    @property
    def spread(self) -> tuple[int, ...]:
        return tuple(i * self.panel for i in range(self.step // self.pair))

    @property
    def parts(self) -> int:
        return 1 if self.dot else self.step

    def bound(self, more: Sequence[Buffer]) -> Feed:
        return self

    def weights(self, w: Weights, place: Val | int, tail: bool = False) -> list[Val]:
        """The factors of one step for the vector of features at ``place``; ``tail``: only its first k."""
        if self.w_dtype == "bf16":
            pairs = w.load(place, 2 * self.lanes)
            if self.dot:
                return [pairs]
            return split_bf16(pairs)[:1 if tail else 2]
        count = 1 if tail else self.step
        return [w.load(place + i * self.panel, self.lanes).to("f32") for i in range(count)]

    def inputs(self, x: Buffer, place: Val | int, tail: bool = False) -> list[Val]:
        """The factors of one row of x, in every lane."""
        if self.x_dtype != "bf16":
            count = 1 if tail else self.step
            return [x.load(place + i).to("f32").splat(self.lanes) for i in range(count)]
        if tail:
            bits = x.load(place, 1).bitcast("i16").lane(0).to("i32") & 0xFFFF
            low = bits.splat(self.lanes)
            return [low.bitcast("bf16")] if self.dot else [(low << 16).bitcast("f32")]
        pair = x.load(place, 2).bitcast("i32").lane(0).splat(self.lanes)
        return [pair.bitcast("bf16")] if self.dot else split_bf16(pair.bitcast("bf16"))

    def accumulate(self, total: Val, weights: Sequence[Val], inputs: Sequence[Val]) -> Val:
        for weight, value in zip(weights, inputs, strict=True):
            if self.dot:
                total = intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", "f32", self.lanes, total, weight, value)
            else:
                total = fma(weight, value, total)
        return total


def split_bf16(pairs: Val) -> list[Val]:
    """bf16 pairs -> f32 of the even and of the odd elements."""
    bits = pairs.bitcast("i32")
    return [(bits << 16).bitcast("f32"), (bits & _HIGH_HALF).bitcast("f32")]


@dataclass(frozen=True)
class Tile:
    """Shape of a micro-kernel: ``rows`` of x against vectors of features.

    ``columns`` are the places of the vectors of weights within a step; strides are elements from row to row.
    """

    rows: int
    columns: tuple[int, ...]
    x_stride: int
    sums_stride: int
    unroll: int
    prefetch: int | Val = 0  # bytes ahead in the weight stream, 0 = none
    fresh: bool = False  # start from zero rather than from the sums
    told: bool = False  # how far to fetch ahead is a sixth number of a call
    in_order: bool = False  # one chain however low the tile: a row's sums do not depend on how many rows there are

    @property
    def vectors(self) -> int:
        return len(self.columns)

    @property
    def chains(self) -> int:
        """Sums that each total is kept as while it grows."""
        return 1 if self.in_order else min(self.unroll, -(-_MIN_CHAINS // (self.rows * self.vectors)))


def emit_micro_kernel(kernel: Kernel, name: str, feed: AnyFeed, tile: Tile, k: int, buffers: Sequence[Buffer],
                      opened: Callable[[Buffer, Sequence[Buffer], Val], Reading] | None = None) -> Function:
    """``sums[rows][features] += x[rows] @ features.T`` over some steps of K, as the inner function ``name``.

    ``buffers`` are x, the packed weight, the sums and what else the feed needs. Numbers of a call: first element of x,
    of the weight and of the sums, the count of steps, 1 when what K has beyond whole steps follows them, and perhaps
    bytes to fetch ahead. ``opened`` reads weights from the second and the last buffers and the second number.
    """
    with kernel.function(name, buffers, numbers=6 if tile.told else 5) as micro:
        x, w, sums, *more = micro.buffers
        x_at, w_at, sums_at, steps, tail, *ahead = micro.numbers
        tile = replace(tile, prefetch=ahead[0]) if tile.told else tile
        feed, w = (feed, opened(w, more, w_at)) if opened else (feed.bound(more), w.at(w_at))
        x, sums = x.at(x_at), sums.at(sums_at)
        places = [r * tile.sums_stride + v * feed.lanes for r in range(tile.rows) for v in range(tile.vectors)]
        zero = constant(0, feed.acc, feed.lanes)
        totals = [zero if tile.fresh else sums.load(place, feed.lanes) for place in places]
        totals = sum_steps(kernel, feed, tile, (x, w), steps, totals, tile.chains)
        for place, total in zip(places, totals):
            sums.store(total, place)
        if k % feed.step:
            with kernel.when(tail.ne(0)):
                _add_tail(feed, tile, x.at(steps * feed.step), _at_step(feed, w, steps), sums)
    return micro


def sum_steps(kernel: Kernel, feed: AnyFeed, tile: Tile, streams: tuple[Buffer, Weights], steps: Val,
              totals: Sequence[Val], split: int = 1) -> list[Val]:
    """``totals`` after so many steps along x and the weights; each is kept as ``split`` sums meanwhile."""
    whole, chains = steps // tile.unroll * tile.unroll, in_chains(feed, totals, split)
    chains = add_whole(kernel, feed, tile, streams, whole, chains)
    return add_rest(kernel, feed, tile, streams, (whole, steps), join_chains(chains, len(totals)))


def in_chains(feed: AnyFeed, totals: Sequence[Val], split: int) -> list[Val]:
    """``totals`` and, for each, ``split - 1`` more sums from zero."""
    return [*totals, *[constant(0, feed.acc, feed.lanes)] * (len(totals) * (split - 1))]


def add_whole(kernel: Kernel, feed: AnyFeed, tile: Tile, streams: tuple[Buffer, Weights], steps: Val,
              chains: Sequence[Val]) -> list[Val]:
    """``chains`` after steps from 0 on, a multiple of the unrolled ones, which take turns on them."""
    count, w = tile.rows * tile.vectors, streams[1]
    split = len(chains) // count
    with kernel.loop(0, steps, tile.unroll, [*chains, *carried(w)]) as loop:
        sums = resumed(w, loop.values)
        for u in range(tile.unroll):
            part = slice((u % split) * count, (u % split + 1) * count)
            sums[part] = _one_step(feed, tile, streams, loop.index + u, sums[part], u == 0)
        loop.next(*sums, *carried(w))
    return resumed(w, loop.results)


def join_chains(chains: Sequence[Val], count: int) -> list[Val]:
    """One sum for each of ``count`` that were split."""
    totals = list(chains[:count])
    for part in range(count, len(chains), count):
        totals = [a + b for a, b in zip(totals, chains[part:part + count])]
    return totals


def add_rest(kernel: Kernel, feed: AnyFeed, tile: Tile, streams: tuple[Buffer, Weights], steps: tuple[Val, Val],
             totals: Sequence[Val]) -> list[Val]:
    """``totals`` after the steps from one number on to another, one by one."""
    if tile.unroll == 1:
        return list(totals)
    w = streams[1]
    with kernel.loop(*steps, carry=[*totals, *carried(w)]) as loop:
        sums = _one_step(feed, tile, streams, loop.index, resumed(w, loop.values))
        loop.next(*sums, *carried(w))
    return resumed(w, loop.results)


def carried(w: Weights) -> list[Val]:
    """What loops over steps hand on of the weights."""
    return [] if isinstance(w, Buffer) else w.carried


def resumed(w: Weights, values: Sequence[Val]) -> list[Val]:
    """``values`` of a loop less those at their end that are of the weights, which go on from there."""
    if isinstance(w, Buffer):
        return list(values)
    rest = len(values) - len(w.carried)
    w.carried = list(values[rest:])
    return list(values[:rest])


def _at_step(feed: AnyFeed, w: Weights, step: Val) -> Weights:
    return w.at(step * feed.stride) if isinstance(w, Buffer) else w.at_step(step)


def _one_step(feed: AnyFeed, tile: Tile, streams: tuple[Buffer, Weights], step: Val, totals: Sequence[Val],
              first: bool = True) -> list[Val]:
    """``totals`` after one more step, perhaps the ``first`` of some that are unrolled."""
    x, w = streams[0], _at_step(feed, streams[1], step)
    _prefetch(feed, tile, w, first)
    if tile.rows > tile.vectors:
        return _row_by_row(feed, tile, x.at(step * feed.step), w, totals)
    return _vector_by_vector(feed, tile, x.at(step * feed.step), w, totals)


def _row_by_row(feed: AnyFeed, tile: Tile, x: Buffer, w: Weights, totals: Sequence[Val]) -> list[Val]:
    """Weights stay in registers while the rows pass."""
    weights = [feed.weights(w, column) for column in tile.columns]
    sums = []
    for r in range(tile.rows):
        inputs = feed.inputs(x, r * tile.x_stride)
        row = totals[r * tile.vectors:(r + 1) * tile.vectors]
        sums += [feed.accumulate(total, weight, inputs) for total, weight in zip(row, weights)]
    return sums


def _vector_by_vector(feed: AnyFeed, tile: Tile, x: Buffer, w: Weights, totals: Sequence[Val]) -> list[Val]:
    """Inputs stay in registers while the weights pass."""
    inputs = [feed.inputs(x, r * tile.x_stride) for r in range(tile.rows)]
    sums = list(totals)
    for v, column in enumerate(tile.columns):
        weights = feed.weights(w, column)
        for r in range(tile.rows):
            place = r * tile.vectors + v
            sums[place] = feed.accumulate(sums[place], weights, inputs[r])
    return sums


def _prefetch(feed: AnyFeed, tile: Tile, w: Weights, first: bool) -> None:
    """Fetch ahead into the second-level cache: the first has too few miss buffers to keep memory busy."""
    if isinstance(tile.prefetch, int) and not tile.prefetch:
        return
    if not isinstance(w, Buffer):
        w.prefetch(tile.prefetch, first)
        return
    size = SIZES[feed.w_dtype]
    lines = {(column + start) * size // 64 for column in tile.columns for start in feed.spread}
    for line in sorted(lines):
        w.prefetch(constant(line * 64 // size) + tile.prefetch // size, locality=2)


def _add_tail(feed: AnyFeed, tile: Tile, x: Buffer, w: Weights, sums: Buffer) -> None:
    columns = [feed.weights(w, column, tail=True) for column in tile.columns]
    for r in range(tile.rows):
        inputs = feed.inputs(x, r * tile.x_stride, tail=True)
        for v, weights in enumerate(columns):
            place = r * tile.sums_stride + v * feed.lanes
            sums.store(feed.accumulate(sums.load(place, feed.lanes), weights, inputs), place)
