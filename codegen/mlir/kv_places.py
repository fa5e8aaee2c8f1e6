"""Where the positions of a sequence lie in a cache: in its own memory in order, in pages by a table, or round a ring.

Memory is a row of runs (`CacheLayout.run` slots of one head that lie together), numbered through all regions and heads. A
position is in one of them; kernels walk along positions and ask for each run where it is, and so do not know layouts.
"""

from dataclasses import dataclass
from typing import Protocol

from tilewright.codegen.cache_slots import SLOT_STEP, round_up
from tilewright.codegen.mlir.builder import Buffer
from tilewright.codegen.mlir.value import Val, constant
from tilewright.ir import Layout, Ring


class Regions(Protocol):
    """What places need to know of a layout in memory: slots of a region, and of a run; elements of a run of keys."""

    @property
    def heads(self) -> int: ...

    @property
    def layout(self) -> Layout: ...

    @property
    def slots(self) -> int: ...

    @property
    def run(self) -> int: ...

    @property
    def k_run(self) -> int: ...

    @property
    def k_summaries(self) -> int: ...


def key_place(cache: Regions, run: Val) -> Val:
    """Where run number ``run`` of keys begins in memory: behind those of each page are the summaries of its heads."""
    place = run * cache.k_run
    return place + run // cache.heads * cache.k_summaries if cache.k_summaries else place


@dataclass(frozen=True)
class Chosen:
    """The pages that each head of keys is to see, i32 ``[B, heads, most]``: keys are counted through them, in order."""

    pages: Buffer
    heads: int
    most: int
    page: int

    def count(self, batch: Val, head: Val) -> Val:
        """How many there are: those below 0 stand at the end."""
        row, found = (batch * self.heads + head) * self.most, constant(0)
        for bit in reversed(range(self.most.bit_length())):
            more = found + (1 << bit)
            last = self.pages.load(row + (more.min(self.most) - 1))
            found = ((more <= self.most) & (last >= 0)).select(more, found)
        return found

    def position(self, batch: Val, head: Val, key: Val) -> Val:
        """Where key number ``key`` of them stands in the sequence; any place for those behind the last."""
        row = (batch * self.heads + head) * self.most
        number = self.pages.load(row + (key // self.page).min(self.most - 1))
        return number.max(0).to("index") * self.page + key % self.page


@dataclass(frozen=True)
class Places:
    """The places of a cache's positions. Pages come with ``table`` i32 ``[B, width]``."""

    cache: Regions
    table: Buffer | None = None
    width: Val | None = None

    def run_of(self, batch: Val, head: Val, position: Val) -> Val:
        """The number of the run that holds ``position`` and those around it, of a ring the part that goes round."""
        cache = self.cache
        if self.table is not None:  # a page is one run for each head
            page = self.table.load(batch * self.width + position // cache.run)
            return page.to("index") * cache.heads + head
        if isinstance(cache.layout, Ring):
            position = position % cache.layout.size + round_up(cache.layout.sinks, SLOT_STEP)
        return self.own_run(batch, head, position)

    def own_run(self, batch: Val, head: Val, slot: Val) -> Val:
        """The number of the run that holds a slot of the sequence's own memory: of a ring's sinks, their position."""
        runs = self.cache.slots // self.cache.run
        first = (batch * self.cache.heads + head) * runs
        return first if runs == 1 else first + slot // self.cache.run

    def of(self, batch: Val, head: Val, position: Val) -> tuple[Val, Val]:
        """The number of the run that ``position`` is written to, and its slot there."""
        run, layout = self.run_of(batch, head, position), self.cache.layout
        if isinstance(layout, Ring) and layout.sinks:
            run = (position < layout.sinks).select(self.own_run(batch, head, position), run)
        return run, position % self.cache.run if self.cache.run < self.cache.slots or self.table is not None else position
