"""Integers of 8, 4, 3 or 2 bits times a scale: ``(code - zero) * scale``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilewright.ir import DType, Op, PassError, TensorType, Value, Weight, ops
from tilewright.passes.formats.base import Array, Format, Params, Size, inverse


@dataclass(frozen=True)
class Integers(Format):
    """Codes of ``bits`` bits with a scale for each ``group`` neighbours along K (0: a row, which is an output channel).

    With ``zero`` codes are unsigned and a group has a zero point too. Scales of groups are f16, of channels f32.
    Symmetric codes of 8 bits are -127 to 127; of fewer bits the number of largest magnitude gets the lowest code, whose
    magnitude no other code reaches.
    """

    bits: int
    group: int = 0
    zero: bool = False
    options: ClassVar = {"group": "0 (a row), or what divides K", "zero": "`false`, `true`"}
    layout: ClassVar = "codes; scale f16 a group (f32 a row); with `zero` a u8 a group"

    def __post_init__(self) -> None:
        if self.group < 0:
            raise PassError(f"a group has 1 or more elements, or is 0 for all of a row; got {self.group}")

    @property
    def codes(self) -> DType:
        return DType(f"{'u' if self.zero else 'i'}{self.bits}")

    @property
    def scale(self) -> DType:
        return DType.f16 if self.group else DType.f32

    @property
    def size(self) -> Size:
        return Size(self.bits, self.scale.bits + 8 * self.zero)

    def parts(self, name: str, n: int, k: int) -> dict[str, TensorType]:
        grid = (n, self.groups(k))
        found = {
            f"{name}.{self.codes.value}": TensorType((n, k), self.codes),
            f"{name}.scale": TensorType(grid, self.scale),
        }
        return found | ({f"{name}.zero": TensorType(grid, DType.u8)} if self.zero else {})

    def fit(
        self, w: Array, shrink: float | Array = 1.0, importance: Array | None = None, shared: Params | None = None
    ) -> Params:
        narrow = np.asarray(shrink, np.float32)
        low, high = w.min(-1) * narrow, w.max(-1) * narrow
        return self._unsigned(low, high) if self.zero else {"scale": self._stored(self._symmetric(low, high))}

    def _symmetric(self, low: Array, high: Array) -> Array:
        if self.bits == 8:
            extreme, most = np.maximum(-low, high), np.float32(127)
        else:
            extreme, most = np.where(-low >= high, low, high), -np.float32(1 << (self.bits - 1))
        return np.where(extreme == 0, 1, extreme / most)

    def _unsigned(self, low: Array, high: Array) -> Params:
        """From the least to the largest number, with 0 among the codes."""
        levels = np.float32(2**self.bits - 1)
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scale = self._stored(np.where(high == low, 1, (high - low) / levels))
        zero = np.clip(np.rint(-low * inverse(scale)[..., 0]), 0, levels)
        return {"scale": scale, "zero": zero.astype(np.uint8)}

    def _stored(self, scale: Array) -> Array:
        with np.errstate(over="ignore"):  # infinity is refused by name where the weight is known
            return scale.astype(self.scale.np)

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
        wide = wide - params["zero"][..., None].astype(np.float32) if self.zero else wide
        return wide * params["scale"][..., None].astype(np.float32)

    def store(self, codes: Array, params: Params) -> tuple[Array, ...]:
        return (codes.view(self.codes.np), params["scale"], *([params["zero"]] if self.zero else []))

    def value(self, add: Callable[[Op], Value], parts: Sequence[Weight], dtype: DType) -> Value:
        return add(ops.Dequantize(*parts, dtype=dtype))
