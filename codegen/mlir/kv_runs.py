"""Sums over values that lie in runs here and there: the micro-kernel goes from run to run with its sums in registers.

The order in which a total grows is that of `emit_micro_kernel` over the same steps in one piece, so that where the runs lie
makes no difference to a single bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tilewright.codegen.mlir.builder import Buffer, Function, Kernel
from tilewright.codegen.mlir.microkernel import AnyFeed, Tile, add_rest, add_whole, in_chains, join_chains
from tilewright.codegen.mlir.value import SIZES, Val


@dataclass(frozen=True)
class Runs:
    """Runs of ``length`` k's, a multiple of unrolled steps, each ``size`` elements of the weights.

    With ``ahead`` the lines of the run so many numbers further on are fetched meanwhile: no hardware can guess where that
    lies.
    """

    length: int
    size: int
    ahead: int = 0


def emit_runs_kernel(kernel: Kernel, name: str, feed: AnyFeed, tile: Tile, runs: Runs,
                     buffers: Sequence[Buffer]) -> Function:
    """``sums[rows][features] += x[rows] @ features.T`` over some steps of K, as the inner function ``name``.

    ``buffers`` are x, the weights, the sums, and i64 numbers of runs, in the order of K. Numbers of a call: first element
    of x, of the weights in a run, and of the sums; the count of steps, and the first of the runs' numbers.
    """
    per = runs.length // feed.step
    if per % tile.unroll:
        raise ValueError(f"runs of {per} steps do not hold whole {tile.unroll} steps")
    with kernel.function(name, buffers, numbers=5) as micro:
        x, w, sums, numbers = micro.buffers
        x_at, w_at, sums_at, steps, first = micro.numbers

        def part(run: Val) -> tuple[Tile, tuple[Buffer, Buffer]]:
            number = numbers.load(first + run).to("index")
            fetching = tile
            if runs.ahead:
                following = numbers.load(first + run + runs.ahead).to("index")
                fetching = replace(tile, prefetch=(following - number) * (runs.size * SIZES[feed.w_dtype]))
            return fetching, (x.at(x_at + run * runs.length), w.at(number * runs.size + w_at))

        sums = sums.at(sums_at)
        places = [r * tile.sums_stride + v * feed.lanes for r in range(tile.rows) for v in range(tile.vectors)]
        chains = in_chains(feed, [sums.load(place, feed.lanes) for place in places], tile.chains)
        whole = steps // tile.unroll * tile.unroll
        full = whole // per
        with kernel.loop(0, full, carry=chains) as loop:
            loop.next(*add_whole(kernel, feed, *part(loop.index), per, loop.values))
        last, done = part(full), full * per
        chains = add_whole(kernel, feed, *last, whole - done, loop.results)
        totals = add_rest(kernel, feed, *last, (whole - done, steps - done), join_chains(chains, len(places)))
        for place, total in zip(places, totals):
            sums.store(total, place)
    return micro
