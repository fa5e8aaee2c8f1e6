"""``nn``: layers, each one operation with one meaning."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright.ir.core import Env, Op, Value
from tilewright.ir.ops import numerics as num
from tilewright.ir.ops.shapes import axis_of, broadcast, expect_dim, expect_dtype, expect_rank
from tilewright.ir.types import Dim, DType, TensorType, Type, as_dim, product


class Matmul(Op):
    """``a [..., M, K] @ b [..., K, N] -> [..., M, N]``; leading axes broadcast; accumulates in f32."""

    name = "core.matmul"
    a: Value
    b: Value

    def infer(self) -> tuple[Type, ...]:
        self.expect(self.a.tensor.rank >= 2 and self.b.tensor.rank >= 2, "operands need rank 2 or more")
        expect_dtype(self, self.a, self.b)
        expect_dim(self, "inner size", self.b.shape[-2], self.a.shape[-1])
        lead = broadcast(self, self.a.shape[:-2], self.b.shape[:-2])
        return (TensorType((*lead, self.a.shape[-2], self.b.shape[-1]), self.a.dtype),)

    def evaluate(self, env: Env, a: Any, b: Any) -> Any:
        return num.rounded(np.matmul, a, b)

    def flops(self) -> Dim:
        return as_dim(2 * self.result.tensor.elements * self.a.shape[-1])


def _expect_weight(op: Op, what: str, w: Value, x: Value, n: Dim | None) -> Dim:
    expect_rank(op, what, w.shape, 2)
    expect_dim(op, f"{what}, axis 1", w.shape[1], x.shape[-1])
    fits = w.dtype == x.dtype or (w.dtype is DType.f32 and x.dtype in (DType.bf16, DType.f16))
    op.expect(fits, f"{what} is {w.dtype.value}, x is {x.dtype.value}")
    if n is not None:
        expect_dim(op, f"{what}, axis 0", w.shape[0], n)
    return w.shape[0]


def _expect_vector(op: Op, what: str, v: Value | None, n: Dim) -> None:
    if v is not None:
        expect_rank(op, what, v.shape, 1)
        expect_dim(op, what, v.shape[0], n)


class Linear(Op):
    """``x @ weight.T + bias``: x ``[..., K]``, weight ``[N, K]``, bias ``[N]`` -> ``[..., N]`` of x's type.

    The weight has x's type, or is f32 (a dequantized one); sums are f32.
    """

    name = "nn.linear"
    x: Value
    weight: Value
    bias: Value | None = None

    def infer(self) -> tuple[Type, ...]:
        n = _expect_weight(self, "weight", self.weight, self.x, None)
        _expect_vector(self, "bias", self.bias, n)
        return (self.x.tensor.with_shape((*self.x.shape[:-1], n)),)

    def evaluate(self, env: Env, x: Any, weight: Any, bias: Any) -> Any:
        y = num.wide(x) @ num.wide(weight).astype(num.wide(x).dtype, copy=False).T
        return (y if bias is None else y + num.wide(bias)).astype(x.dtype)

    def flops(self) -> Dim:
        return as_dim(2 * self.result.tensor.elements * self.x.shape[-1])


class GatedLinear(Op):
    """``act(x @ gate.T + gate_bias) * (x @ up.T + up_bias)`` (Shazeer 2020, GLU variants); gate and up ``[N, K]``.

    Element types are those of :class:`Linear`. Computed in f32 and rounded once.
    """

    name = "nn.gated_linear"
    x: Value
    gate: Value
    up: Value
    gate_bias: Value | None = None
    up_bias: Value | None = None
    act: str = "silu"

    def infer(self) -> tuple[Type, ...]:
        self.expect(self.act in num.ACTIVATIONS, f"unknown activation {self.act!r}; there are {list(num.ACTIVATIONS)}")
        n = _expect_weight(self, "gate", self.gate, self.x, None)
        _expect_weight(self, "up", self.up, self.x, n)
        self.expect(self.gate.dtype == self.up.dtype, "gate and up must have one element type")
        for what in ("gate_bias", "up_bias"):
            _expect_vector(self, what, getattr(self, what), n)
        return (self.x.tensor.with_shape((*self.x.shape[:-1], n)),)

    def evaluate(self, env: Env, x: Any, gate: Any, up: Any, gb: Any, ub: Any) -> Any:
        def project(w: Any, bias: Any) -> Any:
            y = num.wide(x) @ num.wide(w).astype(num.wide(x).dtype, copy=False).T
            return y if bias is None else y + num.wide(bias)

        with np.errstate(all="ignore"):
            return (num.ACTIVATIONS[self.act](project(gate, gb)) * project(up, ub)).astype(x.dtype)

    def flops(self) -> Dim:
        return as_dim(4 * self.result.tensor.elements * self.x.shape[-1])


class Embedding(Op):
    """Rows of ``table`` ``[V, H]`` picked by integer ``indices`` in ``[0, V)`` -> ``[*indices, H]``."""

    name = "nn.embedding"
    indices: Value
    table: Value

    def infer(self) -> tuple[Type, ...]:
        expect_rank(self, "table", self.table.shape, 2)
        self.expect(self.indices.dtype in (DType.i64, DType.i32), "indices must be i64 or i32")
        return (self.table.tensor.with_shape((*self.indices.shape, self.table.shape[1])),)

    def evaluate(self, env: Env, indices: Any, table: Any) -> Any:
        if indices.size and not (indices.min() >= 0 and indices.max() < len(table)):
            self.fail(f"index {indices.min()}..{indices.max()} is outside of the table's {len(table)} rows")
        return table[indices]


class Softmax(Op):
    """``exp(x) / sum(exp(x))`` along ``axis``, shifted by the maximum; a row of only ``-inf`` gives zeros."""

    name = "nn.softmax"
    x: Value
    axis: int

    def infer(self) -> tuple[Type, ...]:
        axis_of(self, self.axis, self.x.tensor.rank)
        return (self.x.tensor,)

    def evaluate(self, env: Env, x: Any) -> Any:
        return num.rounded(lambda v: num.softmax(v, self.axis), x)

    def flops(self) -> Dim:
        return as_dim(5 * self.x.tensor.elements)


class LayerNorm(Op):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last axis (Ba et al. 2016); f32 inside."""

    name = "nn.layer_norm"
    x: Value
    weight: Value | None = None
    bias: Value | None = None
    eps: float = 1e-5

    def infer(self) -> tuple[Type, ...]:
        _expect_vector(self, "weight", self.weight, self.x.shape[-1])
        _expect_vector(self, "bias", self.bias, self.x.shape[-1])
        return (self.x.tensor,)

    def evaluate(self, env: Env, x: Any, weight: Any, bias: Any) -> Any:
        v = num.wide(x)
        centred = v - v.mean(-1, keepdims=True)
        y = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + np.asarray(self.eps, v.dtype))
        y = y if weight is None else y * num.wide(weight)
        return (y if bias is None else y + num.wide(bias)).astype(x.dtype)

    def flops(self) -> Dim:
        return as_dim(8 * self.x.tensor.elements)


class RmsNorm(Op):
    """``x / sqrt(mean(x**2) + eps) * (offset + weight)`` over the last axis (Zhang & Sennrich 2019); f32 inside."""

    name = "nn.rms_norm"
    x: Value
    weight: Value | None = None
    eps: float = 1e-6
    offset: float = 0.0

    def infer(self) -> tuple[Type, ...]:
        _expect_vector(self, "weight", self.weight, self.x.shape[-1])
        return (self.x.tensor,)

    def evaluate(self, env: Env, x: Any, weight: Any) -> Any:
        v = num.wide(x)
        y = v / np.sqrt((v * v).mean(-1, keepdims=True) + np.asarray(self.eps, v.dtype))
        scale = 1 if weight is None else num.wide(weight) + np.asarray(self.offset, v.dtype)
        return (y * scale).astype(x.dtype)

    def flops(self) -> Dim:
        return as_dim(4 * self.x.tensor.elements)


class GroupNorm(Op):
    """Normalisation of x ``[N, C, ...]`` over each of ``groups`` groups of channels (Wu & He 2018); f32 inside."""

    name = "nn.group_norm"
    x: Value
    weight: Value | None = None
    bias: Value | None = None
    groups: int = 1
    eps: float = 1e-5

    def infer(self) -> tuple[Type, ...]:
        channels = self.x.shape[1]
        fits = isinstance(channels, int) and channels % self.groups == 0
        self.expect(fits, f"{channels} channels, {self.groups} groups")
        _expect_vector(self, "weight", self.weight, channels)
        _expect_vector(self, "bias", self.bias, channels)
        return (self.x.tensor,)

    def evaluate(self, env: Env, x: Any, weight: Any, bias: Any) -> Any:
        v = num.wide(x).reshape(x.shape[0], self.groups, -1)
        centred = v - v.mean(-1, keepdims=True)
        y = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + np.asarray(self.eps, v.dtype))
        per_channel = (-1,) + (1,) * (x.ndim - 2)
        y = y.reshape(x.shape)
        y = y if weight is None else y * num.wide(weight).reshape(per_channel)
        return (y if bias is None else y + num.wide(bias).reshape(per_channel)).astype(x.dtype)

    def flops(self) -> Dim:
        return as_dim(8 * self.x.tensor.elements)


class Rope(Op):
    """Rotary position embedding (Su et al. 2021): x ``[B, S, H, D]``, cos and sin ``[B or 1, S, R]``, ``R <= D``.

    ``style="half"`` pairs element i with ``i + R/2``, ``"interleaved"`` pairs ``2i`` with ``2i + 1``; elements from R
    on pass unchanged. cos and sin hold one value an element of the rotated part.
    """

    name = "nn.rope"
    x: Value
    cos: Value
    sin: Value
    style: str = "half"

    def infer(self) -> tuple[Type, ...]:
        expect_rank(self, "x", self.x.shape, 4)
        self.expect(self.style in ("half", "interleaved"), f"unknown style {self.style!r}")
        for what, v in (("cos", self.cos), ("sin", self.sin)):
            expect_rank(self, what, v.shape, 3)
            expect_dim(self, f"{what}, axis 1", v.shape[1], self.x.shape[1])
            if v.shape[0] != 1:
                expect_dim(self, f"{what}, axis 0", v.shape[0], self.x.shape[0])
        size, rotated = self.x.shape[3], self.cos.shape[2]
        fits = isinstance(rotated, int) and isinstance(size, int) and rotated <= size and rotated % 2 == 0
        self.expect(fits, f"cannot rotate {rotated} of {size} elements")
        return (self.x.tensor,)

    def evaluate(self, env: Env, x: Any, cos: Any, sin: Any) -> Any:
        v, c, s = num.wide(x), num.wide(cos)[:, :, None], num.wide(sin)[:, :, None]
        r = c.shape[-1]
        part = v[..., :r]
        if self.style == "half":
            turned = np.concatenate([-part[..., r // 2 :], part[..., : r // 2]], -1)
        else:
            turned = np.stack([-part[..., 1::2], part[..., ::2]], -1).reshape(part.shape)
        return np.concatenate([part * c + turned * s, v[..., r:]], -1).astype(x.dtype)

    def flops(self) -> Dim:
        return as_dim(3 * product(self.x.shape))
