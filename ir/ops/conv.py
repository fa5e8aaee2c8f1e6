"""``nn``: convolution, pooling and resizing over ``[N, C, spatial...]``."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from tilewright.ir.core import Env, Op, Value
from tilewright.ir.ops import numerics as num
from tilewright.ir.ops.shapes import expect_dim, expect_rank, shape_text
from tilewright.ir.types import Dim, Shape, TensorType, Type, as_dim, product


def _out_size(size: Dim, kernel: int, stride: int, pad: int, dilation: int, ceil: bool = False) -> Dim:
    span = as_dim(size + 2 * pad - dilation * (kernel - 1) - 1)
    out = as_dim((span + (stride - 1 if ceil else 0)) // stride + 1)
    if ceil and isinstance(out, int) and isinstance(size, int) and (out - 1) * stride >= size + pad:
        out -= 1  # a window must start inside of the input or its left pad
    return out


def _sized(op: Op, x: Value, shape: Shape) -> TensorType:
    """x's type with ``shape``, in which no window may be larger than its input."""
    fits = all(d > 0 for d in shape if isinstance(d, int))
    op.expect(fits, f"a window is larger than its input: result {shape_text(shape)}")
    return x.tensor.with_shape(shape)


def _windows(x: Any, kernel: Any, stride: Any, pad: Any, dilation: Any, out: Any, fill: float) -> Any:
    """Every window of x: ``[N, C, *out, *kernel]``."""
    need = [(o - 1) * s + d * (k - 1) + 1 for o, s, d, k in zip(out, stride, dilation, kernel)]
    widths = [(p, max(0, n - size - p)) for p, n, size in zip(pad, need, x.shape[2:])]
    x = np.pad(x, [(0, 0), (0, 0), *widths], constant_values=fill)
    cells = []
    for at in itertools.product(*map(range, kernel)):
        pick = [slice(a * d, a * d + (o - 1) * s + 1, s) for a, d, o, s in zip(at, dilation, out, stride)]
        cells.append(x[(slice(None), slice(None), *pick)])
    return np.stack(cells, -1).reshape(*x.shape[:2], *out, *kernel)


class Conv(Op):
    """Cross-correlation of x ``[N, C, *S]`` with weight ``[O, C/groups, *K]``, one to three spatial axes.

    ``transposed`` is the gradient form (weight ``[C, O/groups, *K]``), with ``output_padding`` extra rows at the end.
    """

    name = "nn.conv"
    x: Value
    weight: Value
    bias: Value | None = None
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def infer(self) -> tuple[Type, ...]:
        n = self.x.tensor.rank - 2
        expect_rank(self, "weight", self.weight.shape, n + 2)
        for what in (self.stride, self.padding, self.dilation):
            self.expect(len(what) == n, f"needs {n} strides, paddings and dilations")
        self.expect(min((*self.stride, *self.dilation), default=1) > 0, "strides and dilations are positive")
        c = self.weight.shape[0] if self.transposed else as_dim(self.weight.shape[1] * self.groups)
        expect_dim(self, "channels", self.x.shape[1], c)
        out = as_dim(self.weight.shape[1] * self.groups) if self.transposed else self.weight.shape[0]
        if self.bias is not None:
            expect_rank(self, "bias", self.bias.shape, 1)
            expect_dim(self, "bias", self.bias.shape[0], out)
        return (_sized(self, self.x, (self.x.shape[0], out, *self._spatial())),)

    def _spatial(self) -> list[Dim]:
        rows = zip(self.x.shape[2:], self.weight.shape[2:], self.stride, self.padding, self.dilation)
        if not self.transposed:
            return [_out_size(n, int(k), s, p, d) for n, k, s, p, d in rows]
        extra = self.output_padding or (0,) * len(self.stride)
        return [as_dim((n - 1) * s - 2 * p + d * (k - 1) + e + 1) for (n, k, s, p, d), e in zip(rows, extra)]

    def evaluate(self, env: Env, x: Any, weight: Any, bias: Any) -> Any:
        out = env.shape(self.result.shape)
        v, w = num.wide(x), num.wide(weight)
        y = self._scatter(v, w, out) if self.transposed else self._correlate(v, w, out)
        if bias is not None:
            y = y + num.wide(bias).reshape(1, -1, *(1,) * (x.ndim - 2))
        return y.astype(x.dtype)

    def _correlate(self, x: Any, w: Any, out: Any) -> Any:
        win = _windows(x, w.shape[2:], self.stride, self.padding, self.dilation, out[2:], 0.0)
        win = win.reshape(x.shape[0], self.groups, -1, *out[2:], math.prod(w.shape[2:]))
        win = np.moveaxis(win, 2, -2).reshape(x.shape[0], self.groups, math.prod(out[2:]), -1)
        flat = w.reshape(self.groups, w.shape[0] // self.groups, -1)
        return (win @ flat.transpose(0, 2, 1)).transpose(0, 1, 3, 2).reshape(out)

    def _scatter(self, x: Any, w: Any, out: Any) -> Any:
        full = [o + 2 * p for o, p in zip(out[2:], self.padding)]
        y = np.zeros((*out[:2], *full), x.dtype)
        xg = x.reshape(x.shape[0], self.groups, -1, *x.shape[2:])
        wg = w.reshape(self.groups, -1, *w.shape[1:])
        for at in itertools.product(*map(range, w.shape[2:])):
            part = np.einsum("ngc...,gco->ngo...", xg, wg[(..., *at)]).reshape(x.shape[0], out[1], *x.shape[2:])
            rows = zip(at, self.dilation, x.shape[2:], self.stride)
            pick = [slice(a * d, a * d + (n - 1) * s + 1, s) for a, d, n, s in rows]
            view = y[(slice(None), slice(None), *pick)]
            view += part[(slice(None), slice(None), *(slice(n) for n in view.shape[2:]))]
        return y[(slice(None), slice(None), *(slice(p, p + o) for p, o in zip(self.padding, out[2:])))]

    def flops(self) -> Dim:
        return as_dim(2 * self.result.tensor.elements * product(self.weight.shape[1:]))


class MaxPool(Op):
    """Largest element of each window of x ``[N, C, *S]``; pads count as ``-inf``."""

    name = "nn.max_pool"
    x: Value
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False

    def infer(self) -> tuple[Type, ...]:
        rows = zip(self.x.shape[2:], self.kernel, self.stride, self.padding, self.dilation)
        return (_sized(self, self.x, (*self.x.shape[:2], *(_out_size(*r, self.ceil_mode) for r in rows))),)

    def evaluate(self, env: Env, x: Any) -> Any:
        out = env.shape(self.result.shape)
        win = _windows(num.wide(x), self.kernel, self.stride, self.padding, self.dilation, out[2:], -np.inf)
        return win.max(tuple(range(-len(self.kernel), 0))).astype(x.dtype)

    def flops(self) -> Dim:
        return as_dim(self.result.tensor.elements * math.prod(self.kernel))


class AvgPool(Op):
    """Mean of each window of x ``[N, C, *S]``; pads count as zeros when ``count_include_pad``, else not at all."""

    name = "nn.avg_pool"
    x: Value
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    ceil_mode: bool = False
    count_include_pad: bool = True

    def infer(self) -> tuple[Type, ...]:
        self.expect(not self.ceil_mode, "ceil_mode is not supported: pad the input instead")
        rows = zip(self.x.shape[2:], self.kernel, self.stride, self.padding)
        sizes = [_out_size(n, k, s, p, 1) for n, k, s, p in rows]
        return (_sized(self, self.x, (*self.x.shape[:2], *sizes)),)

    def evaluate(self, env: Env, x: Any) -> Any:
        out, once = env.shape(self.result.shape), (1,) * len(self.kernel)
        axes = tuple(range(-len(self.kernel), 0))
        total = _windows(num.wide(x), self.kernel, self.stride, self.padding, once, out[2:], 0.0).sum(axes)
        if self.count_include_pad:
            return (total / math.prod(self.kernel)).astype(x.dtype)
        ones = np.ones((1, 1, *x.shape[2:]), np.float32)
        count = _windows(ones, self.kernel, self.stride, self.padding, once, out[2:], 0.0).sum(axes)
        return (total / count).astype(x.dtype)

    def flops(self) -> Dim:
        return as_dim(self.result.tensor.elements * math.prod(self.kernel))


class AdaptiveAvgPool(Op):
    """Means over ``size`` nearly equal windows an axis: window i is ``floor(i*n/size) .. ceil((i+1)*n/size)``."""

    name = "nn.adaptive_avg_pool"
    x: Value
    size: tuple[int, ...]

    def infer(self) -> tuple[Type, ...]:
        self.expect(len(self.size) == self.x.tensor.rank - 2, f"needs {self.x.tensor.rank - 2} sizes")
        return (self.x.tensor.with_shape((*self.x.shape[:2], *self.size)),)

    def evaluate(self, env: Env, x: Any) -> Any:
        y = num.wide(x)
        for axis, size in enumerate(self.size, 2):
            n = x.shape[axis]
            parts = [range(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
            y = np.stack([y.take(p, axis).mean(axis) for p in parts], axis)
        return y.astype(x.dtype)

    def flops(self) -> Dim:
        return self.x.tensor.elements


class Resize(Op):
    """x ``[N, C, *S]`` sampled at ``size``; ``nearest`` or ``bilinear`` (linear in each axis), torch's conventions."""

    name = "nn.resize"
    x: Value
    size: tuple[int, ...]
    mode: str = "nearest"
    align_corners: bool = False

    def infer(self) -> tuple[Type, ...]:
        self.expect(self.mode in ("nearest", "bilinear"), f"unknown mode {self.mode!r}")
        return (self.x.tensor.with_shape((*self.x.shape[:2], *self.size)),)

    def evaluate(self, env: Env, x: Any) -> Any:
        y = num.wide(x)
        for axis, size in enumerate(self.size, 2):
            n = x.shape[axis]
            if self.mode == "nearest":
                y = y.take(np.minimum(np.arange(size) * n // size, n - 1), axis)
                continue
            at = self._positions(n, size)
            low = np.floor(at).astype(int)
            part = (at - low).reshape(-1, *(1,) * (x.ndim - axis - 1)).astype(y.dtype)
            y = y.take(low, axis) * (1 - part) + y.take(np.minimum(low + 1, n - 1), axis) * part
        return y.astype(x.dtype)

    def _positions(self, n: int, size: int) -> Any:
        if self.align_corners:
            return np.arange(size) * ((n - 1) / (size - 1) if size > 1 else 0.0)
        return np.clip((np.arange(size) + 0.5) * (n / size) - 0.5, 0, n - 1)

    def flops(self) -> Dim:
        return as_dim(4 * self.result.tensor.elements)
