"""Four bits that expand to eight, which a scale a row makes numbers: products stay in integers (QoQ, arXiv:2405.04532)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilewright.ir import DType, Op, PassError, TensorType, Value, Weight, ops
from tilewright.passes.formats.base import Array, Format, Params, Size, check_group

_REACH = np.float32(119)  # of i8: rounding to a step of at most 16 then stays in -127..127


@dataclass(frozen=True)
class TwoLevel(Format):
    """``(code - zero) * step`` is an i8, which the row's f32 ``scale`` multiplies; steps and zero points are u8 a group.

    Whole numbers are coarse steps: of the two around the wanted one a group gets that with the smaller squared error. No
    code that ``encode`` gives expands beyond i8. Two levels are also in Dual Grained Quantization (arXiv:2310.04836).
    """

    group: int = 128
    options: ClassVar = {"group": "what divides K"}

    def __post_init__(self) -> None:
        check_group(self.group)
        if not self.group:
            raise PassError("two levels of scales are for groups: choose one of 1 or more elements, such as group=128")

    @property
    def size(self) -> Size:
        return Size(4, 16, row=32)

    def parts(self, name: str, n: int, k: int) -> dict[str, TensorType]:
        grid = (n, self.groups(k))
        return {
            f"{name}.u4": TensorType((n, k), DType.u4),
            f"{name}.step": TensorType(grid, DType.u8),
            f"{name}.zero": TensorType(grid, DType.u8),
            f"{name}.scale": TensorType((n, 1), DType.f32),
        }

    def shared(self, w: Array, importance: Array | None = None) -> Params:
        most = np.abs(w).max((1, 2))[:, None] / _REACH
        return {"scale": np.where(most == 0, 1, most).astype(np.float32)}

    def fit(
        self, w: Array, shrink: float | Array = 1.0, importance: Array | None = None, shared: Params | None = None
    ) -> Params:
        scale = (shared or self.shared(w))["scale"]
        narrow = np.asarray(shrink, np.float32) / scale
        low, high = (np.clip(x * narrow, -_REACH, _REACH) for x in (np.minimum(w.min(-1), 0), np.maximum(w.max(-1), 0)))
        step = (high - low) / np.float32(15)
        fine, coarse = (self._grid(low, np.clip(r(step), 1, 16), scale) for r in (np.floor, np.ceil))
        better = self._error(w, coarse, importance) < self._error(w, fine, importance)
        return {"scale": scale, **{key: np.where(better, coarse[key], fine[key]) for key in ("step", "zero")}}

    def _grid(self, low: Array, step: Array, scale: Array) -> Params:
        zero = np.clip(np.rint(-low / step), 0, 15)
        return {"scale": scale, "step": step.astype(np.uint8), "zero": zero.astype(np.uint8)}

    def _error(self, w: Array, params: Params, importance: Array | None) -> Array:
        error: Array = np.square(self.decode(self.encode(w, params), params) - w)
        total: Array = (error if importance is None else error * importance).sum(-1)
        return total

    def encode(self, w: Array, params: Params) -> Array:
        step, zero = (params[key].astype(np.float32)[..., None] for key in ("step", "zero"))
        codes = w * (np.float32(1) / (step * params["scale"][..., None]))
        np.rint(codes, out=codes)
        np.clip(codes, np.ceil(-128 / step), np.floor(127 / step), out=codes)
        codes += zero
        np.clip(codes, 0, 15, out=codes)
        return np.asarray(codes, np.uint8)

    def decode(self, codes: Array, params: Params) -> Array:
        step, zero = (params[key].astype(np.float32)[..., None] for key in ("step", "zero"))
        wide: Array = np.clip((codes.astype(np.float32) - zero) * step, -128, 127)
        return np.asarray(wide * params["scale"][..., None])

    def store(self, codes: Array, params: Params) -> tuple[Array, ...]:
        return codes.view(DType.u4.np), params["step"], params["zero"], np.ascontiguousarray(params["scale"][:, :1])

    def value(self, add: Callable[[Op], Value], parts: Sequence[Weight], dtype: DType) -> Value:
        codes, step, zero, scale = parts
        return add(ops.Dequantize(add(ops.Expand(codes, step, zero)), scale, dtype=dtype))
