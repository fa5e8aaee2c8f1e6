"""Put together what tasks found in parts of the keys (Dao et al., Flash-Decoding, 2023).

A part keeps for each row the sums of its values, its top score (in units of log 2) and the weight of all its keys, both
relative to that top. The order of the parts is fixed, so the result does not depend on threads.
"""

from dataclasses import dataclass

from tilewright.codegen.cache_slots import VALUE_STEP, round_up
from tilewright.codegen.mlir import math
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.flash_rows import LOG2E, LOWEST
from tilewright.codegen.mlir.value import Val, constant

_AT_ONCE = 8  # vectors of a result


def part_size(vdim: int) -> int:
    """f32 elements that one row of one part takes."""
    return round_up(vdim, VALUE_STEP) + VALUE_STEP


@dataclass(frozen=True)
class Parts:
    """The parts of one row: the first of ``count`` starts at ``place``, the others ``stride`` elements apart."""

    kernel: Kernel
    memory: Buffer
    place: Val
    stride: int
    count: Val
    vdim: int

    def combine(self, out: Buffer, place: Val, sink: Val | None) -> None:
        """Store the row's result; ``sink`` is a further score that only counts in the denominator."""
        lanes = self.kernel.lanes
        top, total = self.total(sink)
        factor = (total > 0.0).select(1.0 / total, constant(0.0, "f32"))
        starts = range(0, round_up(self.vdim, lanes), lanes)
        for first in range(0, len(starts), _AT_ONCE):
            self._columns(starts[first:first + _AT_ONCE], top, factor, out, place)

    def total(self, sink: Val | None) -> tuple[Val, Val]:
        """The row's top score and the weight of all keys, and of the ``sink``, relative to that."""
        size = round_up(self.vdim, VALUE_STEP)
        lowest = constant(LOWEST, "f32") if sink is None else sink * LOG2E
        with self.kernel.loop(0, self.count, carry=[lowest]) as loop:
            loop.next(loop.values[0].max(self._load(loop.index, size)))
        (top,) = loop.results
        none = constant(0.0, "f32")
        with self.kernel.loop(0, self.count, carry=[none if sink is None else math.exp2_of_negative(lowest - top)]) as loop:
            loop.next(self._load(loop.index, size + 1).fma(self._share(loop.index, top), loop.values[0]))
        return top, loop.results[0]

    def _columns(self, starts: range, top: Val, factor: Val, out: Buffer, place: Val) -> None:
        lanes = self.kernel.lanes
        with self.kernel.loop(0, self.count, carry=[constant(0.0, "f32", lanes)] * len(starts)) as loop:
            share = self._share(loop.index, top).splat(lanes)
            loop.next(*[self._load(loop.index, start, lanes).fma(share, sums) for start, sums in zip(starts, loop.values)])
        for start, sums in zip(starts, loop.results):
            mask = None if start + lanes <= self.vdim else self.kernel.mask(constant(self.vdim - start), lanes)
            out.store((sums * factor).to(out.dtype), place + start, mask)

    def _share(self, part: Val, top: Val) -> Val:
        """What the part's numbers are multiplied with to be relative to the top of all."""
        return math.exp2_of_negative(self._load(part, round_up(self.vdim, VALUE_STEP)) - top)

    def _load(self, part: Val, start: int, lanes: int = 0) -> Val:
        return self.memory.load(self.place + (part * self.stride + start), lanes)
