"""Whether a kernel's result is what it should be.

Two things are asked of every result: its largest error relative to its largest magnitude, which finds a single wrong
element, and its mean square error, which finds a small thing wrong everywhere (a product that lacks one of two thousand
terms). The allowance is that of the narrowest floats the kernel works in, since kernels keep more digits between fused
operations than the reference. Integers are equal, but for codes of quantized activations and of caches: one that lies
between two may be rounded to either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from tilewright.runtime.coded import CodedRows

Array = np.ndarray[Any, Any]

_LARGEST = {"f64": 1e-9, "f32": 1e-4, "f16": 4e-3, "bf16": 3e-2, "i8": 0.15}
_SQUARE = {"f64": 1e-10, "f32": 2e-5, "f16": 2e-3, "bf16": 1e-2, "i8": 0.05}
_ROUNDED_OTHERWISE = {"f64": 0.001, "f32": 0.01, "f16": 0.1, "bf16": 0.5, "i8": 0.5}  # share of codes
NARROW = tuple(_LARGEST)
"""What a kernel may work in: floats, or products of both factors rounded to 8 bits."""
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Expected:
    """A result as it should be, in the memory layout in which the kernel leaves it."""

    array: Array
    wide: Array
    top: float
    square: float
    narrow: str
    codes: bool
    shape: tuple[int, ...]
    features: Array | None = None
    """Places along the last axis where the result is known; None is everywhere."""
    coded: CodedRows | None = None
    """What the bytes of a cache of codes are."""

    @classmethod
    def of(cls, array: Array, narrow: str, codes: bool = False, coded: CodedRows | None = None) -> Expected:
        wide = array.astype(np.float64 if array.dtype == np.float64 else np.float32)
        known = wide[np.isfinite(wide)]
        top = float(np.abs(known).max(initial=0.0))
        square = float(np.sqrt(np.mean(np.square(known, dtype=np.float64)))) if known.size else 0.0
        return cls(array, wide, top, square, narrow, codes, array.shape, coded=coded)

    def complaint(self, got: Array) -> str | None:
        """What is wrong with ``got``, or None."""
        if self.features is not None:
            if not is_finite(got):
                return "is not written with numbers everywhere"
            got = np.take(got, self.features, -1)
        if got.tobytes() == self.array.tobytes():
            return None
        if self.coded is not None:
            return self._parts(self.coded, got)
        if self.array.dtype.kind in "iub":
            return self._integers(got)
        other = got.astype(self.wide.dtype)
        known = np.isfinite(self.wide)
        if not known.all():
            if not np.array_equal(other[~known], self.wide[~known], equal_nan=True):
                return "is finite, or infinite, or NaN elsewhere than it should be"
            other, want = other[known], self.wide[known]
        else:
            want = self.wide
        with np.errstate(all="ignore"):
            error = np.abs(other - want)
            largest = float(error.max(initial=0.0)) / (self.top or 1.0)
            square = float(np.sqrt(np.mean(np.square(error, dtype=np.float64)))) / (self.square or 1.0)
        if not largest <= _LARGEST[self.narrow]:
            return f"differs by {largest:.3g} of the largest magnitude, allowed {_LARGEST[self.narrow]:g}"
        if not square <= _SQUARE[self.narrow]:
            return f"differs by {square:.3g} in the mean square, allowed {_SQUARE[self.narrow]:g}"
        return None

    def _parts(self, coded: CodedRows, got: Array) -> str | None:
        """Of codes, and of their scales and zeros, each by its own rule."""
        for what, want, mine in zip(("codes", "scales"), coded.parts(self.array), coded.parts(got)):
            if reason := Expected.of(want, self.narrow, codes=what == "codes").complaint(mine):
                return f"has {what} of which {reason}" if what == "codes" else f"has {what} that are wrong: {reason}"
        return None

    def _integers(self, got: Array) -> str | None:
        away = np.abs(got.astype(np.int64) - self.array.astype(np.int64))
        share = float(np.mean(away > 0))
        if self.codes and away.max() <= 1 and share <= _ROUNDED_OTHERWISE[self.narrow]:
            return None
        return f"{100 * share:.3g} % of the integers differ, by up to {away.max()}"


def is_finite(array: Array) -> bool:
    """Whether all of a result was written with numbers."""
    if array.dtype.kind in "iub":
        return True
    return bool(np.isfinite(array.astype(np.float32) if array.dtype == _BFLOAT16 else array).all())
