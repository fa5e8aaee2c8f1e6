"""Codes that look numbers up: a table fitted to each row, or one table for all and scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilewright.ir import DType, Op, PassError, TensorType, Value, Weight, ops
from tilewright.passes.formats.base import Array, Format, Params, Size, check_group, inverse
from tilewright.passes.formats.kmeans import clusters

NORMAL_FLOATS = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip
"""Quantiles of the normal distribution, with 0 among them (QLoRA, arXiv:2305.14314, appendix E)."""


@dataclass(frozen=True)
class Codebook(Format):
    """A table of ``2^bits`` numbers (f16) a row, which weighted k-means fits (SqueezeLLM, arXiv:2306.07629).

    In rows that have zeros the number nearest to 0 is 0: what was pruned stays so.
    """

    bits: int

    @property
    def group(self) -> int:
        return 0

    @property
    def size(self) -> Size:
        return Size(self.bits, row=16 << self.bits)

    @property
    def codes(self) -> DType:
        return DType(f"u{self.bits}")

    def parts(self, name: str, n: int, k: int) -> dict[str, TensorType]:
        return {
            f"{name}.{self.codes.value}": TensorType((n, k), self.codes),
            f"{name}.table": TensorType((n, 1 << self.bits), DType.f16),
        }

    def shared(self, w: Array, importance: Array | None = None) -> Params:
        return self.fit(w, importance=importance)

    def fit(
        self, w: Array, shrink: float | Array = 1.0, importance: Array | None = None, shared: Params | None = None
    ) -> Params:
        if shared is not None:
            return shared
        narrow = np.asarray(shrink, np.float32)
        rows = np.clip(w, (w.min(-1) * narrow)[..., None], (w.max(-1) * narrow)[..., None]).reshape(len(w), -1)
        with np.errstate(over="ignore"):  # infinity is refused by name where the weight is known
            table = clusters(rows, 1 << self.bits, importance).astype(np.float16)
        zeros = np.flatnonzero((rows == 0).any(1))
        table[zeros, np.abs(table[zeros]).argmin(1)] = 0
        return {"table": table[:, None]}

    def encode(self, w: Array, params: Params) -> Array:
        return nearest(w, params["table"].astype(np.float32))

    def decode(self, codes: Array, params: Params) -> Array:
        return np.take_along_axis(params["table"].astype(np.float32), codes.astype(np.int64), -1)

    def store(self, codes: Array, params: Params) -> tuple[Array, ...]:
        return codes.view(self.codes.np), np.ascontiguousarray(params["table"][:, 0])

    def value(self, add: Callable[[Op], Value], parts: Sequence[Weight], dtype: DType) -> Value:
        return add(ops.Lookup(*parts, dtype=dtype))


@dataclass(frozen=True)
class NormalFloat(Format):
    """NF4: the table is ``NORMAL_FLOATS``, a group's f16 scale its largest magnitude (QLoRA, arXiv:2305.14314)."""

    group: int = 64
    options: ClassVar = {"group": "what divides K"}

    def __post_init__(self) -> None:
        check_group(self.group)
        if not self.group:
            raise PassError("nf4 has a scale a group: choose one of 1 or more elements, such as group=64")

    @property
    def size(self) -> Size:
        return Size(4, 16, once=32 * len(NORMAL_FLOATS))

    def parts(self, name: str, n: int, k: int) -> dict[str, TensorType]:
        return {
            f"{name}.u4": TensorType((n, k), DType.u4),
            f"{name}.table": TensorType((1, len(NORMAL_FLOATS)), DType.f32),
            f"{name}.scale": TensorType((n, self.groups(k)), DType.f16),
        }

    def fit(
        self, w: Array, shrink: float | Array = 1.0, importance: Array | None = None, shared: Params | None = None
    ) -> Params:
        most = np.abs(w).max(-1) * np.asarray(shrink, np.float32)
        with np.errstate(over="ignore"):  # infinity is refused by name where the weight is known
            return {"scale": np.where(most == 0, 1, most).astype(np.float16)}

    def encode(self, w: Array, params: Params) -> Array:
        return nearest(w * inverse(params["scale"]), NORMAL_FLOATS)

    def decode(self, codes: Array, params: Params) -> Array:
        return NORMAL_FLOATS[codes.astype(np.int64)] * params["scale"].astype(np.float32)[..., None]

    def store(self, codes: Array, params: Params) -> tuple[Array, ...]:
        return codes.view(DType.u4.np), NORMAL_FLOATS[None], params["scale"]

    def value(self, add: Callable[[Op], Value], parts: Sequence[Weight], dtype: DType) -> Value:
        return add(ops.Lookup(*parts, dtype=dtype))


def nearest(w: Array, table: Array) -> Array:
    """u8 indices of the numbers in the ascending ``table`` ``[..., C]`` that are nearest to ``w`` ``[R, G, g]``."""
    codes = np.zeros(w.shape, np.uint8)
    for i in range(table.shape[-1] - 1):
        codes += w > (table[..., i, None] + table[..., i + 1, None]) / 2
    return codes
