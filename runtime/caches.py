"""How many bytes the KV caches of a program take, by arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.runtime.errors import InputError
from tilewright.runtime.manifest import StateSpec

SPARE = 1
"""Pages of every pool that no sequence gets: page 0 takes what is written for padding."""


@dataclass(frozen=True)
class CacheSizes:
    """The states of a program together.

    ``capacity``: positions that a sequence may have. ``page``: tokens of a page, 0 when there are none; ``page_bytes`` a
    page takes in all layers. ``sequence_bytes``: what a sequence has of its own. ``chunk``: the most tokens that a call
    appends, 0 for no limit. ``unpadded``: whether all of them must be tokens of the text.
    """

    capacity: int
    page: int
    page_bytes: int
    sequence_bytes: int
    chunk: int
    unpadded: bool

    @staticmethod
    def of(states: Sequence[StateSpec]) -> CacheSizes:
        paged = [s for s in states if s.page]
        own = [s.k_beside + s.v_beside if s.page else s.k_bytes + s.v_bytes for s in states]
        return CacheSizes(
            min((s.length for s in states), default=0),
            paged[0].page if paged else 0,
            sum(s.k_bytes + s.v_bytes for s in paged),
            sum(own),
            min((s.chunk for s in states if s.chunk), default=0),
            any(s.unpadded for s in states),
        )

    def pages(self, tokens: int) -> int:
        """Pages of one sequence of so many tokens."""
        return -(-tokens // self.page) if self.page else 0

    def bytes(self, tokens: int, sequences: int = 1) -> int:
        """What ``sequences`` sequences of ``tokens`` tokens need. Raises InputError for more tokens than a sequence has.

        Contiguous caches and rings take the same for any number of tokens; pages are counted as if none were shared.
        """
        for name, value in (("tokens", tokens), ("sequences", sequences)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(name, "an integer >= 1", repr(value))
        if tokens > self.capacity:
            raise InputError("tokens", f"at most {self.capacity}, the positions of the KV states", str(tokens),
                             "compile with a larger capacity")
        return self.total(sequences * self.pages(tokens), sequences)

    @property
    def full(self) -> int:
        """Bytes of one sequence at full length; 0 without states."""
        return self.total(self.pages(self.capacity), 1)

    def total(self, pages: int, sequences: int) -> int:
        """Bytes of so many pages for sequences, and of what each of ``sequences`` has of its own."""
        return sequences * self.sequence_bytes + (pages + SPARE) * self.page_bytes

    def pool(self, sequences: int, pages: int | None, memory: int | None) -> int:
        """How many pages a session gets: ``pages``, or what fits into ``memory`` bytes, or enough for all to be full.

        Raises InputError.
        """
        if pages is not None and memory is not None:
            raise InputError("memory", "either pages or memory", f"pages={pages} and memory={memory}")
        if memory is not None and memory < (need := self.total(1, sequences)):
            raise InputError("memory", f"at least {need} bytes, what {sequences} sequences need at the least", str(memory),
                             "give more, or fewer sequences (batch)")  # fmt: skip
        if not self.page:
            if pages is not None:
                raise InputError("pages", "none, since the program's KV states have no pages", str(pages),
                                 "compile with kv-layout{kind=paged}")
            return 0
        if memory is not None:
            return (memory - sequences * self.sequence_bytes) // self.page_bytes - SPARE
        return sequences * self.pages(self.capacity) if pages is None else pages
