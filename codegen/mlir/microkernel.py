"""The inner loop of linear kernels: a register tile of f32 accumulators, fed by packed weights and rows of x.

A `Feed` says how one step along K is loaded and multiplied for a pair of dtypes. All of them accumulate in f32:

- bf16 x bf16 on a bf16-dot target: vdpbf16ps on pairs;
- bf16 weights otherwise: a pair splits into two f32 by a shift and a mask;
- f32, f16 and i8 weights: widened, then fma (i8 scales are applied to the sum, by the caller).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.codegen.mlir.builder import Buffer, Function, Kernel
from tilewright.codegen.mlir.value import Val, constant, fma, intrinsic

_HIGH_HALF = -0x10000
_MIN_CHAINS = 8  # independent accumulators that hide the latency of fma


@dataclass(frozen=True)
class Feed:
    """How x (``x_dtype``) meets weights stored as ``w_dtype`` in panels of ``panel`` features."""

    x_dtype: str
    w_dtype: str
    panel: int
    lanes: int
    dot: bool

    @property
    def step(self) -> int:
        """k's that one step consumes: 2 when either side comes in bf16 pairs."""
        return 2 if "bf16" in (self.x_dtype, self.w_dtype) else 1

    def weights(self, w: Buffer, place: Val, vector: int, tail: bool = False) -> list[Val]:
        """The factors of one step for vector number ``vector`` of the panel; ``tail``: only its first k."""
        column = vector * self.lanes
        if self.w_dtype == "bf16":
            pairs = w.load(place + 2 * column, 2 * self.lanes)
            if self.dot:
                return [pairs]
            return _split(pairs)[:1 if tail else 2]
        count = 1 if tail else self.step
        return [w.load(place + (i * self.panel + column), self.lanes).to("f32") for i in range(count)]

    def inputs(self, x: Buffer, place: Val, tail: bool = False) -> list[Val]:
        """The factors of one row of x, in every lane."""
        if self.x_dtype != "bf16":
            count = 1 if tail else self.step
            return [x.load(place + i).to("f32").splat(self.lanes) for i in range(count)]
        if tail:
            bits = x.load(place, 1).bitcast("i16").lane(0).to("i32") & 0xFFFF
            low = bits.splat(self.lanes)
            return [low.bitcast("bf16")] if self.dot else [(low << 16).bitcast("f32")]
        pair = x.load(place, 2).bitcast("i32").lane(0).splat(self.lanes)
        return [pair.bitcast("bf16")] if self.dot else _split(pair.bitcast("bf16"))

    def accumulate(self, total: Val, weights: Sequence[Val], inputs: Sequence[Val]) -> Val:
        for weight, value in zip(weights, inputs, strict=True):
            if self.dot:
                total = intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", "f32", self.lanes, total, weight, value)
            else:
                total = fma(weight, value, total)
        return total


def _split(pairs: Val) -> list[Val]:
    """bf16 pairs -> f32 of the even and of the odd elements."""
    bits = pairs.bitcast("i32")
    return [(bits << 16).bitcast("f32"), (bits & _HIGH_HALF).bitcast("f32")]


def feed_for(kernel: Kernel, x_dtype: str, w_dtype: str, panel: int) -> Feed:
    """The feed for these dtypes on the kernel's target."""
    dot = kernel.target.has_bf16_dot and x_dtype == w_dtype == "bf16"
    return Feed(x_dtype, w_dtype, panel, kernel.lanes, dot)


@dataclass(frozen=True)
class Tile:
    """Shape of a micro-kernel: ``rows`` of x against ``vectors`` of features; ``x_stride`` elements between rows."""

    rows: int
    vectors: int
    x_stride: int
    unroll: int
    prefetch: int  # bytes ahead in the weight stream, 0 = none


def emit_micro_kernel(kernel: Kernel, feed: Feed, tile: Tile, k: int, buffers: Sequence[Buffer]) -> Function:
    """``sums[rows][panel] += x[rows] @ panel.T`` over some steps of K, as an inner function.

    ``buffers`` are x, the packed weight and the f32 sums. Numbers of a call: first element of x, of the weight and of
    the sums, the count of steps, and 1 when the last odd k follows them.
    """
    with kernel.function(f"{feed.w_dtype}_rows{tile.rows}", buffers, numbers=5) as micro:
        x, w, sums = micro.buffers
        x_at, w_at, sums_at, steps, tail = micro.numbers
        x, w, sums = x.at(x_at), w.at(w_at), sums.at(sums_at)
        totals = [[sums.load(r * feed.panel + v * feed.lanes, feed.lanes) for v in range(tile.vectors)]
                  for r in range(tile.rows)]
        totals = _sum_steps(kernel, feed, tile, (x, w), steps, totals)
        _store(feed, sums, totals)
        if k % feed.step:
            with kernel.when(tail.ne(0)):
                _add_tail(feed, tile, x.at(steps * feed.step), w.at(steps * (feed.step * feed.panel)), sums)
    return micro


def _sum_steps(kernel: Kernel, feed: Feed, tile: Tile, streams: tuple[Buffer, Buffer], steps: Val,
               totals: list[list[Val]]) -> list[list[Val]]:
    count = tile.rows * tile.vectors
    split = min(tile.unroll, -(-_MIN_CHAINS // count))
    zero = constant(0.0, "f32", feed.lanes)
    carry = [total for row in totals for total in row] + [zero] * (count * (split - 1))
    whole = steps // tile.unroll * tile.unroll
    with kernel.loop(0, whole, tile.unroll, carry) as loop:
        chains = loop.values
        for u in range(tile.unroll):
            part = slice((u % split) * count, (u % split + 1) * count)
            chains[part] = _one_step(feed, tile, streams, loop.index + u, chains[part])
        loop.next(*chains)
    chains = loop.results
    for part in range(1, split):
        chains[:count] = [a + b for a, b in zip(chains[:count], chains[part * count:])]
    with kernel.loop(whole, steps, carry=chains[:count]) as loop:
        loop.next(*_one_step(feed, tile, streams, loop.index, loop.values))
    return [loop.results[r * tile.vectors:(r + 1) * tile.vectors] for r in range(tile.rows)]


def _one_step(feed: Feed, tile: Tile, streams: tuple[Buffer, Buffer], step: Val, totals: Sequence[Val]) -> list[Val]:
    x, w = streams
    place = step * (feed.step * feed.panel)
    _prefetch(feed, tile, w, place)
    weights = [feed.weights(w, place, v) for v in range(tile.vectors)]
    sums = []
    for r in range(tile.rows):
        inputs = feed.inputs(x, step * feed.step + r * tile.x_stride)
        row = totals[r * tile.vectors:(r + 1) * tile.vectors]
        sums += [feed.accumulate(total, weight, inputs) for total, weight in zip(row, weights)]
    return sums


def _prefetch(feed: Feed, tile: Tile, w: Buffer, place: Val) -> None:
    if not tile.prefetch:
        return
    size = {"f32": 4, "i8": 1}.get(feed.w_dtype, 2)
    ahead = tile.prefetch // size
    for line in range(0, feed.step * feed.panel, 64 // size):
        w.prefetch(place + (ahead + line))


def _add_tail(feed: Feed, tile: Tile, x: Buffer, w: Buffer, sums: Buffer) -> None:
    zero = constant(0)
    for r in range(tile.rows):
        inputs = feed.inputs(x, zero + r * tile.x_stride, tail=True)
        for v in range(tile.vectors):
            place = r * feed.panel + v * feed.lanes
            total = feed.accumulate(sums.load(place, feed.lanes), feed.weights(w, zero, v, tail=True), inputs)
            sums.store(total, place)


def _store(feed: Feed, sums: Buffer, totals: Sequence[Sequence[Val]]) -> None:
    for r, row in enumerate(totals):
        for v, total in enumerate(row):
            sums.store(total, r * feed.panel + v * feed.lanes)
