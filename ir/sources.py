"""Where the numbers of weights come from: memory, or other sources when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class WeightSource(Protocol):
    """Where the numbers of a weight come from; ``load`` may map a file and must not copy needlessly."""

    def load(self) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Numbers that are already in memory."""

    array: np.ndarray

    def load(self) -> np.ndarray:
        return self.array


@dataclass(frozen=True, eq=False)
class ComputedSource:
    """Numbers made from other sources when they are asked for (a concatenation, a cast)."""

    parts: tuple[WeightSource, ...]
    make: Callable[..., np.ndarray]

    def load(self) -> np.ndarray:
        return self.make(*(p.load() for p in self.parts))

    def release(self) -> None:
        """Let go of what the parts have mapped."""
        for part in self.parts:
            release(part)


class Computation:
    """Several arrays made together from one source. They are kept until each has been asked for, then made anew."""

    def __init__(self, part: WeightSource, make: Callable[[np.ndarray], Sequence[np.ndarray]]) -> None:
        self.part, self.make = part, make
        self.left: dict[int, np.ndarray] = {}

    def take(self, index: int) -> np.ndarray:
        if index not in self.left:
            self.left = dict(enumerate(self.make(self.part.load())))
        return self.left.pop(index)


@dataclass(frozen=True, eq=False)
class PartSource:
    """The ``index``-th array of a computation."""

    computation: Computation
    index: int

    def load(self) -> np.ndarray:
        return self.computation.take(self.index)

    def release(self) -> None:
        """Let go of what the computation's source has mapped."""
        release(self.computation.part)


def release(source: WeightSource | None) -> None:
    """Let go of the mapped pages of a source that can."""
    done = getattr(source, "release", None)
    if done is not None:
        done()
