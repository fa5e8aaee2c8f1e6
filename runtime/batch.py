"""Sequences that join and leave a session at any step: the ground for continuous batching.

A prompt waits until there are rows and pages for it, is fed in chunks, and then is one sequence or several, which share its
pages. Each step gives one token to every sequence; each ends on its own, also by an error.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence as Items
from typing import Any

import numpy as np

from tilewright.runtime.errors import InputError, OutOfPages, ProgramError, SessionError
from tilewright.runtime.feeding import Feeder
from tilewright.runtime.places import Place, Places
from tilewright.runtime.sampling import generators
from tilewright.runtime.sequences import Options, Prompt, Sequence, Token, read_prompt
from tilewright.runtime.session import Session

Array = np.ndarray[Any, Any]

CHUNK = 512
"""Prompt tokens a call: enough rows for the matrix products to run at full speed, few enough for a small arena."""


class Batch:
    """The sequences of a session at a time; use it in ``with``, or close it. No other generation runs meanwhile.

    ``chunk``: prompt tokens in one call. ``share``: prompts that begin with the same tokens share pages, if states have
    pages: ``session.pages.reused`` counts their tokens. Methods may be called from several threads; one waits for another's
    step to end.
    """

    def __init__(self, session: Session, chunk: int = CHUNK, share: bool = True) -> None:
        self.session = session
        self._feeder = Feeder(session, chunk)
        self._places = Places(session, share)
        self._waiting: list[Prompt] = []
        self._prompts: list[Prompt] = []  # those that have a place
        self._running: dict[int, Sequence] = {}
        self._next = 0
        self._closed = False
        self._lock = threading.RLock()
        self._leased = contextlib.ExitStack()
        self._leased.enter_context(session.lease())

    @property
    def running(self) -> dict[int, Sequence]:
        """By id, the sequences that have tokens and go on."""
        return dict(self._running)

    @property
    def pending(self) -> bool:
        """Whether there are prompts that are not fed to their ends."""
        return bool(self._waiting or self._prompts)

    def add(self, prompt: Items[int] | Array, max_new_tokens: int, *, seed: int = 0, **options: Any) -> int:
        """A sequence that begins with ``prompt``; its id. ``seed`` and ``options`` as ``generate`` takes them.

        It waits while there is no row, or no room for the prompt. Raises InputError, also for what would never fit.
        """
        row = read_prompt(prompt, "prompt")
        chosen = Options.of(max_new_tokens, **options)
        self._feeder.check_prompt(row, max_new_tokens, "prompt")
        [identity] = self.add_samples(row, chosen, generators([row], seed))
        return identity

    def add_samples(self, prompt: Array, options: Options, random: Items[np.random.Generator]) -> list[int]:
        """A sequence for each generator, all beginning with ``prompt`` (i64 [S], checked), which is fed once."""
        with self._lock:
            self._check_open()
            sampler = self.session.sampler(options.sampling)
            members = [Sequence(self._next + i, options, sampler, one) for i, one in enumerate(random)]
            self._next += len(members)
            self._waiting.append(Prompt(prompt, members))
            return [member.id for member in members]

    def fork(self, identity: int, seed: int = 0) -> int:
        """A second sequence that goes on from where a running one is, with draws of its own; its id.

        Raises InputError when there is no such sequence, or no row for one more.
        """
        with self._lock:
            self._check_open()
            parent = self._find(identity)
            if not self._places.free_rows:
                raise InputError("fork", f"at most {self.session.batch} sequences, the session's batch", "one more",
                                 "make the session with a larger batch, or end a sequence first")
            [random] = generators([parent.place.piece(0, len(parent.place.tokens))], seed)
            place = self._places.fork(parent.place, self._places.take_row())
            twin = Sequence(self._next, parent.options, parent.sampler, random, list(parent.made))
            twin.place = place
            self._next += 1
            self._running[twin.id] = twin
            return twin.id

    def remove(self, identity: int) -> None:
        """Ends a sequence, wherever it is. Raises InputError when there is none with this id."""
        with self._lock:
            prompt = next((p for p in (*self._waiting, *self._prompts) if p.is_for(identity)), None)
            if prompt is None:
                self._leave(self._find(identity))
            else:
                self._remove_member(prompt, identity)

    def step(self) -> dict[int, Token]:
        """One token for each running sequence, then a chunk of a prompt; what came of it, by id.

        A sequence gets its first token from the step that feeds the end of its prompt.
        """
        with self._lock:
            return {**self.decode(), **self.prefill()}

    def prefill(self) -> dict[int, Token]:
        """Feeds a chunk of the prompt that came first, and of others with about as many tokens left; by id, the first
        tokens of sequences whose prompts ended with it."""
        with self._lock:
            self._check_open()
            events = self._admit()
            group = self._group()
            if not group:
                return events
            takes = [min(prompt.rest, self._feeder.chunk) for prompt in group]
            logits = self._run("prefill", [prompt.place for prompt in group], takes)
            for prompt, take, row in zip(group, takes, logits):
                self._places.advance(prompt.place, take, prompt.tokens)
                if not prompt.rest:
                    events |= self._begin(prompt, row)
            return events

    def decode(self) -> dict[int, Token]:
        """Feeds the newest token of each running sequence; by id, the next ones. One that finds no page fails alone."""
        with self._lock:
            self._check_open()
            events: dict[int, Token] = {}
            for sequence in list(self._running.values()):
                try:
                    self._places.make_room(sequence.place, 1)
                except OutOfPages as error:
                    events[sequence.id] = self._fail(sequence, error)
            going = list(self._running.values())
            if not going:
                return events
            logits = self._run("decode", [sequence.place for sequence in going], [1] * len(going))
            for sequence, row in zip(going, logits):
                self._places.advance(sequence.place, 1)
                events[sequence.id] = self._choose(sequence, row)
            return events

    def close(self) -> None:
        """Ends all sequences and lets others use the session; safe to repeat."""
        with self._lock:
            for prompt in (*self._waiting, *self._prompts):
                for member in list(prompt.members):
                    self._remove_member(prompt, member.id)
            for sequence in list(self._running.values()):
                self._leave(sequence)
            self._leased.close()
            self._closed = True

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- prompts ------------------------------------------------------------------------------------------------------

    def _admit(self) -> dict[int, Token]:
        """Gives places to prompts that wait, the first first; one that others must end for keeps those behind waiting."""
        events: dict[int, Token] = {}
        for prompt in list(self._waiting):
            if len(prompt.members) > self._places.free_rows:
                break
            if self._computed_soon(prompt):
                continue
            try:
                self._enter(prompt)
            except OutOfPages as error:
                if self._prompts or self._running:
                    break
                events |= {member.id: Token(None, "failed", error) for member in prompt.members}
            self._waiting.remove(prompt)
        return events

    def _computed_soon(self, prompt: Prompt) -> bool:
        """Whether the next page that the prompt could share is being written for another prompt."""
        page = self.session.sizes.page
        if not self._places.share or not self._prompts:
            return False
        end = self._places.found(prompt.tokens) + page
        return end < prompt.tokens.size and any(
            other.place.fed < end and np.array_equal(other.tokens[:end], prompt.tokens[:end]) for other in self._prompts
        )

    def _enter(self, prompt: Prompt) -> None:
        """Raises OutOfPages; then nothing has changed."""
        rows = [self._places.take_row() for _ in prompt.members]
        try:
            prompt.place = self._places.open(prompt.tokens, rows[0])
        except OutOfPages:
            for row in rows:
                self._places.give_row(row)
            raise
        prompt.rows = rows
        self._prompts.append(prompt)

    def _group(self) -> list[Prompt]:
        """The prompt that came first, and those that can go along in one call."""
        if not self._prompts:
            return []
        lead, chunk = self._prompts[0], self._feeder.chunk
        count = min(lead.rest, chunk)
        least = count if self.session.sizes.unpadded else count / 2
        fits = {prompt.rows[0]: prompt for prompt in self._prompts
                if least <= min(prompt.rest, chunk) <= count and self._feeder.fits(prompt.place, count)}
        fits[lead.rows[0]] = lead
        most = self._feeder.row_ranges["prefill"].max
        if not self._feeder.by_row:
            return [lead, *(prompt for prompt in fits.values() if prompt is not lead)][:most]
        rows = [lead.rows[0]]
        while rows[-1] + 1 in fits and len(rows) < most:
            rows.append(rows[-1] + 1)
        while rows[0] - 1 in fits and len(rows) < most:
            rows.insert(0, rows[0] - 1)
        return [fits[row] for row in rows]

    def _begin(self, prompt: Prompt, logits: Array) -> dict[int, Token]:
        """The prompt becomes its sequences, each with a first token."""
        self._prompts.remove(prompt)
        twins = [self._places.fork(prompt.place, row) for row in prompt.rows[1:]]
        for member, place in zip(prompt.members, [prompt.place, *twins]):
            member.place = place
            self._running[member.id] = member
        return {member.id: self._choose(member, logits) for member in prompt.members}

    def _remove_member(self, prompt: Prompt, identity: int) -> None:
        prompt.members = [member for member in prompt.members if member.id != identity]
        if prompt.members and prompt.rows:
            self._places.give_row(prompt.rows.pop())
        elif prompt.rows:
            self._places.close(prompt.place)
            self._prompts.remove(prompt)
        elif not prompt.members:
            self._waiting.remove(prompt)

    # --- sequences ----------------------------------------------------------------------------------------------------

    def _run(self, entry: str, places: Items[Place], takes: Items[int]) -> list[Array]:
        return self._feeder.run(entry, places, takes, self._places.rows)

    def _choose(self, sequence: Sequence, logits: Array) -> Token:
        try:
            token = sequence.sampler.choose(logits, sequence.random)
        except ProgramError as error:
            return self._fail(sequence, error)
        sequence.made.append(token)
        sequence.place.tokens.append(token)
        ended = sequence.options.end(sequence.made)
        if ended:
            self._leave(sequence)
        return Token(token, ended)

    def _fail(self, sequence: Sequence, error: Exception) -> Token:
        self._leave(sequence)
        return Token(None, "failed", error)

    def _leave(self, sequence: Sequence) -> None:
        del self._running[sequence.id]
        self._places.close(sequence.place)

    def _find(self, identity: int) -> Sequence:
        if identity not in self._running:
            raise InputError("id", f"one of the sequences {sorted(self._running)}", repr(identity))
        return self._running[identity]

    def _check_open(self) -> None:
        if self._closed:
            raise SessionError("the batch is closed; make another one from its session")
