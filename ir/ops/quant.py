"""``quant``: real numbers as small integers times a scale. Linear layers, embeddings and the rest stay what they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tilewright.ir.core import Env, Op, Value
from tilewright.ir.ops import numerics as num
from tilewright.ir.ops.shapes import expect_dim, expect_rank
from tilewright.ir.types import Dim, DType, TensorType, Type, as_dim

SYMMETRIC = (DType.i8, DType.i4, DType.i3, DType.i2, DType.f8e4m3, DType.f8e5m2, DType.f4e2m1)
UNSIGNED = (DType.u8, DType.u4, DType.u3, DType.u2)
SCALES = (DType.f32, DType.f16, DType.f8e8m0)


def expect_groups(op: Op, codes: Value, scale: Value, dtypes: Sequence[DType], zero: Value | None = None) -> None:
    """``scale`` and ``zero`` ``[..., G]`` beside codes ``[..., K]``: G is 1 or divides K. Raises VerifyError."""
    names = " or ".join(d.value for d in dtypes)
    op.expect(scale.dtype in dtypes, f"scale is {scale.dtype.value}, not {names}")
    expect_rank(op, "scale", scale.shape, codes.tensor.rank)
    for axis, (a, b) in enumerate(zip(scale.shape[:-1], codes.shape[:-1])):
        expect_dim(op, f"scale, axis {axis}", a, b)
    k, groups = codes.shape[-1], scale.shape[-1]
    static = isinstance(groups, int) and isinstance(k, int) and groups > 0 and k % groups == 0
    op.expect(groups == 1 or static, f"{groups} scales for {k} elements")
    if zero is not None:
        op.expect(zero.dtype is DType.u8, f"zero is {zero.dtype.value}, not u8")
        op.expect(zero.shape == scale.shape, f"zero is {zero.type}, scale {scale.type}")


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
    """``(codes - zero) * scale`` or ``codes * scale + offset``: codes ``[..., K]``, the others ``[..., G]``.

    Each scale, zero and offset is for K / G neighbours. Codes i8, i4, i3, i2 and floats of 8 and 4 bits are symmetric;
    u8, u4, u3, u2 have a ``zero`` (u8) or an ``offset`` (f32, as GGUF's Q4_K has). The scale is f32, f16, or f8e8m0, a
    power of two. ``G = 1`` with rows of weights is a scale an output channel, with activations a scale a token. The result
    is ``dtype``, rounded once. With f4e2m1, f8e8m0 and groups of 32 that is MXFP4 (OCP Microscaling Formats 1.0).
    """

    name = "quant.dequantize"
    codes: Value
    scale: Value
    zero: Value | None = None
    offset: Value | None = None
    dtype: DType = DType.f32

    def infer(self) -> tuple[Type, ...]:
        codes, scale, zero, offset = self.codes, self.scale, self.zero, self.offset
        self.expect(codes.dtype in SYMMETRIC + UNSIGNED, f"codes are {codes.dtype.value}")
        given = (zero is not None) + (offset is not None)
        self.expect(given == (codes.dtype in UNSIGNED), "unsigned codes take a zero or an offset, others none")
        expect_groups(self, codes, scale, SCALES, zero)
        if offset is not None:
            self.expect(offset.dtype is DType.f32, f"offset is {offset.dtype.value}, not f32")
            self.expect(offset.shape == scale.shape, f"offset is {offset.type}, scale {scale.type}")
        self.expect(self.dtype.is_float, f"dtype is {self.dtype.value}")
        return (codes.tensor.with_dtype(self.dtype),)

    @property
    def group(self) -> Dim:
        """Neighbours along the last axis that share a scale."""
        return as_dim(self.codes.shape[-1] // self.scale.shape[-1]) if self.scale.shape[-1] != 1 else self.codes.shape[-1]

    def evaluate(self, env: Env, codes: Any, scale: Any, zero: Any, offset: Any) -> Any:
        groups = scale.shape[-1]
        rows = codes.astype(np.float32).reshape(*codes.shape[:-1], groups, codes.shape[-1] // groups)
        rows = rows if zero is None else rows - zero[..., None].astype(np.float32)
        rows = rows * scale.astype(np.float32)[..., None]
        rows = rows if offset is None else rows + offset[..., None]
        return rows.reshape(codes.shape).astype(self.dtype.np)


class Lookup(Op):
    """``table[code] * scale``: codes ``[..., N, K]`` (u8, u4, u3, u2), table ``[N or 1, 2^bits]``, scale ``[..., N, G]``.

    A codebook for each row (SqueezeLLM, arXiv:2306.07629), or one for all (NormalFloat, arXiv:2305.14314), then with a
    ``scale`` for each K / G neighbours. The table is f32, f16 or bf16, the scale f32 or f16. The result is ``dtype``,
    rounded once.
    """

    name = "quant.lookup"
    codes: Value
    table: Value
    scale: Value | None = None
    dtype: DType = DType.f32

    def infer(self) -> tuple[Type, ...]:
        codes, table, scale = self.codes, self.table, self.scale
        self.expect(codes.dtype in UNSIGNED and codes.tensor.rank >= 2, f"codes are {codes.type}")
        self.expect(table.dtype in (DType.f32, DType.f16, DType.bf16), f"table is {table.dtype.value}")
        self.expect(self.dtype.is_float, f"dtype is {self.dtype.value}")
        expect_rank(self, "table", table.shape, 2)
        self.expect(table.shape[0] in (1, codes.shape[-2]), f"{table.shape[0]} tables for {codes.shape[-2]} rows")
        expect_dim(self, "table, axis 1", table.shape[1], 1 << codes.dtype.bits)
        if scale is not None:
            expect_groups(self, codes, scale, (DType.f32, DType.f16))
        return (codes.tensor.with_dtype(self.dtype),)

    def evaluate(self, env: Env, codes: Any, table: Any, scale: Any) -> Any:
        tables = np.broadcast_to(table.astype(np.float32), (codes.shape[-2], table.shape[1]))
        rows = tables[np.arange(codes.shape[-2])[:, None], codes.astype(np.int64)]
        if scale is not None:
            grouped = rows.reshape(*codes.shape[:-1], scale.shape[-1], -1)
            rows = (grouped * scale.astype(np.float32)[..., None]).reshape(codes.shape)
        return rows.astype(self.dtype.np)

    def flops(self) -> Dim:
        return as_dim((self.scale is not None) * self.codes.tensor.elements)


class Expand(Op):
    """``(codes - zero) * scale`` -> i8: codes ``[N, K]`` of 4 bits or fewer, scale (u8) and zero (u8) ``[N, G]``.

    The inner of two levels of scales: the outer, one a row, is a ``quant.dequantize`` of the result (QoQ, arXiv:2405.04532;
    Dual Grained Quantization, arXiv:2310.04836). What does not fit in i8 becomes -128 or 127.
    """

    name = "quant.expand"
    codes: Value
    scale: Value
    zero: Value | None = None

    def infer(self) -> tuple[Type, ...]:
        codes, scale, zero = self.codes, self.scale, self.zero
        self.expect(codes.dtype.is_int and codes.dtype.bits <= 4, f"codes are {codes.dtype.value}")
        self.expect((codes.dtype in UNSIGNED) == (zero is not None), "unsigned codes take a zero, others none")
        expect_groups(self, codes, scale, (DType.u8,), zero)
        return (codes.tensor.with_dtype(DType.i8),)

    def evaluate(self, env: Env, codes: Any, scale: Any, zero: Any) -> Any:
        rows = codes.astype(np.int32).reshape(*codes.shape[:-1], scale.shape[-1], -1)
        rows = rows if zero is None else rows - zero[..., None].astype(np.int32)
        return np.clip(rows * scale[..., None].astype(np.int32), -128, 127).reshape(codes.shape).astype(np.int8)

    def flops(self) -> Dim:
        return as_dim(2 * self.codes.tensor.elements)
