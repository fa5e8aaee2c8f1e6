"""-1, 0 and 1 times a scale, in two bits (BitNet b1.58, arXiv:2402.17764)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilewright.ir import DType
from tilewright.passes.formats.base import Array, Params, check_group, inverse
from tilewright.passes.formats.scaled import Scaled


@dataclass(frozen=True)
class Ternary(Scaled):
    """The scale is the mean magnitude of a row, or of a group (the paper has one a weight).

    ``shrink`` multiplies it; above 1 it fits weights better that were not trained to be ternary.
    """

    group: int = 0
    options: ClassVar = {"group": "0 (a row), or what divides K"}

    def __post_init__(self) -> None:
        check_group(self.group)

    @property
    def codes(self) -> DType:
        return DType.i2

    def fit(
        self, w: Array, shrink: float | Array = 1.0, importance: Array | None = None, shared: Params | None = None
    ) -> Params:
        return {"scale": self.stored(np.abs(w).mean(-1, dtype=np.float32) * np.asarray(shrink, np.float32))}

    def encode(self, w: Array, params: Params) -> Array:
        codes = w * inverse(params["scale"])
        np.rint(codes, out=codes)
        return np.clip(codes, -1, 1, out=codes).astype(np.int8)
