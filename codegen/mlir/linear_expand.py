"""Codes of four bits or fewer that expand to i8 by whole steps, group by group, under one scale a row (``quant.expand``).

What meets the int8 codes of x are the expanded weights plus 128: ``step * code + (128 - step * zero)``, held to 0..255 by
additions and subtractions that saturate. A step times the largest code fits in a byte (see `largest_step`), so that one
multiplication of 16 bits expands two codes. Sums stay in i32 over all of K; what 128 adds is corrected when they start,
as for any weights of i8. For many rows a block of weights is expanded into scratch memory first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tilewright.codegen.mlir.builder import Buffer, Function, Kernel
from tilewright.codegen.mlir.linear_codes import CODES, DotFeed
from tilewright.codegen.mlir.linear_groups import Groups
from tilewright.codegen.mlir.microkernel import Tile, Weights, sum_steps
from tilewright.codegen.mlir.value import Val, constant, intrinsic


def largest_step(weight: str) -> int:
    """The largest step whose product with every code fits in a byte."""
    return 255 // ((1 << CODES[weight]) - 1)


@dataclass(frozen=True)
class Levels:
    """How the codes of a group expand, for a vector of features: each number in every byte (``step``: every 16 bits)."""

    step: Val
    up: Val
    down: Val

    @classmethod
    def load(cls, steps: Buffer, zeros: Buffer | None, at: Val, feed: DotFeed) -> Levels:
        step = steps.load(at, feed.lanes).to("i32")
        middle = constant(1 << feed.bits - 1, "i32", feed.lanes)
        more = 128 - step * (zeros.load(at, feed.lanes).to("i32") if zeros else middle)
        up, down = more.max(0), (-more).max(0).min(255)
        return cls(step * 0x00010001, up * 0x01010101, down * 0x01010101)

    def expand(self, codes: Val) -> Val:
        """Words of four codes -> words of four weights plus 128."""
        products = (codes.bitcast("i16") * self.step.bitcast("i16")).bitcast("u8")
        raised = intrinsic("llvm.uadd.sat", "u8", products.lanes, products, self.up.bitcast("u8"))
        return intrinsic("llvm.usub.sat", "u8", products.lanes, raised, self.down.bitcast("u8")).bitcast("i32")


@dataclass(frozen=True)
class ExpandFeed(DotFeed):
    """Expands while it multiplies; ``levels`` are those of the group, by the place of a vector of weights."""

    levels: Mapping[int, Levels] | None = None

    @property
    def parts(self) -> int:
        return self.step // 4 * (1 if self.vnni else 2)

    def expanded(self, w: Weights, place: Val | int, levels: Levels) -> list[Val]:
        """Words of four weights plus 128: the k's of one step."""
        words = self.load(w, place)
        return [levels.expand(self.codes(words, quad, 0, 0x01010101)) for quad in range(self.step // 4)]

    def weights(self, w: Weights, place: Val | int, tail: bool = False) -> list[Val]:
        assert self.levels is not None
        assert isinstance(place, int)
        return [factor for words in self.expanded(w, place, self.levels[place]) for factor in self.bytes(words)]

    def inputs(self, x: Buffer, place: Val | int, tail: bool = False) -> list[Val]:
        quads = [self.quad(x, place + 4 * i, 4) for i in range(self.step // 4)]
        return [factor for quad in quads for factor in self.wide(quad)]

    def accumulate(self, total: Val, weights: Sequence[Val], inputs: Sequence[Val]) -> Val:
        return self.accumulate_bytes(total, weights, inputs)


def emit_expand_kernel(kernel: Kernel, name: str, feed: ExpandFeed, tile: Tile, groups: Groups, buffers: Sequence[Buffer]
                       ) -> Function:  # fmt: skip
    """``sums[rows][features] += x[rows] @ features.T`` over some groups of K, as the inner function ``name``.

    ``buffers`` are x, the codes, the sums, the steps and perhaps the zero points. Numbers of a call: first element of x, of
    the codes, of the sums and of the steps (and zero points), and the count of groups.
    """
    with kernel.function(name, buffers, numbers=5) as micro:
        x, w, sums, steps, *zeros = micro.buffers
        x_at, w_at, sums_at, steps_at, count = micro.numbers
        sums, size = sums.at(sums_at), groups.size // feed.step
        places = [r * tile.sums_stride + v * feed.lanes for r in range(tile.rows) for v in range(tile.vectors)]
        with kernel.loop(0, count, carry=[sums.load(place, feed.lanes) for place in places]) as loop:
            at = steps_at + loop.index * feed.panel
            levels = {column: Levels.load(steps, zeros[0] if zeros else None, at + v * feed.lanes, feed)
                      for v, column in enumerate(tile.columns)}  # fmt: skip
            streams = x.at(x_at + loop.index * groups.size), w.at(w_at + loop.index * (size * feed.stride))
            inner = replace(feed, levels=levels)
            loop.next(*sum_steps(kernel, inner, tile, streams, constant(size), loop.values))
        for place, total in zip(places, loop.results):
            sums.store(total, place)
    return micro


def expand_weights(kernel: Kernel, feed: ExpandFeed, groups: Groups, w: Buffer, levels: Sequence[Buffer], at: Val,
                   count: Val, block: Buffer) -> None:  # fmt: skip
    """``count`` k's of the panel at ``w``, with steps (and zero points) at ``at``, into ``block`` as codes of 8 bits."""
    steps, *zeros = levels
    with kernel.loop(0, count // groups.size) as group:
        for column in range(0, feed.panel, feed.lanes):
            place = at + group.index * feed.panel + column
            found = Levels.load(steps, zeros[0] if zeros else None, place, feed)
            with kernel.loop(0, groups.size // feed.step) as loop:
                step = group.index * (groups.size // feed.step) + loop.index
                quads = feed.expanded(w, step * feed.stride + 4 * column, found)
                for i, quad in enumerate(quads):
                    target = (step * len(quads) + i) * (4 * feed.panel) + 4 * column
                    block.store(quad.bitcast("u8"), target)
