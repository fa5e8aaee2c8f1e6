"""What a model says along a text that it is fed as a prompt, and how many of the blocks of keys its attention sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tilewright.ir import Module, Op, empty_states, interpret, ops
from tilewright.runtime import Session

Array = np.ndarray[Any, Any]
CALL, EACH = 64, 16
"""Tokens of a call, and each how many-th of them is scored."""


def along(session: Session, texts: Array, first: int) -> Iterator[tuple[int, Array]]:
    """Logits [B, V] after ``i`` tokens of each text (integers [B, S]), for each ``EACH``-th ``i`` from ``first`` on.

    All of a call's tokens are fed each time, so that what is asked after one of them is what a prompt would be.
    """
    count, size = texts.shape
    for begin in range(0, size, CALL):
        ids = np.ascontiguousarray(texts[:, begin : begin + CALL], np.int64)
        call = session.bind("prefill", ids=ids, start=np.full(count, begin), last=np.full(count, ids.shape[1] - 1))
        call()
        for i in range(max(begin, first - 1), min(begin + CALL, size - 1)):
            if (i + 1 - first) % EACH == 0:
                call.inputs["last"][...] = i - begin
                yield i + 1, call()["logits"]


def walked(module: Module, text: Array, first: int) -> float:
    """Of the blocks up to each block of queries from ``first`` on, the share that is on its list; 1 without lists."""
    shares: list[float] = []
    states = empty_states(module, 1)

    def note(op: Op, results: Any, begin: int) -> None:
        if isinstance(op, ops.Choose) and begin >= first:
            counts = results[0][0, :, :, 0]
            ends = np.minimum(begin + np.arange(1, counts.shape[1] + 1) * op.queries, begin + CALL)
            shares.extend((counts / -(-ends // op.block)).ravel())

    for begin in range(0, len(text), CALL):
        ids = text[None, begin : begin + CALL].astype(np.int64)
        given = [ids, np.array([begin]), np.array([ids.shape[1] - 1])]
        interpret(module, "prefill", given, states, lambda op, results, at=begin: note(op, results, at))
    return float(np.mean(shares)) if shares else 1.0
