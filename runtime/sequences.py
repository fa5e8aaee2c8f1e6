"""Sequences: how they are to go on, what came of a step, and prompts on the way to becoming sequences."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tilewright.runtime.errors import InputError
from tilewright.runtime.feeding import check_integer
from tilewright.runtime.places import Place
from tilewright.runtime.sampling import Sampler, Sampling

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Token:
    """What a step made of a sequence. ``ended``: empty, ``stop``, ``length``, or ``failed`` with the ``error``."""

    token: int | None
    ended: str = ""
    error: Exception | None = None


@dataclass(frozen=True)
class Options:
    """How tokens are chosen, and after which ones a sequence ends."""

    max_new_tokens: int
    sampling: Sampling
    stops: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(max_new_tokens: int, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
           stop_tokens: Items[int] = (), stop_sequences: Items[Items[int]] = ()) -> Options:  # fmt: skip
        """As ``generate`` explains them. Raises InputError."""
        sampling = Sampling(temperature, top_k, top_p)
        check_integer("max_new_tokens", max_new_tokens)
        stops = tuple(tuple(int(token) for token in ending) for ending in (*((t,) for t in stop_tokens), *stop_sequences))
        if () in stops:
            raise InputError("stop_sequences", "sequences of at least one token", "an empty one")
        return Options(max_new_tokens, sampling, stops)

    def end(self, made: list[int]) -> str:
        """Why a sequence ends after these new tokens; empty when it goes on."""
        if self.stops and any(len(made) >= len(stop) and tuple(made[-len(stop):]) == stop for stop in self.stops):
            return "stop"
        return "length" if len(made) >= self.max_new_tokens else ""


@dataclass(eq=False)
class Sequence:
    """A sequence and the new tokens ``made`` so far."""

    id: int
    options: Options
    sampler: Sampler
    random: np.random.Generator
    made: list[int] = field(default_factory=list)
    place: Place = field(init=False)


@dataclass(eq=False)
class Prompt:
    """A prompt that is not yet fed to its end, and the sequences that go on from there.

    It has ``rows``, one for each of them, and a ``place`` from when it need not wait any more.
    """

    tokens: Array
    members: list[Sequence]
    rows: list[int] = field(default_factory=list)
    place: Place = field(init=False)

    @property
    def rest(self) -> int:
        """Tokens that are still to be fed, once there is a place."""
        return int(self.tokens.size) - self.place.fed

    def is_for(self, identity: int) -> bool:
        """Whether it is the prompt of this sequence."""
        return any(member.id == identity for member in self.members)


def read_prompt(prompt: Items[int] | Array, name: str) -> Array:
    """Token ids i64 [S]. Raises InputError."""
    row = np.asarray(prompt)
    if row.ndim != 1 or row.size == 0 or row.dtype.kind not in "iu":
        got = f"{type(prompt).__name__} of shape {list(row.shape)} and dtype {row.dtype}"
        raise InputError(name, "a list of at least one token id", got)
    return row.astype(np.int64)
