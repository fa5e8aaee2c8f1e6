"""Rows of codes in a GPU's cache, whose memory `runtime.coded` describes: how they are written, kernels' C for places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.ir import DType
from tilewright.ir.ops.kv_codes import encode
from tilewright.runtime.coded import CodedRows

SLOT_STEP = 16
"""Slots of a region are a multiple of this, so that 16 bytes have the scales of slots of one head."""


@dataclass(frozen=True)
class CodeRows(CodedRows):
    """K or V in codes."""

    @property
    def stored(self) -> str:
        """Element type of the memory."""
        return "u8"

    def empty(self, regions: int) -> np.ndarray[Any, Any]:
        """Fresh memory, zero."""
        return np.zeros((regions, self.bytes), np.uint8)

    def write(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Memory whose first slots hold codes of ``rows`` [regions, T, heads, size]."""
        out, count = self.empty(len(rows)), rows.shape[1]
        coded = encode(rows.swapaxes(1, 2), DType(f"i{self.bits}"), -1, DType(self.scales))
        codes, scales = self.views(out)
        whole = np.zeros((*codes.shape[:2], count, 8 * self.row // self.bits), np.uint8)
        whole[..., : self.size] = coded.codes.view(np.uint8)
        codes[:, :, :count] = whole if self.bits == 8 else whole[..., ::2] | whole[..., 1::2] << 4
        for at, numbers in enumerate(x for x in (coded.scale, coded.zero) if x is not None):
            scales[:, :, :count, at] = numbers[..., 0]
        return out

    def read(self, memory: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """What codes mean, f32 ``[regions, slots, heads, size]``."""
        codes, scales = self.parts(memory)
        wide = scales.astype(np.float32)
        found = codes.astype(np.float32) * wide[..., :1]
        return np.ascontiguousarray((found + wide[..., 1:] if self.has_zeros else found).swapaxes(1, 2))

    def address(self, pointer: str, region: str, head: str, slot: str) -> str:
        """C: where a row begins; places are i64."""
        return f"{pointer} + {region} * {self.bytes} + ({head} * {self.slots} + {slot}) * {self.row}"

    def scale_address(self, pointer: str, region: str, head: str, slot: str) -> str:
        """C: where a slot's scale begins."""
        at = f"({head} * {self.slots} + {slot}) * {self.scale_bytes}"
        return f"{pointer} + {region} * {self.bytes} + {self.codes} + {at}"
