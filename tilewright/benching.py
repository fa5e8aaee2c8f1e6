"""What ``tilewright bench`` does: time prefill and decode of one session."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np

from tilewright.runtime import Session
from tilewright.runtime.errors import InputError
from tilewright.runtime.sampling import Sampler, Sampling


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
    capacity = min(state.length for state in session.program.manifest.states)
    if prompt_tokens + new_tokens > capacity:
        raise InputError("bench", f"prompt and new tokens within the {capacity} positions of the KV states",
                         f"{prompt_tokens} + {new_tokens}", "ask for fewer, or compile with a larger capacity")
    random = np.random.default_rng(seed)
    prompt = random.integers(0, vocabulary, (1, prompt_tokens))
    prefill, decode = [], []
    greedy = Sampler(session.program.library, Sampling())
    at, end = np.zeros(1, np.int64), np.full(1, prompt_tokens - 1)
    decode_step = session.bind("decode", ids=prompt[:, :1], start=at)
    for _ in range(repeats + 1):
        start = time.perf_counter()
        token = greedy.choose(session("prefill", ids=prompt, start=at, last=end)["logits"][0], random)
        middle = time.perf_counter()
        for i in range(new_tokens):
            decode_step.inputs["ids"][...] = token
            decode_step.inputs["start"][...] = prompt_tokens + i
            token = greedy.choose(decode_step()["logits"][0], random)
        prefill.append(prompt_tokens / (middle - start))
        decode.append(new_tokens / (time.perf_counter() - middle))
    rows = (Timing("prefill", prompt_tokens, tuple(prefill[1:])), Timing("decode", new_tokens, tuple(decode[1:])))
    return Measurement(rows)
