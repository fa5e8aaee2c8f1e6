"""Where a value keeps its sequences and positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tilewright.ir import Dim


class Mixed(Exception):
    """An operation that relates different positions or sequences; the text says how."""


@dataclass(frozen=True)
class Part:
    """A symbol inside of axis ``axis``, whose size is ``outer * symbol * inner``."""

    axis: int
    outer: Dim = 1
    inner: Dim = 1

    @property
    def is_plain(self) -> bool:
        """The axis holds the symbol and nothing else."""
        return self.outer == 1 and self.inner == 1


@dataclass(frozen=True)
class Axes:
    """Where the sequences of the batch and the positions of each are."""

    batch: Part
    seq: Part

    @property
    def is_plain(self) -> bool:
        """``[B, S, ...]``."""
        return self == Axes(Part(0), Part(1))


PLAIN = Axes(Part(0), Part(1))


def has(dim: Dim, symbol: Any) -> bool:
    return not isinstance(dim, int) and symbol in dim.free_symbols
