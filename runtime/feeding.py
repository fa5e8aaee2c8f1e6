"""Feeding tokens of sequences to the entries ``prefill(ids[B,S], start[B], last[B])`` and ``decode(ids[B,1], start[B])``.

Where KV states are pages, entries also take ``table[B,T]``, the pages of each sequence; where they are kept tokens,
``count[B]``, how many of a row's tokens are of the text: rows that go along have none. A row that has fewer tokens than
the call writes K and V for the padding that nothing sees: behind the sequence's end, where its next tokens will lie, or in
the spare page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.runtime.errors import InputError
from tilewright.runtime.manifest import EntrySpec
from tilewright.runtime.places import Place
from tilewright.runtime.session import Call, Session

Array = np.ndarray[Any, Any]
_TABLE_STEP = 8
"""Tables grow by so many pages, so that a call lasts for some tokens."""


@dataclass(frozen=True)
class Range:
    """The sizes that one axis of an entry's input may have."""

    min: int
    max: int

    def fit(self, count: int) -> int:
        return max(self.min, min(count, self.max))

    @staticmethod
    def of(entry: EntrySpec, name: str, axis: int) -> Range:
        extent = next(tensor for tensor in entry.inputs if tensor.name == name).shape[axis]
        if isinstance(extent, int):
            return Range(extent, extent)
        dim = next(dim for dim in entry.dims if dim.name == extent)
        return Range(dim.min, dim.max)


class Feeder:
    """Runs the entries of a session for places. ``chunk``: the most tokens a call takes."""

    def __init__(self, session: Session, chunk: int) -> None:
        check_integer("chunk", chunk)
        self.session, self.sizes = session, session.sizes
        more = [("table",)] if self.sizes.page else [(), ("count",)]
        self.entries = {
            "prefill": _entry(session, "prefill", [("ids", "start", "last", *names) for names in more]),
            "decode": _entry(session, "decode", [("ids", "start", *names) for names in more]),
        }
        self.counts = any(tensor.name == "count" for tensor in self.entries["decode"].inputs)
        """Whether entries take how many tokens of each row are of the text."""
        self.row_ranges = {name: Range.of(entry, "ids", 0) for name, entry in self.entries.items()}
        self.chunk_range = Range.of(self.entries["prefill"], "ids", 1)
        self.chunk = self.chunk_range.fit(min(chunk, self.sizes.chunk or chunk))
        self.by_row = self.sizes.sequence_bytes > 0
        """Whether states have memory for each row, so that rows of a call are neighbours there."""
        self._calls: dict[str, tuple[tuple[int, ...], Call]] = {}
        self._check_chunks()

    def _check_chunks(self) -> None:
        least = self.chunk_range.min
        if least > self.sizes.capacity:
            raise InputError("prefill", f"a chunk within the {self.sizes.capacity} positions of the KV states",
                             f"chunks of at least {least}", "compile with a larger capacity")
        if least > 1 and (self.sizes.page or self.sizes.unpadded or self.counts):
            raise InputError("prefill", "chunks from one token on, for KV states of this layout",
                             f"chunks of at least {least}", "compile with a range of the dim that begins at 1")
        if self.sizes.chunk and least > self.sizes.chunk:
            raise InputError("prefill", f"chunks of at most {self.sizes.chunk}, what KV states take at once",
                             f"chunks of at least {least}", "compile with a larger chunk in kv-layout")

    def check_count(self, count: int) -> None:
        """Raises InputError when so many sequences do not fit one call and the session."""
        needed = max(span.fit(count) for span in self.row_ranges.values())
        compiled = min(span.max for span in self.row_ranges.values())
        if count > compiled:
            raise InputError("prompts", f"at most {compiled}, what the program was compiled for", f"{count}",
                             "give fewer at a time, or compile with a larger batch")
        if needed > self.session.batch:
            got = f"{count}" if count == needed else f"{count}, and the program runs {needed} rows at a time"
            raise InputError("prompts", f"at most {self.session.batch}, the session's batch", got,
                             f"make the session with batch={needed}, or give fewer at a time")

    def check_prompt(self, prompt: Array, max_new_tokens: int, name: str) -> None:
        """Raises InputError for wrong tokens, and when the sequence could outgrow the KV states.

        The last new token is never stored.
        """
        _check_tokens(self.entries["prefill"], prompt, name)
        need = prompt.size + max_new_tokens - 1
        got = f"{prompt.size} prompt tokens + {max_new_tokens} new ones, which takes {need}"
        if need > self.sizes.capacity:
            room = f"prompt and new tokens within the {self.sizes.capacity} positions of the KV states"
            raise InputError(name, room, got, "shorten the prompt, lower max_new_tokens, or compile with a larger capacity")
        pool = self.session.pages
        if pool is not None and pool.pages_for(need) > pool.count:
            raise InputError(name, f"prompt and new tokens within {pool.count} pages of {pool.tokens} tokens", got,
                             f"make the session with pages={pool.pages_for(need)} or more, or lower max_new_tokens")

    def fits(self, place: Place, count: int) -> bool:
        """Whether a call of ``count`` tokens stays within the sequence's positions."""
        return place.fed + count <= self.sizes.capacity

    def run(self, entry: str, places: Sequence[Place], takes: Sequence[int], among: Sequence[Place | None]) -> list[Array]:
        """Feeds the next ``takes[i]`` tokens of each place; the logits [V] after them, which last until the next run.

        ``among``: the places of all rows.
        """
        count = self.chunk_range.fit(max(takes)) if entry == "prefill" else 1
        first, rows = self._span(entry, places, among)
        call = self._call(entry, rows, count)
        call.first = first
        for name in call.inputs:
            call.inputs[name].fill(0)
        for row, place in enumerate(rows):
            if place is not None:
                self._fill(call, row, place, count)
        found = {place: row for row, place in enumerate(rows)}
        at = [found[place] for place in places]
        if entry == "prefill":
            for row, place, take in zip(at, places, takes):
                call.inputs["last"][row] = place.fed + take - 1 - call.inputs["start"][row]
        if self.counts:
            call.inputs["count"][list(at)] = takes
        logits = call()["logits"]
        return [logits[row] for row in at]

    def _span(self, entry: str, places: Sequence[Place], among: Sequence[Place | None]) -> tuple[int, list[Place | None]]:
        """The first row of a call and what is in its rows: others go along where states belong to rows.

        Elsewhere those whose first pages are the same are neighbours: kernels read such pages once.
        """
        span = self.row_ranges[entry]
        if not self.by_row:
            order = sorted(places, key=lambda place: place.pages.pages.tobytes() if place.pages is not None else b"")
            return 0, [*order, *[None] * (span.fit(len(places)) - len(places))]
        low, high = min(place.row for place in places), max(place.row for place in places)
        size = span.fit(high - low + 1)
        first = min(low, self.session.batch - size)
        return first, list(among[first:first + size])

    def _begin(self, place: Place, count: int) -> int:
        """The first token of a call. Where the rest of the capacity is less than a call, it begins earlier: tokens computed
        twice give the same K and V."""
        return min(place.fed, self.sizes.capacity - count)

    def _fill(self, call: Call, row: int, place: Place, count: int) -> None:
        begin = self._begin(place, count)
        piece = place.piece(begin, count)
        call.inputs["ids"][row, :piece.size] = piece
        call.inputs["start"][row] = begin
        if place.pages is not None:
            call.inputs["table"][row, :len(place.pages.pages)] = place.pages.pages

    def _call(self, entry: str, rows: Sequence[Place | None], count: int) -> Call:
        """A call of these sizes, kept for the next run."""
        size, width = len(rows), self._width(entry, rows, count)
        known = self._calls.get(entry)
        if known is None or known[0] != (size, count, width):
            given = {"ids": np.zeros((size, count), np.int64), "start": np.zeros(size, np.int64)}
            given |= {"last": np.zeros(size, np.int64)} if entry == "prefill" else {}
            given |= {"table": np.zeros((size, width), np.int32)} if width else {}
            given |= {"count": np.zeros(size, np.int64)} if self.counts else {}
            known = self._calls[entry] = (size, count, width), self.session.bind(entry, **given)
        return known[1]

    def _width(self, entry: str, rows: Sequence[Place | None], count: int) -> int:
        """Pages of a table's row: as many as the tokens of the call may lie in, padding included."""
        if not self.sizes.page:
            return 0
        need = max(max(self.sizes.pages(place.fed + count), len(place.pages.pages))
                   for place in rows if place is not None and place.pages is not None)  # fmt: skip
        return Range.of(self.entries[entry], "table", 1).fit(-(-need // _TABLE_STEP) * _TABLE_STEP)


def check_integer(name: str, value: Any) -> None:
    """Raises InputError for anything but a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(name, "an integer >= 1", repr(value))


def _entry(session: Session, name: str, inputs: Sequence[tuple[str, ...]]) -> EntrySpec:
    """An entry of the generation convention. Raises InputError when the program was not compiled for generation."""
    entry = session.program.manifest.entries.get(name)
    remedy = "compile the model with a kv-layout pass to generate text"
    if entry is None:
        raise InputError("session", f"a program with the entry {name!r}", f"{session.program.entries}", remedy)
    found = tuple(tensor.name for tensor in entry.inputs)
    if set(found) not in map(set, inputs) or "logits" not in [tensor.name for tensor in entry.outputs]:
        raise InputError("session", f"{name}{inputs[0]} -> logits", f"{name}{found}", remedy)
    return entry


def _check_tokens(entry: EntrySpec, prompt: Array, name: str) -> None:
    ids = next(tensor for tensor in entry.inputs if tensor.name == "ids")
    low, high = max(0, ids.low or 0), ids.high
    if prompt.min() < low or (high is not None and prompt.max() > high):
        limit = f"token ids from {low}" + ("" if high is None else f" to {high}")
        raise InputError(name, limit, f"{prompt.min()} to {prompt.max()}", "use the tokenizer that came with the model")
