"""Memory that programs work in: 64-byte aligned arrays and zeroed pages that cost nothing until touched."""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

ALIGNMENT = 64
_HUGE = 2 << 20


def pages(count: int, huge: bool = False) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """``count`` zero bytes in private pages of their own, given back when the array goes. Raises MemoryError.

    With ``huge`` in pages of 2 MB, when there is that much and the system has them; then there may be more bytes.
    """
    huge = huge and count >= _HUGE
    count = -(-count // _HUGE) * _HUGE if huge else count  # systems align what is made of whole large pages
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        mapping = mmap.mmap(-1, max(count, 1), flags=flags)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"cannot map {count} bytes for a session; use a smaller batch, chunk or capacity") from error
    if huge:
        advise(mapping, "MADV_HUGEPAGE")
    return np.frombuffer(mapping, np.uint8)


def parts_of_pages(counts: Sequence[int]) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Zero bytes, an array for each of ``counts``, in one block of large pages, which are read faster than small ones.

    Each array begins at a small page. Raises MemoryError.
    """
    begins = list(itertools.accumulate((-(-count // mmap.PAGESIZE) * mmap.PAGESIZE for count in counts), initial=0))
    block = pages(begins[-1], huge=True)
    return [block[begin : begin + count] for begin, count in zip(begins, counts)]


def advise(mapping: mmap.mmap, name: str) -> None:
    """Gives the system advice of ``mmap``'s name, where it knows that advice and takes it."""
    if hasattr(mmap, name):
        with contextlib.suppress(OSError):
            mapping.madvise(getattr(mmap, name))


def address(array: np.ndarray[Any, Any]) -> int:
    """Where the array's memory begins."""
    return int(array.__array_interface__["data"][0])


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """An uninitialised row-major array whose first byte is 64-byte aligned."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    begin = -address(raw) % ALIGNMENT
    return raw[begin : begin + size].view(dtype).reshape(shape)


def as_aligned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """``array`` itself when it is row-major and aligned, else a copy that is."""
    if array.flags.c_contiguous and address(array) % ALIGNMENT == 0:
        return array
    copy = aligned(array.shape, array.dtype)
    copy[...] = array
    return copy


class Arena:
    """Scratch memory of a session: grows to the largest call so far, never holds two blocks at once."""

    def __init__(self) -> None:
        self._block: np.ndarray[Any, np.dtype[np.uint8]] | None = None
        self._address = 0

    @property
    def bytes(self) -> int:
        return 0 if self._block is None else self._block.size

    def reserve(self, count: int) -> int:
        """The address of at least ``count`` bytes; what was there before is lost when it grows."""
        if self._block is None or self._block.size < count:
            self._block = None
            self._block = pages(-(-count // _HUGE) * _HUGE, huge=True)
            self._address = address(self._block)
        return self._address

    def release(self) -> None:
        self._block = None
