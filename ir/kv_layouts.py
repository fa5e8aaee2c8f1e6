"""Layouts of KV caches: which slot a position of a sequence has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

from tilewright.ir.kv_kept import Kept

PAGES = (16, 32, 64)
"""Tokens that a page may hold."""
RING_STEP = 64
"""The slots of a ring are a multiple of this."""


@dataclass(frozen=True)
class Contiguous:
    """Position p lies in slot p of the sequence's own memory."""

    def __str__(self) -> str:
        return "contiguous"


@dataclass(frozen=True)
class Paged:
    """Slots in pages of ``page`` tokens, out of a pool that sequences share.

    Position p of sequence b is in row ``p % page`` of page ``table[b, p // page]``.
    """

    page: int

    def __post_init__(self) -> None:
        expect(self.page in PAGES, f"pages have {', '.join(map(str, PAGES))} tokens, got {self.page}")

    def __str__(self) -> str:
        return f"paged<{self.page}>"


@dataclass(frozen=True)
class Ring:
    """The first ``sinks`` positions stay; of the others the last ``window`` are there (StreamingLLM, arXiv:2309.17453).

    A call appends at most ``chunk`` tokens, and so overwrites nothing that its own queries see.
    """

    window: int
    chunk: int
    sinks: int = 0

    def __post_init__(self) -> None:
        expect(self.window >= 1 and self.chunk >= 1, f"window and chunk of a ring are positive, got {self}")
        expect(self.sinks >= 0, f"sinks are not negative, got {self}")

    def __str__(self) -> str:
        return f"ring<{self.window}, {self.chunk}" + (f", {self.sinks}>" if self.sinks else ">")

    @property
    def size(self) -> int:
        """Slots that are written again and again; position p, if no sink, lies in slot ``sinks + p % size``."""
        return -(-(self.window + self.chunk) // RING_STEP) * RING_STEP


CONTIGUOUS = Contiguous()
Layout: TypeAlias = Contiguous | Paged | Ring | Kept
_LAYOUTS: dict[str, type[Layout]] = {"contiguous": Contiguous, "paged": Paged, "ring": Ring, "kept": Kept}
_LAYOUT = re.compile(r"([a-z]+)(?:<(\d{1,12}(?:, ?\d{1,12})*)>)?", re.ASCII)


def parse_layout(text: str) -> Layout:
    """``contiguous``, ``paged<32>``, ``ring<1024, 512, 4>``, ``kept<1024, 512>``; raises ValueError."""
    match = _LAYOUT.fullmatch(text)
    kind = _LAYOUTS.get(match[1]) if match else None
    numbers = [int(n) for n in match[2].split(",")] if match and match[2] else []
    if kind is None or not _takes(kind, len(numbers)):
        known = "contiguous, paged<page>, ring<window, chunk, sinks>, kept<budget, chunk>"
        raise ValueError(f"no layout of a cache: {text!r}; there are {known}")
    return kind(*numbers)


def _takes(kind: type[Layout], count: int) -> bool:
    return {Contiguous: count == 0, Paged: count == 1, Ring: count in (2, 3), Kept: count == 2}[kind]


def expect(condition: bool, message: str) -> None:
    """Raises ValueError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)
