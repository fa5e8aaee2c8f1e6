"""``quant``: real numbers as small integers times a scale. Linear layers, embeddings and the rest stay what they are."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright.ir.core import Env, Op, Value
from tilewright.ir.ops import numerics as num
from tilewright.ir.ops.shapes import expect_dim, expect_rank
from tilewright.ir.types import Dim, DType, TensorType, Type, as_dim

SYMMETRIC = (DType.i8, DType.i4)
UNSIGNED = (DType.u8, DType.u4)


class Quantize(Op):
    """x ``[..., K]`` -> i8 codes ``[..., K]`` and their f32 scales ``[..., K / group]``; ``group=0`` is the whole row.

    Symmetric and dynamic: a scale is the group's largest magnitude over 127 (1 for a group of zeros), a code is
    ``x / scale`` rounded to the nearest, ties to even. A group with NaN or infinity has no meaning.
    """

    name = "quant.quantize"
    x: Value
    group: int = 0

    def infer(self) -> tuple[Type, ...]:
        self.expect(self.x.dtype.is_float and self.x.tensor.rank > 0, f"x must be float, of rank 1 or more: {self.x.type}")
        k = self.x.shape[-1]
        if self.group == 0:
            groups: Dim = 1
        else:
            fits = isinstance(k, int) and self.group > 0 and k % self.group == 0
            self.expect(fits, f"groups of {self.group} do not divide {k} elements")
            groups = int(k) // self.group
        scale = TensorType((*self.x.shape[:-1], groups), DType.f32)
        return self.x.tensor.with_dtype(DType.i8), scale

    def evaluate(self, env: Env, x: Any) -> Any:
        rows = num.wide(x).astype(np.float32)
        grouped = rows.reshape(*rows.shape[:-1], -1, self.group) if self.group else rows[..., None, :]
        top = np.abs(grouped).max(-1, initial=0)
        scale = np.where(top > 0, top / np.float32(127), np.float32(1)).astype(np.float32)
        codes = np.clip(np.rint(grouped / scale[..., None]), -127, 127).astype(np.int8)
        return codes.reshape(x.shape), scale

    def flops(self) -> Dim:
        return as_dim(3 * self.x.tensor.elements)


class Dequantize(Op):
    """``(codes - zero) * scale``: codes ``[..., K]``, scale and zero ``[..., G]``, each for K / G neighbours.

    i8 and i4 codes are symmetric, u8 and u4 codes have a ``zero`` (u8). The scale is f32 or f16. ``G = 1`` with rows of
    weights is a scale an output channel, with activations a scale a token. The result is ``dtype``, rounded once.
    """

    name = "quant.dequantize"
    codes: Value
    scale: Value
    zero: Value | None = None
    dtype: DType = DType.f32

    def infer(self) -> tuple[Type, ...]:
        codes, scale, zero = self.codes, self.scale, self.zero
        self.expect(codes.dtype in SYMMETRIC + UNSIGNED, f"codes are {codes.dtype.value}")
        self.expect((codes.dtype in UNSIGNED) == (zero is not None), "u8 and u4 codes take a zero, i8 and i4 codes none")
        self.expect(scale.dtype in (DType.f32, DType.f16), f"scale is {scale.dtype.value}, not f32 or f16")
        self.expect(self.dtype.is_float, f"dtype is {self.dtype.value}")
        expect_rank(self, "scale", scale.shape, codes.tensor.rank)
        for axis, (a, b) in enumerate(zip(scale.shape[:-1], codes.shape[:-1])):
            expect_dim(self, f"scale, axis {axis}", a, b)
        k, groups = codes.shape[-1], scale.shape[-1]
        static = isinstance(groups, int) and isinstance(k, int) and groups > 0 and k % groups == 0
        self.expect(groups == 1 or static, f"{groups} scales for {k} elements")
        if zero is not None:
            self.expect(zero.dtype is DType.u8, f"zero is {zero.dtype.value}, not u8")
            self.expect(zero.shape == scale.shape, f"zero is {zero.type}, scale {scale.type}")
        return (codes.tensor.with_dtype(self.dtype),)

    @property
    def group(self) -> Dim:
        """Neighbours along the last axis that share a scale."""
        return as_dim(self.codes.shape[-1] // self.scale.shape[-1]) if self.scale.shape[-1] != 1 else self.codes.shape[-1]

    def evaluate(self, env: Env, codes: Any, scale: Any, zero: Any) -> Any:
        groups = scale.shape[-1]
        rows = codes.astype(np.float32).reshape(*codes.shape[:-1], groups, codes.shape[-1] // groups)
        rows = rows if zero is None else rows - zero[..., None].astype(np.float32)
        return (rows * num.wide(scale)[..., None]).reshape(codes.shape).astype(self.dtype.np)

    def flops(self) -> Dim:
        return as_dim(2 * self.codes.tensor.elements)
