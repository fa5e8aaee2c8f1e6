"""Text generation: all tokens of some prompts. ``Batch`` does it; here every prompt is there from the beginning."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from tilewright.runtime.batch import CHUNK, Batch
from tilewright.runtime.errors import InputError
from tilewright.runtime.feeding import Feeder, check_integer
from tilewright.runtime.pages import PagePool
from tilewright.runtime.sampling import generators
from tilewright.runtime.sequences import Options, Token, read_prompt
from tilewright.runtime.session import Session

Array = np.ndarray[Any, Any]
Prompts = Sequence[Sequence[int]] | Array
Step = tuple[int, list[int | None]]
"""A step's number, from 0, and the new token of each sequence; None for those that have ended."""


def generate(
    session: Session, prompts: Prompts, max_new_tokens: int, temperature: float = 0.0, top_k: int = 0,
    top_p: float = 1.0, seed: int | Sequence[int] = 0, stop_tokens: Sequence[int] = (),
    stop_sequences: Sequence[Sequence[int]] = (), chunk: int = CHUNK,
    callback: Callable[[int, list[int | None]], object] | None = None, n: int = 1, share: bool = True,
    attention_mask: Array | None = None,
) -> list[list[int]]:  # fmt: skip
    """The new tokens of each prompt (lists of token ids, of any lengths; at most the session's batch of them).

    A sequence ends with a token of ``stop_tokens`` or with one of ``stop_sequences``, which it includes, or after
    ``max_new_tokens``. ``seed``: one, or one for each sequence; what else is in the batch does not change a
    sequence's draws. ``chunk``: prompt tokens in one call, which bounds the memory. ``callback(step, tokens)`` gets
    what ``stream`` yields. ``n``: sequences for each prompt, side by side in the result; the prompt is computed once.
    ``share``: whether prompts that begin alike share pages, where KV states are pages. ``attention_mask``, of prompts
    [B, S] that are padded on either side: 1 where there are tokens.

    Raises InputError before anything runs, also when a sequence could exceed the positions of the KV states, or all of
    them the pages of the session.
    """
    choice = (temperature, top_k, top_p, seed)
    steps = stream(session, prompts, max_new_tokens, *choice, stop_tokens, stop_sequences, chunk, n, share, attention_mask)
    results: list[list[int]] = [[] for _ in range(len(prompts) * n)]
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
    stop_sequences: Sequence[Sequence[int]] = (), chunk: int = CHUNK, n: int = 1, share: bool = True,
    attention_mask: Array | None = None,
) -> Generator[Step, None, None]:  # fmt: skip
    """As ``generate``, yielding ``(step, tokens)`` as they come. Arguments are checked by the call itself.

    The session's states are its own until it is exhausted or closed.
    """
    rows = _read_prompts(prompts, attention_mask)
    options = Options.of(max_new_tokens, temperature, top_k, top_p, stop_tokens, stop_sequences)
    check_integer("n", n)
    feeder = Feeder(session, chunk)
    for index, row in enumerate(rows):
        feeder.check_prompt(row, max_new_tokens, f"prompts[{index}]")
    feeder.check_count(len(rows) * n)
    if session.pages is not None:
        _check_pages(session.pages, rows, max_new_tokens, n, share)
    random = generators([row for row in rows for _ in range(n)], seed)
    return _steps(session, rows, options, random, chunk, share)


def _steps(
    session: Session, rows: list[Array], options: Options, random: list[np.random.Generator], chunk: int, share: bool
) -> Generator[Step, None, None]:
    n = len(random) // len(rows)
    with Batch(session, chunk, share) as batch:
        numbers: dict[int, int] = {}
        # the longest first: prompts of about one length are fed together, and the last rows end first
        for index in sorted(range(len(rows)), key=lambda index: -rows[index].size):
            own = range(index * n, (index + 1) * n)
            numbers |= dict(zip(batch.add_samples(rows[index], options, [random[i] for i in own]), own))
        events: dict[int, Token] = {}
        while batch.pending:
            events |= batch.prefill()
        step = 0
        while events:
            yield step, _tokens(events, numbers)
            events = batch.decode()
            step += 1


def _tokens(events: dict[int, Token], numbers: dict[int, int]) -> list[int | None]:
    """By the numbers of sequences. Raises the error of one that failed."""
    tokens: list[int | None] = [None] * len(numbers)
    for identity, event in events.items():
        if event.error is not None:
            raise event.error
        tokens[numbers[identity]] = event.token
    return tokens


def _read_prompts(prompts: Prompts, mask: Array | None) -> list[Array]:
    if len(prompts) == 0:
        raise InputError("prompts", "at least one list of token ids", "none")
    if mask is None:
        return [read_prompt(prompt, f"prompts[{index}]") for index, prompt in enumerate(prompts)]
    ids, keep = np.asarray(prompts), np.asarray(mask).astype(bool)
    if ids.ndim != 2 or ids.shape != keep.shape:
        raise InputError("attention_mask", f"the shape of the prompts, {list(ids.shape)}", f"{list(keep.shape)}")
    for index, row in enumerate(keep):
        at = np.flatnonzero(row)
        if at.size and at[-1] - at[0] + 1 > at.size:
            raise InputError(f"attention_mask[{index}]", "tokens side by side, padding before or behind them",
                             str(row.astype(int).tolist()))
    return [read_prompt(row[kept], f"prompts[{index}]") for index, (row, kept) in enumerate(zip(ids, keep))]


def _check_pages(pool: PagePool, rows: list[Array], max_new_tokens: int, n: int, share: bool) -> None:
    """Raises InputError when the sequences could run out of pages."""
    need = 0
    for row in rows:
        shared = row.size // pool.tokens if n > 1 else 0
        need += shared + n * (pool.pages_for(row.size + max_new_tokens - 1) - shared)
    if share and need > pool.count:
        need -= _alike(pool, rows)
    if need > pool.count:
        raise InputError(
            "prompts", f"prompts and new tokens within {pool.count} pages of {pool.tokens} tokens",
            f"{len(rows) * n} sequences that may take {need} pages",
            f"make the session with pages={need}, give fewer prompts at a time, or lower max_new_tokens",
        )  # fmt: skip


def _alike(pool: PagePool, rows: list[Array]) -> int:
    """How many pages less the prompts take since they begin alike."""
    runs: dict[tuple[int, bytes], int] = {}
    total = 0
    for row in rows:
        run = 0
        for begin in range(0, row.size - pool.tokens, pool.tokens):
            run = runs.setdefault((run, row[begin:begin + pool.tokens].tobytes()), len(runs) + 1)
            total += 1
    return total - len(runs)
