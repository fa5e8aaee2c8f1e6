"""Keys and values of a cache as small integers: what is stored, and what it decodes to. Shared by interpreter and tests.

Numbers that share a scale lie along one axis. i8 is symmetric: ``code * scale``, scale the largest magnitude over 127. i4
and i2 are asymmetric: ``code * scale + zero``, zero the least number, scale the range over 15 or 3 (KIVI,
arXiv:2402.02750). Scales and zeros are rounded to the element type that they are stored in first, codes are made with what
they are then: nearest, ties to even. All is computed in f32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.ir.types import DType, KVType

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Coded:
    """Codes (i8, or u8 below 16 or 4), and scales and zeros with 1 on the axis of those that share one."""

    codes: Array
    scale: Array
    zero: Array | None

    def decode(self) -> Array:
        """The numbers that the codes stand for, f32."""
        numbers = self.codes.astype(np.float32) * self.scale.astype(np.float32)
        return numbers if self.zero is None else numbers + self.zero.astype(np.float32)


def encode(numbers: Array, dtype: DType, axis: int, scales: DType = DType.f16) -> Coded:
    """``numbers`` as codes of ``dtype`` (i8, i4, i2); those along ``axis`` share a scale of type ``scales``."""
    x = numbers.astype(np.float32)
    if dtype is DType.i8:
        scale = _stored(np.abs(x).max(axis, keepdims=True) / np.float32(127), scales)
        codes = np.rint(x / scale.astype(np.float32))
        return Coded(np.clip(codes, -127, 127).astype(np.int8), scale, None)
    top = (1 << dtype.bits) - 1
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    zero, scale = _held(low, scales), _stored((high - low) / np.float32(top), scales)
    codes = np.rint((x - zero.astype(np.float32)) / scale.astype(np.float32))
    return Coded(np.clip(codes, 0, top).astype(np.uint8), scale, zero)


def _held(numbers: Array, dtype: DType) -> Array:
    """Rounded to ``dtype``, at most its largest number."""
    most = np.float32(np.finfo(dtype.np).max)
    return np.clip(numbers, -most, most).astype(dtype.np)


def _stored(scale: Array, dtype: DType) -> Array:
    """A scale as it is stored; 1 where all numbers are alike."""
    held = _held(scale, dtype)
    return np.where(held > 0, held, np.ones((), dtype.np))


def rounded(kind: KVType, keys: Array, values: Array) -> tuple[Array, Array]:
    """What slots of ``kind`` decode to: keys ``[..., T, H, D]``, values ``[..., T, H, Dv]``, T whole groups if need be."""
    if not kind.is_coded:
        return keys.astype(kind.dtype.np), values.astype(kind.dtype.np)
    decoded = encode(values, kind.dtype, -1, kind.scales).decode()
    if kind.keys == "token":
        return encode(keys, kind.dtype, -1, kind.scales).decode(), decoded
    groups = keys.reshape(*keys.shape[:-3], -1, kind.group, *keys.shape[-2:])
    return encode(groups, kind.dtype, -3, kind.scales).decode().reshape(keys.shape), decoded


def appended(kind: KVType, keys: Array, values: Array) -> tuple[Array, Array]:
    """What new tokens decode to when they come: in ``full`` where some tokens stay so, else as :func:`rounded`."""
    if not kind.keeps_recent:
        return rounded(kind, keys, values)
    return tuple(x.astype(kind.full.np).astype(np.float32) for x in (keys, values))  # type: ignore[return-value]
