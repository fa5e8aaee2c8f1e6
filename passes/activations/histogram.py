"""Quantiles of magnitudes in little memory: f32 counted by their upper bits."""

from __future__ import annotations

import numpy as np

from tilewright.passes.calibration.data import Array

_SHIFT = 15
_BINS = 1 << (31 - _SHIFT)
_FINITE = 0x7F800000 >> _SHIFT
"""The first bin that holds what is not finite."""


class Histogram:
    """Counts of magnitudes; a bin is 1/256 of a power of two, so bits that follow each other are magnitudes that do."""

    def __init__(self) -> None:
        self.counts = np.zeros(_BINS)

    @property
    def is_finite(self) -> bool:
        """Whether no magnitude was NaN or infinity."""
        return not self.counts[_FINITE:].any()

    def add(self, magnitudes: Array, weight: float = 1.0) -> None:
        """Count ``magnitudes``, f32 at or above zero, each as ``weight``."""
        bins = np.ascontiguousarray(magnitudes, np.float32).reshape(-1).view(np.uint32) >> np.uint32(_SHIFT)
        self.counts += np.bincount(bins, minlength=_BINS) * weight

    def quantile(self, share: float) -> float:
        """A number that ``share`` of all magnitudes lie below, evenly between the ends of its bin."""
        below = np.cumsum(self.counts)
        wanted = share * below[-1]
        found = min(int(np.searchsorted(below, wanted)), _FINITE - 1)
        low, high = (float(np.uint32(i << _SHIFT).view(np.float32)) for i in (found, found + 1))
        part = float(1 - (below[found] - wanted) / max(self.counts[found], 1e-300))
        return low + min(max(part, 0.0), 1.0) * (high - low)
