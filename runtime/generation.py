"""Text generation over the entries ``prefill(ids[B,S], start[B], last[B])`` and ``decode(ids[B,1], start[B])``.

Prompts are padded on the right and fed in chunks. A row past its prompt's end writes K and V that nothing sees: the
positions are written again, by decode, before any query reaches them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.runtime.errors import InputError
from tilewright.runtime.manifest import EntrySpec
from tilewright.runtime.sampling import Sampler, Sampling, generators
from tilewright.runtime.session import Call, Session

Array = np.ndarray[Any, Any]
Prompts = Sequence[Sequence[int]] | Array
Step = tuple[int, list[int | None]]
"""A step's number, from 0, and the new token of each prompt; None for those that have ended."""

CHUNK = 512
"""Prompt tokens a call: enough rows for the matrix products to run at full speed, few enough for a small arena."""


def generate(
    session: Session, prompts: Prompts, max_new_tokens: int, temperature: float = 0.0, top_k: int = 0,
    top_p: float = 1.0, seed: int | Sequence[int] = 0, stop_tokens: Sequence[int] = (),
    stop_sequences: Sequence[Sequence[int]] = (), chunk: int = CHUNK,
    callback: Callable[[int, list[int | None]], object] | None = None,
) -> list[list[int]]:  # fmt: skip
    """The new tokens of each prompt (lists of token ids, of any lengths; at most the session's batch of them).

    A sequence ends with a token of ``stop_tokens`` or with one of ``stop_sequences``, which it includes, or after
    ``max_new_tokens``. ``seed``: one, or one for each prompt; what else is in the batch does not change a
    sequence's draws. ``chunk``: prompt tokens in one call, which bounds the memory. ``callback(step, tokens)`` gets
    what ``stream`` yields. Raises InputError before anything runs, also when a sequence could exceed the capacity of
    the KV states.
    """
    choice = (temperature, top_k, top_p, seed)
    steps = stream(session, prompts, max_new_tokens, *choice, stop_tokens, stop_sequences, chunk)
    results: list[list[int]] = [[] for _ in prompts]
    with contextlib.closing(steps):  # a callback may raise; the states are given back at once
        for step, tokens in steps:
            for result, token in zip(results, tokens):
                if token is not None:
                    result.append(token)
            if callback is not None:
                callback(step, tokens)
    return results


def stream(
    session: Session, prompts: Prompts, max_new_tokens: int, temperature: float = 0.0, top_k: int = 0,
    top_p: float = 1.0, seed: int | Sequence[int] = 0, stop_tokens: Sequence[int] = (),
    stop_sequences: Sequence[Sequence[int]] = (), chunk: int = CHUNK,
) -> Generator[Step, None, None]:  # fmt: skip
    """As ``generate``, yielding ``(step, tokens)`` as they come. Arguments are checked by the call itself.

    The session's states are its own until it is exhausted or closed.
    """
    sampler = Sampler(session.program.library, Sampling(temperature, top_k, top_p))
    rows = _read_prompts(prompts)
    _check_integer("max_new_tokens", max_new_tokens)
    _check_integer("chunk", chunk)
    batch = _Batch(session, rows, chunk)
    batch.check_room(max_new_tokens)
    stops = [tuple(int(token) for token in ending) for ending in (*((t,) for t in stop_tokens), *stop_sequences)]
    if () in stops:
        raise InputError("stop_sequences", "sequences of at least one token", "an empty one")
    return _steps(batch, max_new_tokens, sampler, generators(rows, seed), stops)


def _steps(
    batch: _Batch, max_new_tokens: int, sampler: Sampler, random: list[np.random.Generator],
    stops: list[tuple[int, ...]],
) -> Generator[Step, None, None]:  # fmt: skip
    made: list[list[int]] = [[] for _ in random]
    running = set(range(len(random)))
    with batch.session.lease():
        logits = batch.prefill()
        for step in range(max_new_tokens):
            tokens: list[int | None] = [None] * len(random)
            for prompt in sorted(running):
                token = sampler.choose(logits[prompt], random[prompt])
                tokens[prompt] = token
                made[prompt].append(token)
                if _ended(made[prompt], stops):
                    running.remove(prompt)
            yield step, tokens
            if not running or step + 1 == max_new_tokens:
                return
            logits = batch.decode(made, running)


def _ended(made: list[int], stops: list[tuple[int, ...]]) -> bool:
    return any(len(made) >= len(stop) and tuple(made[-len(stop) :]) == stop for stop in stops)


def _read_prompts(prompts: Prompts) -> list[Array]:
    if len(prompts) == 0:
        raise InputError("prompts", "at least one list of token ids", "none")
    rows = []
    for index, prompt in enumerate(prompts):
        row = np.asarray(prompt)
        if row.ndim != 1 or row.size == 0 or row.dtype.kind not in "iu":
            got = f"{type(prompt).__name__} of shape {list(row.shape)} and dtype {row.dtype}"
            raise InputError(f"prompts[{index}]", "a list of at least one token id", got)
        rows.append(row.astype(np.int64))
    return rows


def _check_integer(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(name, "an integer >= 1", repr(value))


@dataclass(frozen=True)
class _Range:
    """The sizes that one axis of an entry's input may have."""

    min: int
    max: int

    def fit(self, count: int) -> int:
        return max(self.min, min(count, self.max))

    @staticmethod
    def of(entry: EntrySpec, name: str, axis: int) -> _Range:
        extent = next(tensor for tensor in entry.inputs if tensor.name == name).shape[axis]
        if isinstance(extent, int):
            return _Range(extent, extent)
        dim = next(dim for dim in entry.dims if dim.name == extent)
        return _Range(dim.min, dim.max)


class _Batch:
    """The prompts in the rows of the KV states, longest first, so that ended prompts drop off the end of a call."""

    def __init__(self, session: Session, prompts: list[Array], chunk: int) -> None:
        self.session = session
        self.prompts = prompts
        self.rows = sorted(range(len(prompts)), key=lambda index: -prompts[index].size)
        prefill = _entry(session, "prefill", ("ids", "start", "last"))
        decode = _entry(session, "decode", ("ids", "start"))
        self.prefill_rows, self.decode_rows = _Range.of(prefill, "ids", 0), _Range.of(decode, "ids", 0)
        self.chunk_range = _Range.of(prefill, "ids", 1)
        self.chunk = self.chunk_range.fit(chunk)
        self.capacity = min((state.length for state in session.program.manifest.states), default=0)
        for index, prompt in enumerate(prompts):
            _check_tokens(prefill, prompt, index)
        self._check_count()
        self.step: Call | None = None

    def _check_count(self) -> None:
        count = len(self.prompts)
        needed = max(self.prefill_rows.fit(count), self.decode_rows.fit(count))
        compiled = min(self.prefill_rows.max, self.decode_rows.max)
        if count > compiled:
            raise InputError("prompts", f"at most {compiled}, what the program was compiled for", f"{count}",
                             "give fewer at a time, or compile with a larger batch")
        if needed > self.session.batch:
            got = f"{count}" if count == needed else f"{count}, and the program runs {needed} rows at a time"
            raise InputError("prompts", f"at most {self.session.batch}, the session's batch", got,
                             f"make the session with batch={needed}, or give fewer at a time")

    def check_room(self, max_new_tokens: int) -> None:
        """Raises InputError when a sequence could outgrow the KV states. The last new token is never stored."""
        for index, prompt in enumerate(self.prompts):
            need = prompt.size + max_new_tokens - 1
            if need > self.capacity:
                raise InputError(
                    f"prompts[{index}]", f"prompt and new tokens within the {self.capacity} positions of the KV states",
                    f"{prompt.size} prompt tokens + {max_new_tokens} new ones, which takes {need}",
                    "shorten the prompt, lower max_new_tokens, or compile with a larger capacity",
                )  # fmt: skip
        if self.chunk_range.min > self.capacity:
            raise InputError("prefill", f"a chunk within the {self.capacity} positions of the KV states",
                             f"chunks of at least {self.chunk_range.min}", "compile with a larger capacity")

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(begin, count) over the longest prompt. Where the rest is shorter than a call may be, the last chunk
        begins earlier: tokens computed twice give the same K and V."""
        total = self.prompts[self.rows[0]].size
        begin = 0
        while begin < total:
            count = self.chunk_range.fit(min(self.chunk, total - begin))
            start = max(0, min(begin, total - count))
            yield start, count
            begin = start + count

    def prefill(self) -> dict[int, Array]:
        """Feeds all prompts; the logits [V] after the last token of each, by prompt."""
        logits: dict[int, Array] = {}
        for begin, count in self.chunks():
            active = [index for index in self.rows if self.prompts[index].size > begin]
            size = self.prefill_rows.fit(len(active))
            ids, last = np.zeros((size, count), np.int64), np.zeros(size, np.int64)
            for row, index in enumerate(active):
                piece = self.prompts[index][begin : begin + count]
                ids[row, : piece.size] = piece
                last[row] = piece.size - 1
            start = np.full(size, begin, np.int64)
            result = self.session("prefill", ids=ids, start=start, last=last)["logits"]
            for row, index in enumerate(active):
                if self.prompts[index].size <= begin + count:
                    logits[index] = result[row].copy()
        return logits

    def decode(self, made: list[list[int]], running: set[int]) -> dict[int, Array]:
        """Feeds the newest token of each sequence; the logits [V] of those in ``running``, by prompt.

        Ended sequences between running ones go along, at their own end.
        """
        count = 1 + max(row for row, index in enumerate(self.rows) if index in running)
        step = self.decode_call(self.decode_rows.fit(count))
        ids, start = step.inputs["ids"], step.inputs["start"]
        for row, index in enumerate(self.rows[: start.size]):
            ids[row] = made[index][-1]
            start[row] = self.prompts[index].size + len(made[index]) - 1
        result = step()["logits"]
        return {index: result[row] for row, index in enumerate(self.rows[: start.size]) if index in running}

    def decode_call(self, size: int) -> Call:
        """The call for ``size`` rows, kept for the next step."""
        if self.step is None or self.step.inputs["start"].size != size:
            self.step = self.session.bind("decode", ids=np.zeros((size, 1), np.int64), start=np.zeros(size, np.int64))
        return self.step


def _entry(session: Session, name: str, inputs: tuple[str, ...]) -> EntrySpec:
    """An entry of the generation convention. Raises InputError when the program was not compiled for generation."""
    entry = session.program.manifest.entries.get(name)
    remedy = "compile the model with a kv-layout pass to generate text"
    if entry is None:
        raise InputError("session", f"a program with the entry {name!r}", f"{session.program.entries}", remedy)
    found = tuple(tensor.name for tensor in entry.inputs)
    if set(found) != set(inputs) or "logits" not in [tensor.name for tensor in entry.outputs]:
        raise InputError("session", f"{name}{inputs} -> logits", f"{name}{found}", remedy)
    return entry


def _check_tokens(entry: EntrySpec, prompt: Array, index: int) -> None:
    ids = next(tensor for tensor in entry.inputs if tensor.name == "ids")
    low, high = max(0, ids.low or 0), ids.high
    if prompt.min() < low or (high is not None and prompt.max() > high):
        limit = f"token ids from {low}" + ("" if high is None else f" to {high}")
        raise InputError(f"prompts[{index}]", limit, f"{prompt.min()} to {prompt.max()}",
                         "use the tokenizer that came with the model")
