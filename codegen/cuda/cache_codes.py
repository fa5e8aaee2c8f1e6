"""Rows of codes in a GPU's cache: bytes, and behind all rows of a region their scales.

A row is a whole number of 16 bytes, so that it is copied by such pieces; of four bits two codes are a byte, the first in
the lower half. Behind the rows ``[heads, slots, row]`` lie the scales ``[heads, slots]``, each with its zero beside it if
codes have one, so that 16 bytes have those of neighbouring slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.ir import DType
from tilewright.ir.ops.kv_codes import encode

SLOT_STEP = 16
"""Slots of a region are a multiple of this."""
PIECE = 16
"""Bytes that are copied at once."""
_SCALES = {"f16": np.dtype("f2"), "f32": np.dtype("f4")}
_BITS = {"i8": 8, "i4": 4}


@dataclass(frozen=True)
class CodeRows:
    """K or V in codes ``dtype`` of ``size`` components, with ``scales``."""

    size: int
    dtype: str
    scales: str
    heads: int
    slots: int

    @property
    def stored(self) -> str:
        """Element type of the memory."""
        return "u8"

    @property
    def bits(self) -> int:
        """Of a code."""
        return _BITS[self.dtype]

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
        return _SCALES[self.scales].itemsize * (1 + self.has_zeros)

    @property
    def codes(self) -> int:
        """Bytes of a region's rows: where the scales begin."""
        return self.heads * self.slots * self.row

    @property
    def region(self) -> int:
        """Bytes of a region."""
        return self.codes + self.heads * self.slots * self.scale_bytes

    @property
    def bytes(self) -> int:
        return self.region

    def empty(self, regions: int) -> np.ndarray[Any, Any]:
        """Fresh memory, zero."""
        return np.zeros((regions, self.region), np.uint8)

    def write(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Memory whose first slots hold codes of ``rows`` [regions, T, heads, size]."""
        out, count = self.empty(len(rows)), rows.shape[1]
        coded = encode(rows.swapaxes(1, 2), DType(self.dtype), -1, DType(self.scales))
        codes, scales = self._views(out)
        whole = np.zeros((*codes.shape[:2], count, 8 * self.row // self.bits), np.uint8)
        whole[..., : self.size] = coded.codes.view(np.uint8)
        codes[:, :, :count] = whole if self.bits == 8 else whole[..., ::2] | whole[..., 1::2] << 4
        for at, numbers in enumerate(x for x in (coded.scale, coded.zero) if x is not None):
            scales[:, :, :count, at] = numbers[..., 0]
        return out

    def read(self, memory: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """What codes mean, f32 ``[regions, slots, heads, size]``."""
        codes, scales = self._views(memory.reshape(-1, self.region))
        numbers = codes.view(np.int8) if self.bits == 8 else np.stack([codes & 15, codes >> 4], -1)
        wide = scales.astype(np.float32)
        found = numbers.reshape(*codes.shape[:3], -1)[..., : self.size].astype(np.float32) * wide[..., :1]
        found = found + wide[..., 1:] if self.has_zeros else found
        return np.ascontiguousarray(found.swapaxes(1, 2))

    def _views(self, memory: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Codes ``[regions, heads, slots, row]`` and scales ``[regions, heads, slots, 1 or 2]`` of memory, in place."""
        places = len(memory), self.heads, self.slots
        return (memory[:, : self.codes].reshape(*places, self.row),
                memory[:, self.codes :].view(_SCALES[self.scales]).reshape(*places, 1 + self.has_zeros))  # fmt: skip

    def address(self, pointer: str, region: str, head: str, slot: str) -> str:
        """C: where a row begins; places are i64."""
        return f"{pointer} + {region} * {self.region} + ({head} * {self.slots} + {slot}) * {self.row}"

    def scale_address(self, pointer: str, region: str, head: str, slot: str) -> str:
        """C: where a slot's scale begins."""
        at = f"({head} * {self.slots} + {slot}) * {self.scale_bytes}"
        return f"{pointer} + {region} * {self.region} + {self.codes} + {at}"
