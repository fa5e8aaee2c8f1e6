"""Keys and values of a cache as small integers: what is stored, and what it decodes to. Shared by interpreter and tests.

Numbers that share a scale lie along one axis. i8 is symmetric: ``code * scale``, scale the largest magnitude over 127. i4
and i2 are asymmetric: ``code * scale + zero``, zero the least number, scale the range over 15 or 3 (KIVI,
arXiv:2402.02750). Scales and zeros are rounded to the element type that they are stored in first, codes are made with what
they are then: nearest, ties to even. All is computed in f32.

Part of the error may be kept beside (GEAR, arXiv:2403.05527). Of the numbers that share a scale the ``outliers`` greatest
and as many of the least have no say in it. What codes leave of the others, a matrix ``[tokens, size]``, has factors of
``rank`` columns; their product is added to all numbers, and to outliers what they still lack. Both are rounded to the type
of scales.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tilewright.ir.ops.kv_residual import extremes, factors, marked
from tilewright.ir.types import DType, KVType

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Coded:
    """Codes (i8, or u8 below 16 or 4), and scales and zeros with 1 on the axis of those that share one.

    ``factors`` are ``[..., tokens, rank]`` and ``[..., size, rank]``. ``outliers`` are places along ``axis``, those of the
    greatest first, and what the numbers there lack.
    """

    codes: Array
    scale: Array
    zero: Array | None
    axis: int = -1
    factors: tuple[Array, Array] | None = None
    outliers: tuple[Array, Array] | None = None

    def decode(self) -> Array:
        """The numbers that all of it stands for, f32."""
        numbers = self.codes.astype(np.float32) * self.scale.astype(np.float32)
        if self.zero is not None:
            numbers = numbers + self.zero.astype(np.float32)
        if self.factors is not None:
            a, b = (x.astype(np.float32) for x in self.factors)
            numbers = numbers + a @ np.swapaxes(b, -1, -2)
        if self.outliers is not None:
            places, lack = self.outliers
            whole = np.take_along_axis(numbers, places, self.axis) + lack.astype(np.float32)
            np.put_along_axis(numbers, places, whole, self.axis)
        return numbers


def encode(numbers: Array, dtype: DType, axis: int, scales: DType = DType.f16, rank: int = 0, outliers: int = 0) -> Coded:
    """``numbers`` as codes of ``dtype`` (i8, i4, i2); those along ``axis`` share a scale of type ``scales``.

    With ``rank`` or ``outliers`` numbers are ``[..., tokens, size]``.
    """
    x = numbers.astype(np.float32)
    if not rank and not outliers:
        return _codes(x, dtype, axis, scales, x)
    places = extremes(x, axis, outliers)
    taken = marked(places, axis, x.shape)
    some = np.take_along_axis(x, extremes(x, axis, outliers + 1), axis)
    coded = _codes(x, dtype, axis, scales, np.take(some, [outliers, outliers + 1], axis))
    if rank:
        found = factors(np.where(taken, np.float32(0), x - coded.decode()), rank)
        coded = replace(coded, factors=(_held(found[0], scales), _held(found[1], scales)))
    lack = np.take_along_axis(x - coded.decode(), places, axis)
    return replace(coded, outliers=(places, _held(lack, scales))) if outliers else coded


def _codes(x: Array, dtype: DType, axis: int, scales: DType, among: Array) -> Coded:
    """Codes of x under scales that the numbers ``among`` make."""
    if dtype is DType.i8:
        scale = _stored(np.abs(among).max(axis, keepdims=True) / np.float32(127), scales)
        codes = np.rint(x / scale.astype(np.float32))
        return Coded(np.clip(codes, -127, 127).astype(np.int8), scale, None, axis)
    top = (1 << dtype.bits) - 1
    low, high = among.min(axis, keepdims=True), among.max(axis, keepdims=True)
    zero, scale = _held(low, scales), _stored((high - low) / np.float32(top), scales)
    codes = np.rint((x - zero.astype(np.float32)) / scale.astype(np.float32))
    return Coded(np.clip(codes, 0, top).astype(np.uint8), scale, zero, axis)


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
    return _rounded(kind, keys, kind.keys == "channel"), _rounded(kind, values, False)


def _rounded(kind: KVType, numbers: Array, by_channel: bool) -> Array:
    """``numbers [..., T, H, size]``, in groups where something is shared by these."""
    if not by_channel and not kind.has_residual:
        return encode(numbers, kind.dtype, -1, kind.scales).decode()
    groups = numbers.reshape(*numbers.shape[:-3], -1, kind.group, *numbers.shape[-2:]).swapaxes(-3, -2)
    coded = encode(groups, kind.dtype, -2 if by_channel else -1, kind.scales, kind.rank, kind.outliers)
    return coded.decode().swapaxes(-3, -2).reshape(numbers.shape)


def appended(kind: KVType, keys: Array, values: Array) -> tuple[Array, Array]:
    """What new tokens decode to when they come: in ``full`` where some tokens stay so, else as :func:`rounded`."""
    if not kind.keeps_recent:
        return rounded(kind, keys, values)
    return tuple(x.astype(kind.full.np).astype(np.float32) for x in (keys, values))  # type: ignore[return-value]
