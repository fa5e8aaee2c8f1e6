"""Attention over blocks of keys that were chosen (``kv.choose``): the walk goes along those alone, as if no others were.

Counted among themselves, the keys of chosen blocks are as many as a shorter text's. The last of them, from the first
query's on, are all there: a key that a query does not see yet is as far behind it as in the whole text.
"""

from dataclasses import dataclass

from tilewright.codegen.cache_slots import SLOT_STEP
from tilewright.codegen.mlir.builder import Buffer
from tilewright.codegen.mlir.value import Val


@dataclass(frozen=True)
class Blocks:
    """What attention over chosen blocks is: keys of a block, queries that share a list, and the most blocks there are."""

    block: int
    queries: int
    most: int

    @property
    def run(self) -> int:
        """Keys of a block that lie together in one piece."""
        return min(self.block, SLOT_STEP)

    def queries_of_task(self, most: int) -> int:
        """Queries of a task: a part of those that share a list."""
        return min(self.queries, 1 << (most.bit_length() - 1))

    def listed(self, memory: Buffer, heads: int, lane: tuple[Val, Val], query: Val, s: Val) -> "Listed":
        """The list of ``lane``, a sequence and a head, for the block of queries with ``query``."""
        batch, head = lane
        lists = (s + (self.queries - 1)) // self.queries
        return Listed(memory, ((batch * heads + head) * lists + query // self.queries) * (1 + self.most), self.block)


@dataclass(frozen=True)
class Listed:
    """One list, from element ``at`` on: how many blocks, then which."""

    memory: Buffer
    at: Val
    block: int

    def key(self, counted: Val) -> Val:
        """The position of a key that is number ``counted`` among those chosen."""
        found = self.memory.load(self.at + 1 + counted // self.block).to("index")
        return found * self.block + counted % self.block

    def skipped(self) -> Val:
        """Keys before the last chosen block that were not chosen."""
        last = self.memory.load(self.at).to("index") - 1
        return (self.memory.load(self.at + 1 + last).to("index") - last) * self.block
