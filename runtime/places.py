"""Where the sequences of a session lie in its KV states: rows, and pages of the pool."""

from __future__ import annotations

import heapq
from array import array
from typing import Any

import numpy as np

from tilewright.runtime.errors import OutOfPages
from tilewright.runtime.pages import PageList
from tilewright.runtime.session import Session

Array = np.ndarray[Any, Any]


class Place:
    """A sequence's tokens and where they lie: in ``row`` of what the states have for each sequence, and in ``pages``.

    The first ``fed`` tokens are in the KV states.
    """

    def __init__(self, tokens: array[int], row: int, pages: PageList | None = None, fed: int = 0) -> None:
        self.tokens, self.row, self.pages, self.fed = tokens, row, pages, fed

    def piece(self, begin: int, count: int) -> Array:
        """Up to ``count`` tokens from ``begin`` on (i64)."""
        return np.frombuffer(self.tokens, np.int64)[begin:begin + count]


class Places:
    """The places of a session, each in a row of its own.

    ``share``: whether prompts that begin alike share pages, if all that states keep is in pages.
    """

    def __init__(self, session: Session, share: bool) -> None:
        self.session, self.pool = session, session.pages
        self.share = share and self.pool is not None and not session.sizes.sequence_bytes
        self.rows: list[Place | None] = [None] * session.batch
        self._free = list(range(session.batch))

    @property
    def free_rows(self) -> int:
        return len(self._free)

    def take_row(self) -> int:
        """A row for a place to come, the lowest."""
        return heapq.heappop(self._free)

    def give_row(self, row: int) -> None:
        self.rows[row] = None
        heapq.heappush(self._free, row)

    def open(self, prompt: Array, row: int) -> Place:
        """A place with room for a prompt (i64 [S]), of which the beginning may be there already.

        Raises OutOfPages; then nothing has changed.
        """
        place = Place(array("q", prompt.tobytes()), row)
        if self.pool is not None:
            place.pages = PageList(self.pool)
            found = place.pages.reuse(prompt) if self.share else 0
            place.fed = found
            try:
                self.make_room(place, prompt.size - found)
            except OutOfPages:
                place.pages.free()
                raise
            self.pool.reused += found
        self.rows[row] = place
        return place

    def found(self, prompt: Array) -> int:
        """How many tokens of a prompt are in pages that it would share."""
        return 0 if self.pool is None or not self.share else len(self.pool.find(prompt[:-1])) * self.pool.tokens

    def fork(self, place: Place, row: int) -> Place:
        """A second place with the same tokens, in the same pages; what the states have for each sequence is copied."""
        pages = place.pages.fork() if place.pages is not None else None
        if self.session.sizes.sequence_bytes:
            self.session.copy(place.row, row, paged=False)
        twin = self.rows[row] = Place(place.tokens[:], row, pages, place.fed)
        return twin

    def make_room(self, place: Place, count: int) -> None:
        """Pages for ``count`` further tokens. Raises OutOfPages; then nothing has changed."""
        if place.pages is not None:
            place.pages.reserve(count, lambda page, to: self.session.copy(page, to, paged=True))

    def advance(self, place: Place, count: int, prompt: Array | None = None) -> None:
        """``count`` further tokens are in the KV states; pages that are full of the ``prompt`` can be found from now on."""
        before, place.fed = place.fed, place.fed + count
        if place.pages is None:
            return
        place.pages.advance(count)
        if self.share and prompt is not None:
            place.pages.remember(prompt, before)

    def close(self, place: Place) -> None:
        """Gives back the row and the pages."""
        if place.pages is not None:
            place.pages.free()
        self.give_row(place.row)
