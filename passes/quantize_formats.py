"""Integer formats of weights: how many bits, how many neighbours share a scale, and how numbers become codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.ir import DType, TensorType

_ROWS_AT_ONCE = 1 << 22  # elements that are widened to f32 at a time


@dataclass(frozen=True)
class Format:
    """Codes of ``bits`` bits with a scale for each ``group`` neighbours along K (0: a row, which is an output channel).

    With ``zero`` codes are unsigned and a group has a zero point too. Scales of groups are f16, of channels f32.
    """

    bits: int
    group: int = 0
    zero: bool = False

    @property
    def codes(self) -> DType:
        return {(8, False): DType.i8, (8, True): DType.u8, (4, False): DType.i4, (4, True): DType.u4}[self.bits, self.zero]

    @property
    def scale(self) -> DType:
        return DType.f16 if self.group else DType.f32

    def unfit(self, k: int) -> str | None:
        """Why rows of ``k`` elements cannot have this format."""
        return f"groups of {self.group} do not divide its rows of {k}" if self.group and k % self.group else None

    def parts(self, name: str, n: int, k: int) -> dict[str, TensorType]:
        """Names and types of what stands for the weight ``name`` ``[n, k]``: codes, scale and maybe zero."""
        grid = (n, k // self.group if self.group else 1)
        found = {
            f"{name}.{self.codes.value}": TensorType((n, k), self.codes),
            f"{name}.scale": TensorType(grid, self.scale),
        }
        return found | ({f"{name}.zero": TensorType(grid, DType.u8)} if self.zero else {})

    def encode(self, weight: Any) -> Sequence[Any]:
        """Codes ``[N, K]``, scale and maybe zero ``[N, G]`` of ``weight`` ``[N, K]``, each code the nearest there is."""
        n, k = weight.shape
        groups = k // self.group if self.group else 1
        codes = np.empty((n, groups, k // groups), np.int8 if not self.zero else np.uint8)
        scale = np.empty((n, groups), self.scale.np)
        zero = np.empty((n, groups), np.uint8)
        step = max(1, _ROWS_AT_ONCE // k)
        for start in range(0, n, step):
            rows = slice(start, start + step)
            block = weight[rows].astype(np.float32).reshape(-1, groups, k // groups)
            fill = self._unsigned if self.zero else self._symmetric
            fill(block, codes[rows], scale[rows], zero[rows])
        whole = codes.reshape(n, k).view(self.codes.np)
        return (whole, scale, zero) if self.zero else (whole, scale)

    def _symmetric(self, block: Any, codes: Any, scale: Any, zero: Any) -> None:
        """The number of largest magnitude gets the lowest code, whose magnitude no other code reaches."""
        low, high = block.min(-1), block.max(-1)
        if self.bits == 8:
            extreme, most = np.maximum(-low, high), np.float32(127)
        else:
            extreme, most = np.where(-low >= high, low, high), np.float32(-8)
        scale[:] = np.where(extreme == 0, 1, extreme / most)
        block *= _inverse(scale)
        np.rint(block, out=block)
        np.clip(block, -127 if self.bits == 8 else -8, 127 if self.bits == 8 else 7, out=block)
        codes[:] = block

    def _unsigned(self, block: Any, codes: Any, scale: Any, zero: Any) -> None:
        """From the least to the largest number, with 0 among the codes."""
        levels = np.float32(2**self.bits - 1)
        low, high = np.minimum(block.min(-1), 0), np.maximum(block.max(-1), 0)
        scale[:] = np.where(high == low, 1, (high - low) / levels)
        inverse = _inverse(scale)
        zero[:] = np.clip(np.rint(-low * inverse[..., 0]), 0, levels)
        block *= inverse
        np.rint(block, out=block)
        block += zero[..., None]
        np.clip(block, 0, levels, out=block)
        codes[:] = block


def _inverse(scale: Any) -> Any:
    """1 / scale for each element of a group; 0 where the scale was too small to be stored."""
    wide = scale.astype(np.float32)[..., None]
    return np.divide(1, wide, out=np.zeros_like(wide), where=wide != 0)
