"""Blocks of GGUF files: codes, scales and offsets as the IR has them, so that they mean the same numbers bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tilewright.ir.types import DType

Rows = np.ndarray
"""Bytes u8 ``[R, B]`` of R blocks."""


@dataclass(frozen=True)
class Block:
    """``size`` numbers in ``bytes`` bytes. ``parts``: what makes codes ``[R, size]`` and others ``[R, size / group]``."""

    size: int
    bytes: int
    group: int
    codes: DType
    scales: DType
    parts: Mapping[str, Callable[[Rows], np.ndarray]]


def _halves(rows: Rows, at: int) -> np.ndarray:
    """The f16 at byte ``at`` of each block ``[R, 1]``."""
    return np.ascontiguousarray(rows[:, at : at + 2]).view(np.float16)


def _wide(rows: Rows, at: int) -> np.ndarray:
    return _halves(rows, at).astype(np.float32)


def _nibbles(octets: Rows, run: int) -> np.ndarray:
    """Codes ``[R, 2 B]``: of each ``run`` bytes the low halves, then the high ones."""
    parts = octets.reshape(len(octets), -1, 1, run) >> np.array([0, 4], np.uint8)[:, None]
    return (parts & np.uint8(15)).reshape(len(octets), -1)


def _q4_0(rows: Rows) -> np.ndarray:
    return (_nibbles(rows[:, 2:], 16) - np.uint8(8)).view(np.int8)


def _q8_0(rows: Rows) -> np.ndarray:
    return rows[:, 2:].view(np.int8)


def _q4_k(rows: Rows) -> np.ndarray:
    return _nibbles(rows[:, 16:], 32)


def _q4_k_sixes(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """The 8 scales and 8 minima of a block, 6 bits each in 12 bytes: f32 ``[R, 8]`` both."""
    low, middle, high = (rows[:, 4 + 4 * i : 8 + 4 * i] for i in range(3))
    scale = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], 1)
    least = np.concatenate([middle & 63, (high >> 4) | ((middle >> 2) & 48)], 1)
    return scale.astype(np.float32), least.astype(np.float32)


def _q4_k_scale(rows: Rows) -> np.ndarray:
    return _wide(rows, 0) * _q4_k_sixes(rows)[0]


def _q4_k_offset(rows: Rows) -> np.ndarray:
    return -(_wide(rows, 2) * _q4_k_sixes(rows)[1])


def _q6_k(rows: Rows) -> np.ndarray:
    """Six bits: four of them in the first 128 bytes, two in the next 64. Held in eight."""
    low = _nibbles(rows[:, :128], 64).reshape(len(rows), -1, 32)
    high = rows[:, 128:192].reshape(len(rows), -1, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    codes = low | ((high & np.uint8(3)) << np.uint8(4)).reshape(len(rows), -1, 32)
    return (codes - np.uint8(32)).view(np.int8).reshape(len(rows), -1)


def _q6_k_scale(rows: Rows) -> np.ndarray:
    return _wide(rows, 208) * rows[:, 192:208].view(np.int8).astype(np.float32)


BLOCKS = {
    "Q4_0": Block(32, 18, 32, DType.i4, DType.f16, {"codes": _q4_0, "scale": lambda rows: _halves(rows, 0)}),
    "Q8_0": Block(32, 34, 32, DType.i8, DType.f16, {"codes": _q8_0, "scale": lambda rows: _halves(rows, 0)}),
    "Q4_K": Block(
        256, 144, 32, DType.u4, DType.f32, {"codes": _q4_k, "scale": _q4_k_scale, "offset": _q4_k_offset}
    ),
    "Q6_K": Block(256, 210, 16, DType.i8, DType.f32, {"codes": _q6_k, "scale": _q6_k_scale}),
}
"""By the name of the type in ggml."""
