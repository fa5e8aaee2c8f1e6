"""What ``tilewright run`` does: continue a text, token by token, and say how fast."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewright.runtime import Session, Tokenizer


@dataclass(frozen=True)
class Options:
    """How to choose tokens: see ``tilewright.runtime.generation.generate``."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "seed": self.seed}


@dataclass
class Clock:
    """Times of one generation: to the first token, and for each after it."""

    start: float
    first: float = 0.0
    last: float = 0.0
    count: int = 0

    def tick(self) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.count += 1

    def line(self, prompt: int) -> str:
        """``12 prompt tokens in 3.1 ms, 64 new tokens at 812.0 tokens/s``."""
        speed = (self.count - 1) / (self.last - self.first) if self.count > 1 else 0.0
        wait = (self.first - self.start) * 1e3
        return f"{prompt} prompt tokens, first token after {wait:.1f} ms, {self.count} new tokens at {speed:.1f} tokens/s"


def continue_ids(session: Session, ids: list[int], options: Options, show: Callable[[str], Any]) -> str:
    """Show the new token ids on one line; gives the line about speed."""
    clock, made = Clock(time.perf_counter()), []
    for _, (token,) in session.stream([ids], options.max_new_tokens, **options.arguments()):
        clock.tick()
        made.append(token)
    show(",".join(map(str, made)))
    return clock.line(len(ids))


def continue_text(session: Session, folder: Path, text: str, options: Options, show: Callable[[str], Any]) -> str:
    """Show ``text`` and its continuation as it comes; gives the line about speed."""
    tokenizer = Tokenizer(folder)
    ids, pieces = tokenizer.encode(text), tokenizer.stream()
    clock = Clock(time.perf_counter())
    show(text)
    steps = session.stream([ids], options.max_new_tokens, stop_tokens=tokenizer.stop_tokens, **options.arguments())
    for _, (token,) in steps:
        clock.tick()
        show(pieces.put(token) if token is not None else "")
    show(pieces.end() + "\n")
    return clock.line(len(ids))
