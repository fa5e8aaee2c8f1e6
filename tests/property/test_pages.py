"""Pages under random joins, appends, forks and leaves: a model keeps each sequence's tokens as a plain list, and a
memory of pages holds what was written where: as keys and values do, it depends on the token and on all before it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from tilewright.runtime.errors import OutOfPages
from tilewright.runtime.pages import PageList, PagePool

FIRST = 1
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)  # few tokens: prompts often begin alike
Array = np.ndarray[Any, Any]


def ids(tokens: list[int]) -> Array:
    return np.array(tokens, np.int64)


def prefixes(tokens: list[int]) -> list[tuple[int, ...]]:
    return [tuple(tokens[:end]) for end in range(1, len(tokens) + 1)]


class Sequence:
    """Tokens as a plain list beside the pages that should hold them."""

    def __init__(self, pages: PageList, tokens: list[int], prompt: list[int]) -> None:
        self.pages, self.tokens, self.prompt = pages, tokens, prompt


class Pages(RuleBasedStateMachine):
    sequences = Bundle("sequences")

    @initialize(count=st.integers(2, 8), size=st.integers(1, 4), keep=st.booleans())
    def start(self, count: int, size: int, keep: bool) -> None:
        self.size = size
        self.memory: dict[int, list[tuple[int, ...]]] = {page: [()] * size for page in range(FIRST, FIRST + count)}
        self.pool = PagePool(count, size, FIRST, keep)
        self.live: list[Sequence] = []

    def copy(self, page: int, to: int) -> None:
        assert self.pool.holders(to) == 1
        self.memory[to] = list(self.memory[page])

    def needed(self, sequence: Sequence, count: int) -> int:
        """By counting: new pages, and one for a last page that others hold too."""
        have, size = len(sequence.tokens), self.size
        partial = have % size > 0
        shared = partial and sum(sequence.pages.pages[have // size] in s.pages.pages for s in self.live) > 1
        return -(-(have + count) // size) - -(-have // size) + shared

    def write(self, sequence: Sequence, tokens: list[int]) -> bool:
        """Whether there was room."""
        before = list(sequence.pages.pages)
        if self.needed(sequence, len(tokens)) > self.pool.available:
            with pytest.raises(OutOfPages, match=r"needs \d+ more pages of \d tokens"):
                sequence.pages.reserve(len(tokens), self.copy)
            assert list(sequence.pages.pages) == before
            return False
        assert sequence.pages.reserve(len(tokens), self.copy) == (list(sequence.pages.pages) != before)
        begin = len(sequence.tokens)
        sequence.tokens += tokens
        for at in range(begin, len(sequence.tokens)):
            page = sequence.pages.pages[at // self.size]
            assert self.pool.holders(page) == 1, "a write to a page that two sequences hold"
            self.memory[page][at % self.size] = tuple(sequence.tokens[:at + 1])
        sequence.pages.advance(len(tokens))
        sequence.pages.remember(ids(sequence.prompt), begin)
        return True

    @rule(target=sequences, prompt=TOKENS)
    def join(self, prompt: list[int]) -> Any:
        pages = PageList(self.pool)
        found = pages.reuse(ids(prompt))
        assert found % self.size == 0
        assert found < len(prompt)
        sequence = Sequence(pages, prompt[:found], prompt)
        self.live.append(sequence)
        if self.write(sequence, prompt[found:]):
            return sequence
        self.end(sequence)
        return multiple()

    @rule(sequence=sequences, tokens=TOKENS)
    def append(self, sequence: Sequence, tokens: list[int]) -> None:
        if sequence in self.live:
            self.write(sequence, tokens)

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence: Sequence) -> Any:
        if sequence not in self.live:
            return multiple()
        twin = Sequence(sequence.pages.fork(), list(sequence.tokens), sequence.prompt)
        self.live.append(twin)
        return twin

    @rule(sequence=sequences)
    def leave(self, sequence: Sequence) -> None:
        if sequence in self.live:
            self.end(sequence)

    def end(self, sequence: Sequence) -> None:
        sequence.pages.free()
        self.live.remove(sequence)

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        assert self.pool.kept == 0

    def read(self, pages: Iterable[int]) -> list[tuple[int, ...]]:
        return [token for page in pages for token in self.memory[page]]

    @invariant()
    def every_sequence_reads_its_tokens(self) -> None:
        for sequence in self.live:
            assert self.read(sequence.pages.pages)[:len(sequence.tokens)] == prefixes(sequence.tokens)
            assert sequence.pages.length == len(sequence.tokens)
            assert len(sequence.pages.pages) == -(-len(sequence.tokens) // self.size)

    @invariant()
    def every_page_is_counted(self) -> None:
        for page in self.memory:
            assert self.pool.holders(page) == sum(list(s.pages.pages).count(page) for s in self.live)
        held = {page for sequence in self.live for page in sequence.pages.pages}
        assert self.pool.available == len(self.memory) - len(held)
        assert self.pool.kept <= (self.pool.available if self.pool.keep else 0)

    @invariant()
    def what_is_found_holds_the_prompt(self) -> None:
        for sequence in self.live:
            read = self.read(self.pool.find(ids(sequence.prompt)))
            assert read == prefixes(sequence.prompt)[:len(read)]

    def teardown(self) -> None:
        for sequence in getattr(self, "live", [])[::-1]:
            sequence.pages.free()
        if hasattr(self, "pool"):
            self.pool.clear()
            assert self.pool.available == len({self.pool.take() for _ in self.memory}) == len(self.memory)


Pages.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestPages = Pages.TestCase
