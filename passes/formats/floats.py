"""Floats of eight bits times a scale, and the four-bit floats of the OCP Microscaling Formats 1.0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np

from tilewright.ir import DType
from tilewright.passes.formats.base import Array, Params, check_group, inverse
from tilewright.passes.formats.scaled import Scaled


@dataclass(frozen=True)
class Floats(Scaled):
    """``codes`` f8e4m3 or f8e5m2 (arXiv:2209.05433): the number of largest magnitude gets the largest finite code.

    Scales are f32, of groups too: such small numbers would lose digits in f16.
    """

    codes: DType = DType.f8e4m3
    group: int = 0
    options: ClassVar = {"group": "0 (a row), or what divides K"}

    def __post_init__(self) -> None:
        check_group(self.group)

    @property
    def scale(self) -> DType:
        return DType.f32

    @property
    def most(self) -> np.float32:
        """The largest finite number that a code is."""
        return np.float32(ml_dtypes.finfo(self.codes.np).max)

    def fit(
        self, w: Array, shrink: float | Array = 1.0, importance: Array | None = None, shared: Params | None = None
    ) -> Params:
        return {"scale": self.stored(np.abs(w).max(-1) * np.asarray(shrink, np.float32) / self.most)}

    def encode(self, w: Array, params: Params) -> Array:
        codes = w * inverse(params["scale"])
        return np.clip(codes, -self.most, self.most, out=codes).astype(self.codes.np)


@dataclass(frozen=True)
class Microscaling(Scaled):
    """MXFP4: floats of four bits (f4e2m1) and a power of two (f8e8m0) for each 32.

    The power is the standard's: that of the largest magnitude, less the 2 of the largest code, which is 6.
    """

    @property
    def group(self) -> int:
        return 32

    @property
    def codes(self) -> DType:
        return DType.f4e2m1

    @property
    def scale(self) -> DType:
        return DType.f8e8m0

    def fit(
        self, w: Array, shrink: float | Array = 1.0, importance: Array | None = None, shared: Params | None = None
    ) -> Params:
        most = np.abs(w).max(-1) * np.asarray(shrink, np.float32)
        exponent = np.frexp(most)[1] - 1 - 2  # frexp's fraction is below 1, so its exponent is one more than log2's
        return {"scale": np.where(most == 0, 127, np.clip(exponent + 127, 0, 254)).astype(np.uint8).view(self.scale.np)}

    def encode(self, w: Array, params: Params) -> Array:
        codes = w * inverse(params["scale"])
        return np.clip(codes, -6, 6, out=codes).astype(self.codes.np)
