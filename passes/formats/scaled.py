"""Formats that are codes times a scale: what they share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tilewright.ir import DType, Op, TensorType, Value, Weight, ops
from tilewright.passes.formats.base import Array, Format, Params, Size


@dataclass(frozen=True)
class Scaled(Format):
    """``code * scale``: a subclass says which types these have, and how to fit and to encode."""

    @property
    @abstractmethod
    def codes(self) -> DType:
        """Element type of the codes."""

    @property
    def scale(self) -> DType:
        """Element type of the scales: of groups f16, of rows f32."""
        return DType.f16 if self.group else DType.f32

    @property
    def size(self) -> Size:
        return Size(self.codes.bits, self.scale.bits)

    def parts(self, name: str, n: int, k: int) -> dict[str, TensorType]:
        return {
            f"{name}.{self.codes.value}": TensorType((n, k), self.codes),
            f"{name}.scale": TensorType((n, self.groups(k)), self.scale),
        }

    def stored(self, scale: Array) -> Array:
        """Scales as they are stored; 1 for a group of zeros."""
        with np.errstate(over="ignore"):  # infinity is refused by name where the weight is known
            return np.where(scale == 0, 1, scale).astype(self.scale.np)

    def decode(self, codes: Array, params: Params) -> Array:
        return codes.astype(np.float32) * params["scale"].astype(np.float32)[..., None]

    def store(self, codes: Array, params: Params) -> tuple[Array, ...]:
        return codes.view(self.codes.np), params["scale"]

    def value(self, add: Callable[[Op], Value], parts: Sequence[Weight], dtype: DType) -> Value:
        return add(ops.Dequantize(*parts, dtype=dtype))
