"""What is measured, and what a measurement gives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

Status = Literal["ok", "wrong", "crashed", "timeout", "refused"]
"""``ok``: right and timed; ``wrong``: other numbers than the reference; ``refused``: the compiler would not make it."""


@dataclass(frozen=True)
class Workload:
    """One kernel at one size on one machine.

    ``kernel`` is the text of a module with this one kernel and nothing else, without locations; ``sizes`` gives each of
    its symbolic dims a value. ``host`` names the CPU that it runs on, ``target`` the one that it is compiled for; on a GPU
    both are the target's text, and there is one thread.
    """

    family: str
    kernel: str
    sizes: tuple[tuple[str, int], ...]
    target: str
    threads: int
    host: str

    @cached_property
    def key(self) -> str:
        """A hash of all of it, 32 hexadecimal digits."""
        parts = (self.family, self.kernel, repr(self.sizes), self.target, str(self.threads), self.host)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Measurement:
    """One schedule of a workload, tried once.

    ``seconds`` is the median of ``repeats`` calls and ``spread`` their interquartile range relative to it. ``baseline`` are
    the seconds of the workload's baseline schedule close in time: the ratio of the two does not move with the machine.
    ``metrics`` are facts about the code: ``code_bytes``, ``spills``, ``vector_registers``, ``bytes_moved``.
    """

    schedule: str
    status: Status
    seconds: float | None = None
    spread: float | None = None
    repeats: int = 0
    baseline: float | None = None
    error: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Time relative to the baseline, None when there is no time that counts."""
        timed = self.status == "ok" and self.seconds is not None and self.baseline
        return self.seconds / self.baseline if timed else None  # type: ignore[operator]


class Runner(Protocol):
    """Measures schedules."""

    def measure(
        self, workload: Workload, baseline: str, schedules: Sequence[str], effort: float = 1.0
    ) -> list[Measurement]:
        """One measurement for each of ``schedules``, in order; ``baseline`` is timed beside them.

        ``effort`` multiplies the time that is spent on each.
        """


class Choice(Protocol):
    """A schedule, as far as searching it goes: equal ones have equal texts."""

    @property
    def text(self) -> str: ...


class Space(Protocol):
    """The schedules that one kernel may have."""

    @property
    def default(self) -> Choice:
        """The one chosen by rule."""

    def __iter__(self) -> Iterator[Choice]:
        """All of them."""

    def parse(self, text: str) -> Choice | None:
        """The schedule that ``text`` names, None when it is not of this space."""

    def sample(self, rng: np.random.Generator) -> Choice:
        """Any of them, all equally likely."""

    def mutate(self, choice: Choice, rng: np.random.Generator) -> Choice:
        """``choice`` with one knob or two moved."""

    def cross(self, a: Choice, b: Choice, rng: np.random.Generator) -> Choice:
        """Each knob from one of the two."""


@dataclass(frozen=True)
class Task:
    """A workload to tune.

    ``features`` describes the workload under a schedule, in numbers by name; ``weight`` is how often its time counts in the
    whole. Tasks of one ``group`` read the same weights and must agree on ``layout``, the way these are stored; the group
    "" asks for no agreement.
    """

    workload: Workload
    space: Space
    features: Callable[[Choice], Mapping[str, float]]
    weight: float = 1.0
    name: str = ""
    group: str = ""
    layout: Callable[[Choice], str] = lambda choice: ""
