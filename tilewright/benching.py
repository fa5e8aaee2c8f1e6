"""What ``tilewright bench`` does: time prefill and decode of one session."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np

from tilewright.runtime import Batch, Session
from tilewright.runtime.errors import InputError


@dataclass(frozen=True)
class Timing:
    """Tokens a second over repeats."""

    what: str
    tokens: int
    speeds: tuple[float, ...]

    def line(self) -> str:
        low, high = min(self.speeds), max(self.speeds)
        return f"{self.what:8} {self.tokens:>6} {statistics.median(self.speeds):>10.1f} {low:>10.1f} {high:>10.1f}"


@dataclass(frozen=True)
class Measurement:
    """Prefill and decode of one batch-1 sequence."""

    rows: tuple[Timing, ...]

    def table(self) -> str:
        head = f"{'':8} {'tokens':>6} {'median/s':>10} {'min/s':>10} {'max/s':>10}"
        return "\n".join([head, *(r.line() for r in self.rows)])


def measure(session: Session, prompt_tokens: int, new_tokens: int, repeats: int, seed: int = 0) -> Measurement:
    """Time prefill of random tokens, then greedy decode; one warm-up, then ``repeats`` measurements."""
    spec = session.entry("prefill").inputs[0]
    vocabulary = (spec.high or 0) + 1
    if prompt_tokens + new_tokens > session.capacity:
        raise InputError("bench", f"prompt and new tokens within the {session.capacity} positions of the KV states",
                         f"{prompt_tokens} + {new_tokens}", "ask for fewer, or compile with a larger capacity")
    prompt = np.random.default_rng(seed).integers(0, vocabulary, prompt_tokens)
    prefill, decode = [], []
    for _ in range(repeats + 1):
        with Batch(session, chunk=prompt_tokens, share=False) as batch:
            batch.add(prompt, new_tokens + 1)
            start = time.perf_counter()
            while batch.pending:
                batch.prefill()
            middle = time.perf_counter()
            while batch.running:
                batch.decode()
            prefill.append(prompt_tokens / (middle - start))
            decode.append(new_tokens / (time.perf_counter() - middle))
    rows = (Timing("prefill", prompt_tokens, tuple(prefill[1:])), Timing("decode", new_tokens, tuple(decode[1:])))
    return Measurement(rows)
