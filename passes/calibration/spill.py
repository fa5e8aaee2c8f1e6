"""Arrays that wait for the artifact in a temporary file, codes at their real bits."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tilewright.ir import DType, PassError, TensorType
from tilewright.passes.calibration.data import Array

_CODES = 1 << 22  # that are packed at a time; eight codes are one word


class Spill:
    """A temporary file that lives as long as something refers to it.

    It has no name (or one that goes with it) and lies where ``TMPDIR`` says. Nothing of it stays in memory.
    """

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile(prefix="tilewright-")  # noqa: SIM115 (closed with this object)
        self.size = 0

    def put(self, array: Array, type: TensorType) -> SpilledSource:
        """Write ``array`` down; gives the source of a weight of ``type``. Raises PassError when there is no room."""
        start = self.size
        flat = array.reshape(-1)
        for i in range(0, max(flat.size, 1), _CODES):
            self.write(packed(flat[i : i + _CODES], type.dtype))
        return SpilledSource(self, type, start, self.size - start)

    def write(self, data: bytes) -> None:
        """Append ``data``; raises PassError when there is no room."""
        left = memoryview(data)
        try:
            while left:
                count = os.pwrite(self.file.fileno(), left, self.size)
                self.size, left = self.size + count, left[count:]
        except OSError as error:
            raise PassError(
                f"quantized weights wait in a temporary file in {tempfile.gettempdir()}, which took {self.size} bytes: "
                f"{error.strerror}; set TMPDIR to a folder with more room"
            ) from error

    def put_all(self, arrays: Sequence[Array], types: Sequence[TensorType]) -> list[SpilledSource]:
        """A source for each array."""
        return [self.put(a, t) for a, t in zip(arrays, types, strict=True)]


@dataclass(frozen=True, eq=False)
class SpilledSource:
    """The numbers of one array in a spill."""

    spill: Spill
    type: TensorType
    start: int
    size: int

    def load(self) -> Array:
        data = bytearray(self.size)
        file = self.spill.file.fileno()
        at = 0
        while at < self.size:
            part = os.pread(file, min(self.size - at, 1 << 30), self.start + at)
            data[at : at + len(part)] = part
            at += len(part)
        return unpacked(data, self.type)


def packed(array: Array, dtype: DType) -> bytes:
    """The elements one after the other in ``dtype.bits`` bits each, the first in the lowest bits."""
    if dtype.bits >= 8:
        return np.ascontiguousarray(array).tobytes()
    codes = np.zeros(-(-array.size // 8) * 8, np.uint8)
    codes[: array.size] = np.ascontiguousarray(array).view(np.uint8) & ((1 << dtype.bits) - 1)
    words = np.zeros(codes.size // 8, np.uint64)
    for i in range(8):
        words |= codes[i::8].astype(np.uint64) << np.uint64(i * dtype.bits)
    return words.astype("<u8").view(np.uint8).reshape(-1, 8)[:, : dtype.bits].tobytes()


def unpacked(data: bytearray, type: TensorType) -> Array:
    """The array that :func:`packed` made ``data`` of."""
    dtype, shape = type.dtype, tuple(map(int, type.shape))
    raw = np.frombuffer(data, np.uint8)
    if dtype.bits >= 8:
        return raw.view(dtype.np).reshape(shape)
    bits, count = dtype.bits, int(type.elements)
    codes = np.empty(raw.size // bits * 8, np.uint8)
    step = _CODES // 8
    for i in range(0, raw.size // bits, step):
        block = raw[i * bits : (i + step) * bits].reshape(-1, bits)
        words = np.zeros((len(block), 8), np.uint8)
        words[:, :bits] = block
        wide = words.view("<u8")[:, 0]
        for j in range(8):
            part = (wide >> np.uint64(j * bits)).astype(np.uint8) & np.uint8((1 << bits) - 1)
            codes[8 * i + j : 8 * (i + len(block)) : 8] = part
    if dtype.is_int and not dtype.value.startswith("u"):
        sign = np.uint8(1 << (bits - 1))
        codes = (codes ^ sign) - sign  # the top bit fills the rest of the byte
    return codes[:count].view(dtype.np).reshape(shape)
