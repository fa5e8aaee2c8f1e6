"""Pages of KV caches: who holds which, and which hold a prompt that another sequence begins with too.

A page has room for the same number of tokens in every layer, so one list of pages serves all caches of a program. Several
sequences may hold a page; only a page that one sequence holds is written to (Kwon et al., PagedAttention,
arXiv:2309.06180). Nothing here touches the memory of a page.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright.runtime.errors import OutOfPages

Array = np.ndarray[Any, Any]
_Key = tuple[int, bytes]
"""The number of the run of tokens that ends before a page (0: none), and the page's own tokens."""
_NOTHING = 0


class PagePool:
    """``count`` pages of ``tokens`` tokens each, numbered from ``first``.

    A page that holds a page's worth of a prompt is found again by these tokens and all before them; with ``keep`` also
    after the last sequence left it, until no other page is free: then the one that was left longest ago goes.
    """

    def __init__(self, count: int, tokens: int, first: int = 0, keep: bool = True) -> None:
        self.count, self.tokens, self.end, self.keep = count, tokens, first + count, keep
        self.reused = 0
        """Tokens that sequences found and did not have to compute."""
        self._free = list(range(first + count - 1, first - 1, -1))
        self._holders: dict[int, int] = {}
        self._left: dict[int, None] = {}  # pages that nobody holds and that can be found, the longest left first
        self._found: dict[_Key, int] = {}
        self._keys: dict[int, _Key] = {}
        self._runs: dict[int, int] = {}  # the number of the run that ends with a page; never used twice
        self._numbers = itertools.count(_NOTHING + 1)

    @property
    def available(self) -> int:
        """Pages that nobody holds."""
        return len(self._free) + len(self._left)

    @property
    def kept(self) -> int:
        """Of these, the pages that hold a part of a prompt."""
        return len(self._left)

    def holders(self, page: int) -> int:
        """How many sequences hold a page."""
        return self._holders.get(page, 0)

    def pages_for(self, tokens: int) -> int:
        """How many pages hold so many tokens of one sequence."""
        return -(-tokens // self.tokens)

    def check(self, count: int, what: str = "a sequence") -> None:
        """Raises OutOfPages when fewer than ``count`` pages are available."""
        if count > self.available:
            raise OutOfPages(f"{what} needs {count} more pages of {self.tokens} tokens, and of {self.count} "
                             f"{self.available} are free; end other sequences first, or make the session with more pages")

    def take(self) -> int:
        """A page that nobody holds, which the caller holds from now on. Raises OutOfPages."""
        self.check(1)
        page = self._free.pop() if self._free else self._evict()
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more sequence holds the page."""
        self._left.pop(page, None)
        self._holders[page] = self.holders(page) + 1

    def release(self, page: int) -> None:
        """One sequence fewer holds the page."""
        if self._holders[page] > 1:
            self._holders[page] -= 1
            return
        del self._holders[page]
        if self.keep and page in self._keys:
            self._left[page] = None
            return
        self._forget(page)
        self._free.append(page)

    def clear(self) -> None:
        """Frees what is kept of prompts that no sequence holds."""
        while self._left:
            self._free.append(self._evict())

    def find(self, prompt: Array) -> list[int]:
        """The pages that hold the beginning of a prompt (i64 [S]), one after the other."""
        pages: list[int] = []
        run = _NOTHING
        for begin in range(0, prompt.size - self.tokens + 1, self.tokens):
            page = self._found.get((run, prompt[begin:begin + self.tokens].tobytes()))
            if page is None:
                break
            pages.append(page)
            run = self._runs[page]
        return pages

    def remember(self, page: int, before: int | None, tokens: Array) -> None:
        """Lets ``find`` find a full page that holds ``tokens`` (i64) after those of the page ``before``.

        It does not when another page already is found by the same tokens, or the page before is not found.
        """
        run = _NOTHING if before is None else self._runs.get(before)
        if run is None or (run, tokens.tobytes()) in self._found or page in self._keys:
            return
        key = (run, tokens.tobytes())
        self._found[key], self._keys[page], self._runs[page] = page, key, next(self._numbers)

    def _evict(self) -> int:
        page = next(iter(self._left))
        del self._left[page]
        self._forget(page)
        return page

    def _forget(self, page: int) -> None:
        key = self._keys.pop(page, None)
        if key is not None:
            del self._found[key], self._runs[page]


class PageList:
    """The pages of one sequence in the order of its tokens, and the count of tokens in them.

    ``reserve`` makes room, then the tokens are written, then ``advance`` counts them.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.pages = array("i")
        self.length = 0

    def reuse(self, prompt: Array) -> int:
        """Takes the pages that hold the beginning of a prompt, all but its last token: the tokens found."""
        found = self.pool.find(prompt[:-1])
        for page in found:
            self.pool.hold(page)
        self.pages.extend(found)
        self.length = len(found) * self.pool.tokens
        return self.length

    def needed(self, count: int) -> int:
        """The pages that ``count`` further tokens need."""
        return self.pool.pages_for(self.length + count) - len(self.pages) + self._last_is_shared

    def reserve(self, count: int, copy: Callable[[int, int], None]) -> bool:
        """Room for ``count`` further tokens in pages that this sequence alone holds. Whether ``pages`` changed.

        ``copy(page, to)`` copies what the memory of a page holds. Raises OutOfPages; then nothing has changed.
        """
        needed = self.needed(count)
        if not needed:
            return False
        self.pool.check(needed)
        if self._last_is_shared:
            self._own_last(copy)
        while len(self.pages) * self.pool.tokens < self.length + count:
            self.pages.append(self.pool.take())
        return True

    def advance(self, count: int) -> None:
        """``count`` tokens were written."""
        self.length += count

    def remember(self, prompt: Array, before: int) -> None:
        """Lets others find the full pages of the prompt that have been written since there were ``before`` tokens."""
        size = self.pool.tokens
        for index in range(before // size, min(self.length, prompt.size) // size):
            previous = self.pages[index - 1] if index else None
            self.pool.remember(self.pages[index], previous, prompt[index * size:(index + 1) * size])

    def fork(self) -> PageList:
        """A second sequence with the same tokens, in the same pages."""
        twin = PageList(self.pool)
        twin.length = self.length
        twin.pages = array("i", self.pages[:self.pool.pages_for(self.length)])
        for page in twin.pages:
            self.pool.hold(page)
        return twin

    def free(self) -> None:
        """Leaves all pages, the last first: a kept page is of use only with those before it."""
        while self.pages:
            self.pool.release(self.pages.pop())
        self.length = 0

    @property
    def _last_is_shared(self) -> bool:
        used = self.length % self.pool.tokens
        return used > 0 and self.pool.holders(self.pages[self.length // self.pool.tokens]) > 1

    def _own_last(self, copy: Callable[[int, int], None]) -> None:
        """Copy on write of the page that is not full."""
        index = self.length // self.pool.tokens
        shared, own = self.pages[index], self.pool.take()
        copy(shared, own)
        self.pages[index] = own
        self.pool.release(shared)
