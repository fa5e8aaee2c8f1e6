"""Codes of a key/value cache in a GPU's memory: where they lie, and what they are taken apart into.

K or V of a region is bytes: a row for each head and slot, and behind all rows their scales ``[heads, slots]``, each with
its zero beside it if codes have one. A row is a whole number of 16 bytes, so that it is copied by such pieces; of four bits
two codes are a byte, the first in the lower half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

PIECE = 16
"""Bytes that are copied at once."""
SCALES: dict[str, np.dtype[Any]] = {"f16": np.dtype("f2"), "f32": np.dtype("f4")}
BITS = (4, 8)


@dataclass(frozen=True)
class CodedRows:
    """K or V of ``size`` components in codes of ``bits``; those of eight are signed, those of four have zeros."""

    size: int
    bits: int
    scales: str
    heads: int
    slots: int

    @property
    def has_zeros(self) -> bool:
        return self.bits < 8

    @property
    def row(self) -> int:
        """Bytes from row to row."""
        return -(-self.size * self.bits // (8 * PIECE)) * PIECE

    @property
    def scale_bytes(self) -> int:
        """Bytes of a scale and its zero."""
        return SCALES[self.scales].itemsize * (1 + self.has_zeros)

    @property
    def codes(self) -> int:
        """Bytes of a region's rows: where the scales begin."""
        return self.heads * self.slots * self.row

    @property
    def bytes(self) -> int:
        """Bytes of a region."""
        return self.codes + self.heads * self.slots * self.scale_bytes

    def views(self, memory: Array) -> tuple[Array, Array]:
        """Rows ``[regions, heads, slots, row]`` and scales ``[regions, heads, slots, 1 or 2]`` of regions, in place."""
        places = len(memory), self.heads, self.slots
        scales = memory[:, self.codes:].view(SCALES[self.scales])
        return memory[:, :self.codes].reshape(*places, self.row), scales.reshape(*places, 1 + self.has_zeros)

    def parts(self, memory: Array) -> tuple[Array, Array]:
        """Codes ``[regions, heads, slots, size]``, and scales as in ``views``."""
        rows, scales = self.views(memory.reshape(-1, self.bytes))
        codes: Array = rows.view(np.int8) if self.bits == 8 else np.stack([rows & 15, rows >> 4], -1)
        return codes.reshape(*rows.shape[:3], -1)[..., :self.size], scales
