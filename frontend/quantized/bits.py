"""Small integers out of the words that checkpoints keep them in."""

from __future__ import annotations

import numpy as np

from tilewright.ir.types import DType

_AT_ONCE = 1 << 22  # codes that are unpacked at a time


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Unsigned codes u8 ``[R, count]`` of ``bits`` bits, one after the other in i32 words ``[R, W]``, low bits first."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return octets[:, :count]
    out = np.empty((len(words), count), np.uint8)
    step = max(1, _AT_ONCE // max(count, 1))
    for start in range(0, len(words), step):
        rows = slice(start, start + step)
        out[rows] = _spread(octets[rows], bits, count)
    return out


def _spread(octets: np.ndarray, bits: int, count: int) -> np.ndarray:
    if bits in (2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (octets[:, :, None] >> shifts) & np.uint8(2**bits - 1)
        return codes.reshape(len(octets), -1)[:, :count]
    single = np.unpackbits(octets, axis=1, count=count * bits, bitorder="little")
    return np.packbits(single.reshape(len(octets), count, bits), axis=-1, bitorder="little")[..., 0]


def words_for(count: int, bits: int) -> int:
    """How many words of 32 bits ``count`` codes take."""
    return -(-count * bits // 32)


def holder(bits: int, signed: bool) -> DType:
    """The narrowest element type of the IR that holds codes of ``bits`` bits."""
    width = next(width for width in (2, 3, 4, 8) if width >= bits)
    return DType(f"{'i' if signed else 'u'}{width}")


def signed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes (u8) with the middle of their range taken off, in place where they can be written."""
    return np.subtract(codes, np.uint8(1 << (bits - 1)), out=codes if codes.flags.writeable else None).view(np.int8)


def held(codes: np.ndarray, dtype: DType) -> np.ndarray:
    """Codes in bytes as an array of ``dtype``, whose range they are in."""
    return np.ascontiguousarray(codes).view(dtype.np)
