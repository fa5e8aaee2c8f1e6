"""Rows of attention with running softmax statistics (Milakov & Gimelshein 2018, Dao et al. 2022).

A task owns some rows, each one query of one head. Here is what they keep from one block of keys to the next, whatever
the blocks are made of. Scores are in units of log 2, which saves a multiplication in every exponential.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tilewright.codegen.cache_slots import VALUE_STEP, round_up
from tilewright.codegen.mlir import math
from tilewright.codegen.mlir.builder import Buffer, Kernel, Loop
from tilewright.codegen.mlir.value import Val, constant, intrinsic, iota
from tilewright.codegen.schedule import AttentionSchedule, registers

LOWEST = -(2.0**100)  # below every real score, yet finite: differences of two of them are 0, not NaN
LOG2E = 1.4426950408889634
HEIGHTS = (6, 3, 2, 1)  # of tiles, when the count of rows is only known at run time
_UNROLL = 4  # vectors of scores at a time


@dataclass(frozen=True)
class Shape:
    """Static facts: ``group`` heads share keys; sizes of a head; ``dtype`` and ``panel`` of the blocks.

    ``run`` keys lie together, and so many values; 0 when all of a block do. With ``picked`` runs are parts of one piece.
    Where ``queries`` is 1, rows of up to ``together`` sequences meet a block one after the other. With ``dot`` the queries
    and p are rounded to bf16, as vdpbf16ps wants them: for bf16 queries and blocks only. With ``turned``
    values are the first components of keys.
    """

    group: int
    dim: int
    vdim: int
    dtype: str
    panel: int
    dot: bool
    scale: float
    softcap: float
    queries: int | None = None  # of a sequence in one call, when known
    run: int = 0
    together: int = 1
    picked: bool = False
    turned: bool = False


# 2**f for 0 <= f < 1, within 7.5e-5 and 9e-8 of the exact value: least-squares fits with the greatest errors levelled.
_ROUGH = (0.07802419364452362, 0.2260672152042389, 0.6958337426185608, 0.9999251961708069)
_EXACT = (0.0018775742501020432, 0.008989345282316208, 0.05582631379365921, 0.24015361070632935, 0.6931530833244324,
          0.9999999403953552)


def power_of_two(x: Val, rough: bool) -> Val:
    """2**x for x <= 0 (-inf too), within 2e-7, or within 8e-5 when ``rough``: enough for what is rounded to bf16."""
    if x.lanes * 32 != 512:
        return math.exp2_of_negative(x)
    zero, every, current = constant(0.0, "f32", 16), constant(-1, "i16"), constant(4, "i32")
    floor = constant(9, "i32")  # the fraction is what the floor leaves; infinities leave 0
    fraction = intrinsic("llvm.x86.avx512.mask.reduce.ps.512", "f32", 16, x, floor, zero, every, current)
    value = math.polynomial(fraction, _ROUGH if rough else _EXACT)
    return intrinsic("llvm.x86.avx512.mask.scalef.ps.512", "f32", 16, value, x, zero, every, current)


Adjust = Callable[[Val, Val, Val, int], Val]
"""``(scores, row, key, lanes) -> scores``: add a bias to, or mask, the scores of ``lanes`` keys from ``key`` on."""


@dataclass(frozen=True)
class Visible:
    """Keys ``low <= key < high`` that a row sees; ``low`` is None when it is always 0."""

    low: Val | None
    high: Val


class SoftRows:
    """The rows of one task, held in scratch memory."""

    def __init__(self, kernel: Kernel, shape: Shape, schedule: AttentionSchedule, shared: SoftRows | None = None) -> None:
        """``shared`` are the same rows over another kind of blocks: what they keep is kept together."""
        self.kernel, self.shape, self.keys, self.lanes = kernel, shape, schedule.keys, kernel.lanes
        self.rows = max(schedule.rows // shape.group, 1) * shape.group
        self.exact = shape.queries == 1  # each sequence has the same few rows
        if self.exact:
            self.rows = shape.group * shape.together
        self.at_once = shape.group if self.exact else self.rows
        self.out_size = round_up(shape.vdim, VALUE_STEP)
        self.scores = kernel.scratch(self.at_once * self.keys, "f32")
        if shared is not None:
            self.top, self.weight, self.sums = shared.top, shared.weight, shared.sums
            return
        self.top = kernel.scratch(round_up(self.rows, self.lanes), "f32")
        self.weight = kernel.scratch(self.rows * self.lanes, "f32")
        self.sums = kernel.scratch(self.rows * self.out_size, "f32")

    # --- tiles --------------------------------------------------------------------------------------------------------

    def _heights(self, rows: int) -> list[int]:
        """Rows of the tiles that ``rows`` rows are cut into: when every task has them, as few as registers allow."""
        if not self.exact:
            return list(HEIGHTS)
        parts = -(-rows // max(self._widest(1) // 2, 4))
        return [rows // parts + (i < rows % parts) for i in range(parts)]

    def _widest(self, height: int) -> int:
        """Vectors that a tile of so many rows has registers for."""
        return max(registers(self.kernel.target) * 3 // 4 // height, 1)

    def _walk(self, heights: list[int], rows: Val, call: Callable[[int, Val], None]) -> None:
        """``call(height, first row)`` for tiles of these heights that cover all rows."""
        done = constant(0)
        if self.exact:
            for height in heights:
                call(height, done)
                done = done + height
            return
        for height in HEIGHTS[:2]:
            start, done = done, done + (rows - done) // height * height
            with self.kernel.loop(start, done, height) as loop:
                call(height, loop.index)
        for height in HEIGHTS[2:]:
            with self.kernel.when((rows - done).eq(height)):
                call(height, done)

    # --- a task -------------------------------------------------------------------------------------------------------

    def reset(self, rows: Val) -> None:
        """Forget everything: no key has been seen."""
        zero = constant(0.0, "f32", self.lanes)
        with self.kernel.loop(0, rows) as loop:
            self.top.store(constant(LOWEST, "f32"), loop.index)
            self.weight.store(zero, loop.index * self.lanes)
            for place in range(0, self.out_size, self.lanes):
                self.sums.store(zero, loop.index * self.out_size + place)

    @contextmanager
    def _vectors(self, keys: Val, *carry: Val) -> Iterator[tuple[Loop, list[Val]]]:
        """A loop over the scores of a row, with the starts of the vectors of each round."""
        with self.kernel.loop(0, keys, _UNROLL * self.lanes, carry) as loop:
            yield loop, [loop.index + i * self.lanes for i in range(_UNROLL)]

    def _adjust(self, row: Val, key: Val, keys: Val, seen: Visible, adjust: Adjust | None, plain: bool) -> None:
        """Mask the scores of a row and, unless ``plain``, bring them to their final value in units of log 2."""
        with self._vectors(keys) as (_, starts):
            for start in starts:
                place = row * self.keys + start
                score = self.scores.load(place, self.lanes)
                if not plain:
                    score = self._final(score, row, key + start, adjust)
                number = iota(self.lanes)
                keep = number < (seen.high - key - start).to("i32").splat(self.lanes)
                if seen.low is not None:
                    keep = keep & (number >= (seen.low - key - start).to("i32").splat(self.lanes))
                self.scores.store(keep.select(score, float("-inf")), place)

    def _final(self, score: Val, row: Val, key: Val, adjust: Adjust | None) -> Val:
        score = score * self.shape.scale
        if self.shape.softcap:
            score = math.tanh(score * (1 / self.shape.softcap)) * self.shape.softcap
        if adjust is not None:
            score = adjust(score, row, key, self.lanes)
        return score * LOG2E

    def _rescale(self, row: Val, old: Val, new: Val) -> None:
        factor = math.exp2_of_negative((old - new).splat(self.lanes))
        self.top.store(new, row)
        self.weight.store(self.weight.load(row * self.lanes, self.lanes) * factor, row * self.lanes)
        for start in range(0, self.out_size, self.lanes):
            place = row * self.out_size + start
            self.sums.store(self.sums.load(place, self.lanes) * factor, place)

    def store_part(self, row: Val, memory: Buffer, place: Val) -> None:
        """Keep what the row has seen: the sums, then the top and its weight, ``part_size`` elements from ``place`` on."""
        for start in range(0, self.out_size, self.lanes):
            memory.store(self.sums.load(row * self.out_size + start, self.lanes), place + start)
        memory.store(self.top.load(row), place + self.out_size)
        memory.store(self.weight.load(row * self.lanes, self.lanes).reduce("sum"), place + (self.out_size + 1))

    def total(self, row: Val, sink: Val | None = None) -> tuple[Val, Val]:
        """The row's top score and the weight of all keys, and of the ``sink``, relative to that."""
        top, total = self.top.load(row), self.weight.load(row * self.lanes, self.lanes).reduce("sum")
        if sink is None:
            return top, total
        both = top.max(sink * LOG2E)
        return both, total * math.exp2_of_negative(top - both) + math.exp2_of_negative(sink * LOG2E - both)

    def finish(self, row: Val, out: Buffer, place: Val, sink: Val | None = None) -> None:
        """Store the row's result; ``sink`` is a further score that only counts in the denominator."""
        total = self.weight.load(row * self.lanes, self.lanes).reduce("sum")
        factor = (total > 0.0).select(1.0 / total, constant(0.0, "f32"))
        if sink is not None:
            top, sink = self.top.load(row), sink * LOG2E
            both = top.max(sink)
            share = math.exp2_of_negative(top - both)
            factor = share / (total * share + math.exp2_of_negative(sink - both))
        for start in range(0, self.out_size, self.lanes):
            left = self.shape.vdim - start
            if left <= 0:
                break
            mask = None if left >= self.lanes else self.kernel.mask(constant(left), self.lanes)
            value = self.sums.load(row * self.out_size + start, self.lanes) * factor
            out.store(value.to(out.dtype), place + start, mask)
