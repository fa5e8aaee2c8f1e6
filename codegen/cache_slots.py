"""Which slots the memory of a cache has on CPUs, whatever lies in them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from tilewright.ir import Kept, Layout, Paged, Ring

SLOT_STEP = 64
"""Keys are scored in runs of this many; the slots of a cache are rounded up to a multiple."""
VALUE_STEP = 16
"""A value's size is rounded up to a multiple of this."""


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step


class Slots(ABC):
    """The slots of a region: what a sequence has of its own, or a page of a pool. ``layout`` is as in `KVType`."""

    dim: int
    vdim: int
    length: int
    panel: int
    layout: Layout

    @property
    @abstractmethod
    def run(self) -> int:
        """Slots of a run, what one head has in one piece."""

    @property
    @abstractmethod
    def pair(self) -> int:
        """Components of a key, or neighbouring values, that lie side by side."""

    @property
    def step(self) -> int:
        """What the slots of contiguous caches are a multiple of."""
        return SLOT_STEP

    @property
    def held(self) -> int:
        """Slots of a region that hold tokens."""
        match self.layout:
            case Paged(page):
                return page
            case Ring() as ring:
                return ring.sinks + ring.size
            case Kept() as kept:
                return kept.size
        return self.length

    @property
    def sink_slots(self) -> int:
        """Slots in memory before those of a ring that are written again and again."""
        return round_up(self.layout.sinks, SLOT_STEP) if isinstance(self.layout, Ring) else 0

    @property
    def slots(self) -> int:
        """Slots of a region in memory."""
        if isinstance(self.layout, Ring):
            return self.sink_slots + self.layout.size
        return self.held if isinstance(self.layout, (Paged, Kept)) else round_up(self.length, self.step)

    @property
    def most(self) -> int:
        """The most slots of a sequence in memory."""
        return round_up(self.length, SLOT_STEP) if isinstance(self.layout, Paged) else self.slots

    def places(self) -> np.ndarray:
        """Where the slots that hold tokens are among those in memory."""
        at = np.arange(self.held)
        return at if not isinstance(self.layout, Ring) else at + (at >= self.layout.sinks) * (self.slots - self.held)

    @property
    def windows(self) -> tuple[str, ...]:
        """Names of what a sequence has of its own, keys and values, when its other slots are in pages."""
        return ()

    def own(self, sequences: int) -> tuple[np.ndarray, ...]:
        """The memory of these, zero: bytes ``[sequences, size]`` each."""
        return ()

    @property
    def key_panel(self) -> int:
        """Keys of a panel."""
        return min(self.panel, self.run)

    @property
    def key_size(self) -> int:
        """Components of a key in memory."""
        return round_up(self.dim, self.pair)

    @property
    def value_size(self) -> int:
        """Components of a value in memory."""
        return round_up(self.vdim, VALUE_STEP)

    @property
    def summary_row(self) -> int:
        """Elements of each half of a page's summary, zeros behind the last component."""
        return round_up(self.dim, VALUE_STEP)
