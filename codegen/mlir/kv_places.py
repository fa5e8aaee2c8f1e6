"""Where the positions of a sequence lie in a cache: in its own memory in order, in pages by a table, or round a ring.

Memory is a row of runs (`CacheLayout.run` slots of one head that lie together), numbered through all regions and heads. A
position is in one of them; kernels walk along positions and ask for each run where it is, and so do not know layouts.
"""

from dataclasses import dataclass
from typing import Protocol

from tilewright.codegen.cache import SLOT_STEP, round_up
from tilewright.codegen.mlir.builder import Buffer
from tilewright.codegen.mlir.value import Val
from tilewright.ir import Layout, Paged, Ring


class Regions(Protocol):
    """What places need to know of a layout in memory: slots of a region, and of a run."""

    @property
    def heads(self) -> int: ...

    @property
    def layout(self) -> Layout: ...

    @property
    def slots(self) -> int: ...

    @property
    def run(self) -> int: ...


@dataclass(frozen=True)
class Places:
    """The places of a cache's positions. Pages come with ``table`` i32 ``[B, width]``."""

    cache: Regions
    table: Buffer | None = None
    width: Val | None = None

    def run_of(self, batch: Val, head: Val, position: Val) -> Val:
        """The number of the run that holds ``position``."""
        cache = self.cache
        if self.table is not None:  # a page is one run for each head
            page = self.table.load(batch * self.width + position // cache.run)
            return page.to("index") * cache.heads + head
        runs = cache.slots // cache.run
        first = (batch * cache.heads + head) * runs
        return first if runs == 1 else first + self.slot_of(position) // cache.run

    def slot_of(self, position: Val) -> Val:
        """The slot of ``position`` in its region, which may be one of many."""
        match self.cache.layout:
            case Paged(page):
                return position % page
            case Ring() as ring:
                turning = position % ring.size + round_up(ring.sinks, SLOT_STEP)
                return (position < ring.sinks).select(position, turning) if ring.sinks else turning
        return position

    def in_run(self, position: Val) -> Val:
        """The slot of ``position`` in its run."""
        return self.slot_of(position) % self.cache.run if self.cache.run < self.cache.slots else self.slot_of(position)
