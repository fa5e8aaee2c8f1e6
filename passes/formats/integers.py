"""Integers of 8, 4, 3 or 2 bits times a scale: ``(code - zero) * scale``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilewright.ir import DType, TensorType
from tilewright.passes.formats.base import Array, Params, Size, check_group, inverse
from tilewright.passes.formats.scaled import Scaled


@dataclass(frozen=True)
class Integers(Scaled):
    """Codes of ``bits`` bits with a scale for each ``group`` neighbours along K (0: a row, which is an output channel).

    With ``zero`` codes are unsigned and a group has a zero point too. Symmetric codes of 8 bits are -127 to 127; of fewer
    bits the number of largest magnitude gets the lowest code, whose magnitude no other code reaches.
    """

    bits: int
    group: int = 0
    zero: bool = False
    options: ClassVar = {"group": "0 (a row), or what divides K", "zero": "`false`, `true`"}

    def __post_init__(self) -> None:
        check_group(self.group)

    @property
    def codes(self) -> DType:
        return DType(f"{'u' if self.zero else 'i'}{self.bits}")

    @property
    def size(self) -> Size:
        return Size(self.bits, self.scale.bits + 8 * self.zero)

    def parts(self, name: str, n: int, k: int) -> dict[str, TensorType]:
        zero = {f"{name}.zero": TensorType((n, self.groups(k)), DType.u8)}
        return super().parts(name, n, k) | (zero if self.zero else {})

    def fit(
        self, w: Array, shrink: float | Array = 1.0, importance: Array | None = None, shared: Params | None = None
    ) -> Params:
        narrow = np.asarray(shrink, np.float32)
        low, high = w.min(-1) * narrow, w.max(-1) * narrow
        if self.zero:
            return self._unsigned(np.minimum(low, 0), np.maximum(high, 0))
        if self.bits == 8:
            return {"scale": self.stored(np.maximum(-low, high) / np.float32(127))}
        return {"scale": self.stored(np.where(-low >= high, low, high) / -np.float32(1 << (self.bits - 1)))}

    def _unsigned(self, low: Array, high: Array) -> Params:
        """From the least to the largest number, with 0 among the codes."""
        levels = np.float32(2**self.bits - 1)
        scale = self.stored((high - low) / levels)
        zero = np.clip(np.rint(-low * inverse(scale)[..., 0]), 0, levels)
        return {"scale": scale, "zero": zero.astype(np.uint8)}

    def encode(self, w: Array, params: Params) -> Array:
        codes = w * inverse(params["scale"])
        np.rint(codes, out=codes)
        if self.zero:
            codes += params["zero"][..., None]
            return np.clip(codes, 0, 2**self.bits - 1, out=codes).astype(np.uint8)
        top = (1 << (self.bits - 1)) - 1
        return np.clip(codes, -127 if self.bits == 8 else -top - 1, top, out=codes).astype(np.int8)

    def decode(self, codes: Array, params: Params) -> Array:
        wide = codes.astype(np.float32)
        return super().decode(wide - params["zero"].astype(np.float32)[..., None] if self.zero else wide, params)

    def store(self, codes: Array, params: Params) -> tuple[Array, ...]:
        return (*super().store(codes, params), *([params["zero"]] if self.zero else []))
