"""The memory of a session's KV states: regions, which are sequences or the pages of a pool."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tilewright.runtime.caches import SPARE
from tilewright.runtime.manifest import StateSpec
from tilewright.runtime.memory import address, parts_of_pages


@dataclass(frozen=True)
class Part:
    """K or V of one state, in pages or not, or beside these: ``count`` regions of ``size`` bytes, pages or sequences."""

    name: str
    count: int
    size: int
    paged: bool

    @property
    def bytes(self) -> int:
        return self.count * self.size


class States:
    """Zeroed memory for ``sequences`` sequences and ``pages`` pages, and the spare one; taken when first needed.

    It costs nothing until it is touched.
    """

    def __init__(self, specs: Sequence[StateSpec], sequences: int, pages: int) -> None:
        self.parts: list[Part] = []
        for spec in specs:
            count = pages + SPARE if spec.page else sequences
            self.parts += [Part(spec.name, count, size, spec.page > 0) for size in (spec.k_bytes, spec.v_bytes)]
            self.parts += [Part(spec.name, sequences, size, False) for size in (spec.k_beside, spec.v_beside) if size]
        self._memory: list[Any] = []
        self._pointers: dict[int, Any] = {}

    @property
    def bytes(self) -> int:
        """Bytes held: all or nothing."""
        return sum(part.bytes for part in self.parts) if self._memory else 0

    def pointers(self, first: int = 0) -> Any:
        """K and V of each state, and what is beside its pages, for a program whose first row is sequence ``first``.

        Raises MemoryError.
        """
        if not self._memory:
            self._memory = self._allocate()
            self._pointers = {}
        if first not in self._pointers:
            shifts = (0 if part.paged else first * part.size for part in self.parts)
            places = [at + shift for at, shift in zip(map(self._address, self._memory), shifts)]
            self._pointers[first] = (ctypes.c_void_p * max(1, len(places)))(*places)
        return self._pointers[first]

    def copy(self, index: int, to: int, paged: bool) -> None:
        """Copies a page, or else what a sequence has of its own, in every state."""
        self.pointers()
        for memory, part in zip(self._memory, self.parts):
            if part.paged == paged:
                self._copy(memory, index * part.size, to * part.size, part.size)

    def release(self) -> None:
        """Gives the memory back; what is needed next is zero again."""
        self._memory, self._pointers = [], {}

    def _allocate(self) -> list[Any]:
        return list(parts_of_pages([part.bytes for part in self.parts]))

    def _address(self, memory: Any) -> int:
        return address(memory)

    def _copy(self, memory: Any, begin: int, to: int, count: int) -> None:
        memory[to:to + count] = memory[begin:begin + count]
