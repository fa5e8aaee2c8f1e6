"""Element types."""

from __future__ import annotations

import builtins
import enum
from typing import Any

import ml_dtypes
import numpy as np


class DType(enum.Enum):
    """Element type of a tensor; the value is its name in the text form."""

    f64 = "f64"
    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    i64 = "i64"
    i32 = "i32"
    i16 = "i16"
    i8 = "i8"
    u8 = "u8"
    i4 = "i4"
    u4 = "u4"
    i3 = "i3"
    u3 = "u3"
    i2 = "i2"
    u2 = "u2"
    f8e4m3 = "f8e4m3"
    f8e5m2 = "f8e5m2"
    f4e2m1 = "f4e2m1"
    f8e8m0 = "f8e8m0"
    bool = "bool"

    @property
    def np(self) -> np.dtype[Any]:
        """The NumPy type that holds one element: through ml_dtypes what NumPy lacks, i3 and u3 as i8 and u8."""
        return _NUMPY[self]

    @property
    def size(self) -> int:
        """Bytes an element takes in a NumPy array."""
        return self.np.itemsize

    @property
    def bits(self) -> int:
        """Bits an element takes where it is stored: two of i4, u4 and f4e2m1 share a byte, four of i2 and u2."""
        return _NARROW.get(self, 8 * self.size)

    @property
    def is_float(self) -> builtins.bool:
        return self in (DType.f64, DType.f32, DType.f16, DType.bf16)

    @property
    def is_int(self) -> builtins.bool:
        return not (self.is_float or self.is_narrow_float) and self is not DType.bool

    @property
    def is_narrow_float(self) -> builtins.bool:
        """Floats of 8 bits or fewer: codes and scales of quantized tensors, which nothing else computes with."""
        return self in (DType.f8e4m3, DType.f8e5m2, DType.f4e2m1, DType.f8e8m0)

    @classmethod
    def of(cls, dtype: Any) -> DType:
        """The DType of a NumPy type; raises KeyError with the list of those that exist."""
        found = _FROM_NUMPY.get(np.dtype(dtype))
        if found is None:
            raise KeyError(f"no element type for numpy {np.dtype(dtype)}; there are {', '.join(d.value for d in cls)}")
        return found


_NUMPY: dict[DType, np.dtype[Any]] = {
    DType.f64: np.dtype(np.float64),
    DType.f32: np.dtype(np.float32),
    DType.f16: np.dtype(np.float16),
    DType.bf16: np.dtype(ml_dtypes.bfloat16),
    DType.i64: np.dtype(np.int64),
    DType.i32: np.dtype(np.int32),
    DType.i16: np.dtype(np.int16),
    DType.i8: np.dtype(np.int8),
    DType.u8: np.dtype(np.uint8),
    DType.i4: np.dtype(ml_dtypes.int4),
    DType.u4: np.dtype(ml_dtypes.uint4),
    DType.i3: np.dtype(np.int8),
    DType.u3: np.dtype(np.uint8),
    DType.i2: np.dtype(ml_dtypes.int2),
    DType.u2: np.dtype(ml_dtypes.uint2),
    DType.f8e4m3: np.dtype(ml_dtypes.float8_e4m3fn),
    DType.f8e5m2: np.dtype(ml_dtypes.float8_e5m2),
    DType.f4e2m1: np.dtype(ml_dtypes.float4_e2m1fn),
    DType.f8e8m0: np.dtype(ml_dtypes.float8_e8m0fnu),
    DType.bool: np.dtype(np.bool_),
}
_NARROW = {DType.i4: 4, DType.u4: 4, DType.f4e2m1: 4, DType.i3: 3, DType.u3: 3, DType.i2: 2, DType.u2: 2}
_FROM_NUMPY = {v: k for k, v in reversed(_NUMPY.items())}  # of several the first: i8, not i3
