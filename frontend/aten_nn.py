"""ATen: matrix products, normalisation, convolution, pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tilewright.frontend.aten_core import binary
from tilewright.frontend.table import Context, axis_of, lowers
from tilewright.ir import ops
from tilewright.ir.core import Value, Weight
from tilewright.ir.types import Dim, DType, as_dim, product, same_dim

aten = torch.ops.aten

# ---- products ------------------------------------------------------------------------------------------------------


@lowers(aten.linear.default)
def linear(c: Context, x: Value, weight: Value, bias: Value | None = None) -> Value:
    if weight.tensor.rank != 2:
        c.fail(f"a weight of rank {weight.tensor.rank}; it must have two axes")
    return c(ops.Linear, x, weight, bias)


def _as_linear(y: Value) -> bool:
    """Whether a product with ``y`` on the right is a layer: ``y`` is a matrix of the model, perhaps transposed."""
    owner = y.owner
    return isinstance(y, Weight) or (isinstance(owner, ops.Transpose) and isinstance(owner.x, Weight))


@lowers(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.dot.default, aten.mv.default)
def matmul(c: Context, x: Value, y: Value) -> Value:
    """Vectors become matrices of one row or column; a product with a weight becomes a linear layer."""
    if y.tensor.rank == 2 and x.tensor.rank >= 1 and _as_linear(y):
        return c(ops.Linear, x, c.transposed(y))
    a = c.unsqueeze(x, 0) if x.tensor.rank == 1 else x
    b = c.unsqueeze(y, 1) if y.tensor.rank == 1 else y
    return c.reshape(c(ops.Matmul, a, b), c.out.shape)


@lowers(aten.addmm.default)
def addmm(c: Context, bias: Value, x: Value, y: Value, *, beta: Any = 1, alpha: Any = 1) -> Value:
    if beta == 1 and alpha == 1 and bias.tensor.rank == 1 and same_dim(bias.shape[0], y.shape[1]):
        return c(ops.Linear, x, c.transposed(y), bias)
    return baddbmm(c, bias, x, y, beta=beta, alpha=alpha)


@lowers(aten.baddbmm.default)
def baddbmm(c: Context, bias: Value, x: Value, y: Value, *, beta: Any = 1, alpha: Any = 1) -> Value:
    y = matmul(c, x, y)
    y = y if alpha == 1 else binary(c, ops.Mul, y, alpha)
    if beta == 0:
        return y
    return c(ops.Add, bias if beta == 1 else binary(c, ops.Mul, bias, beta), y)


# ---- normalisation -------------------------------------------------------------------------------------------------


@lowers(aten.softmax.int, aten._softmax.default)
def softmax(c: Context, x: Value, dim: int, _: Any = None, **__: Any) -> Value:
    x = c.cast(x, c.out.dtype)
    return c.value(1, x.dtype) if x.tensor.rank == 0 else c(ops.Softmax, x, axis_of(x, dim))


@lowers(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(c: Context, x: Value, dim: int, _: Any = None, **__: Any) -> Value:
    """``x - max - log(sum(exp(x - max)))``: taking the log of a softmax would lose its small values."""
    x, axis = c.cast(x, c.out.dtype), axis_of(x, dim)
    shifted = c(ops.Sub, x, c(ops.Reduce, x, "max", (axis,), True))
    total = c(ops.Reduce, c(ops.Exp, shifted), "sum", (axis,), True)
    return c(ops.Sub, shifted, c(ops.Log, total))


def _over_last(c: Context, x: Value, axes: Sequence[Dim], *params: Value | None) -> tuple[Value, list[Value | None]]:
    """``x`` and its parameters with the normalised axes joined into one."""
    if len(axes) == 1:
        return x, list(params)
    size = product(axes)
    lead = x.shape[: x.tensor.rank - len(axes)]
    return c.reshape(x, (*lead, size)), [p and c.reshape(p, (size,)) for p in params]


@lowers(aten.layer_norm.default)
def layer_norm(
    c: Context,
    x: Value,
    shape: Sequence[Dim],
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Value:
    flat, (w, b) = _over_last(c, x, shape, weight, bias)
    return c.reshape(c(ops.LayerNorm, flat, w, b, eps), x.shape)


@lowers(aten.native_layer_norm.default)
def native_layer_norm(
    c: Context, x: Value, shape: Sequence[Dim], weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value, None, None]:
    return layer_norm(c, x, shape, weight, bias, eps), None, None


@lowers(aten.rms_norm.default)
def rms_norm(c: Context, x: Value, shape: Sequence[Dim], weight: Value | None = None, eps: float | None = None) -> Value:
    if eps is None:
        eps = torch.finfo(c.node.meta["val"].dtype).eps
    flat, (w,) = _over_last(c, x, shape, weight)
    return c.reshape(c(ops.RmsNorm, flat, w, eps), x.shape)


@lowers(aten.group_norm.default)
def group_norm(
    c: Context,
    x: Value,
    groups: int,
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Value:
    return c(ops.GroupNorm, x, weight, bias, groups, eps)


@lowers(aten.native_group_norm.default)
def native_group_norm(
    c: Context, x: Value, weight: Value | None, bias: Value | None, n: Dim, ch: Dim, hw: Dim, groups: int, eps: float
) -> tuple[Value, None, None]:
    return c(ops.GroupNorm, x, weight, bias, groups, eps), None, None


def _per_channel(c: Context, v: Value, like: Value) -> Value:
    return c.reshape(v, (v.shape[0], *[1] * (like.tensor.rank - 2)))


def _scale_shift(
    c: Context, x: Value, weight: Value | None, bias: Value | None, mean: Value, var: Value, eps: float
) -> Value:
    """Batch norm with known statistics: ``x * scale + shift``, one of each a channel, in f32.

    Of weights, scale and shift are weights themselves, computed when they are loaded.
    """
    given = [weight, bias, mean, var]
    if not all(v is None or (isinstance(v, Weight) and v.source is not None) for v in given):
        return _scale_shift_at_run_time(c, x, weight, bias, mean, var, eps)

    def scale(w: Any, _: Any, __: Any, v: Any) -> Any:
        return (1 / np.sqrt(v + np.float32(eps))) * (1 if w is None else w)

    def shift(w: Any, b: Any, m: Any, v: Any) -> Any:
        return (0 if b is None else b) - m * scale(w, b, m, v)

    stem = str(mean.name).removesuffix(".running_mean")
    parts = [_per_channel(c, c.derived(f"{stem}.{f.__name__}", mean.shape, given, f), x) for f in (scale, shift)]
    return c.cast(c(ops.Add, c(ops.Mul, c.cast(x, DType.f32), parts[0]), parts[1]), x.dtype)


def _scale_shift_at_run_time(
    c: Context, x: Value, weight: Value | None, bias: Value | None, mean: Value, var: Value, eps: float
) -> Value:
    w, b, m, v = (None if p is None else c.cast(p, DType.f32) for p in (weight, bias, mean, var))
    scale = c(ops.Rsqrt, c(ops.Add, v, c.value(eps, DType.f32)))
    scale = scale if w is None else c(ops.Mul, scale, w)
    shift = c(ops.Neg, c(ops.Mul, m, scale))
    shift = shift if b is None else c(ops.Add, shift, b)
    y = c(ops.Mul, c.cast(x, DType.f32), _per_channel(c, scale, x))
    return c.cast(c(ops.Add, y, _per_channel(c, shift, x)), x.dtype)


@lowers(aten.batch_norm.default)
def batch_norm(
    c: Context,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value | None,
    var: Value | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> Value:
    if training or mean is None or var is None:
        c.fail("normalises with the batch's own statistics; call model.eval(), with track_running_stats")
    return _scale_shift(c, x, weight, bias, mean, var, eps)


@lowers(aten._native_batch_norm_legit_no_training.default)
def batch_norm_inference(
    c: Context,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value,
    var: Value,
    momentum: float,
    eps: float,
) -> tuple[Value, Value, Value]:
    return _scale_shift(c, x, weight, bias, mean, var, eps), mean, var


@lowers(aten.instance_norm.default)
def instance_norm(
    c: Context,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value | None,
    var: Value | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> Value:
    if not use_input_stats and mean is not None and var is not None:
        return _scale_shift(c, x, weight, bias, mean, var, eps)
    return c(ops.GroupNorm, x, weight, bias, int(x.shape[1]), eps)


# ---- convolution and pooling ---------------------------------------------------------------------------------------


def _each(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


def _batched(c: Context, x: Value, n: int) -> Value:
    """``x`` with a batch axis; torch allows leaving it out."""
    return c.unsqueeze(x, 0) if x.tensor.rank == n + 1 else x


def _conv(
    c: Context, x: Value, w: Value, bias: Value | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Value:
    n = w.tensor.rank - 2
    stride, dilation = _each(stride, n), _each(dilation, n)
    x = _batched(c, x, n)
    if isinstance(padding, str):
        x, padding = _same_padding(c, x, w, dilation) if padding == "same" else (x, 0)
    fields = {"stride": stride, "padding": _each(padding, n), "dilation": dilation, "groups": groups}
    return c.reshape(c(ops.Conv, x, w, bias, **fields), c.out.shape)


def _same_padding(c: Context, x: Value, w: Value, dilation: Sequence[int]) -> tuple[Value, Any]:
    """Padding that keeps the size; where it is uneven, the larger part goes behind, put on beforehand."""
    total = [d * (int(k) - 1) for d, k in zip(dilation, w.shape[2:])]
    if any(t % 2 for t in total):
        x = c(ops.Pad, x, (0,) * x.tensor.rank, (0, 0, *(t % 2 for t in total)), 0.0)
    return x, tuple(t // 2 for t in total)


@lowers(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
def conv(
    c: Context,
    x: Value,
    w: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    return _conv(c, x, w, bias, stride, padding, dilation, groups)


@lowers(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def conv_transpose(
    c: Context,
    x: Value,
    w: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Value:
    n = w.tensor.rank - 2
    fields = {"stride": stride, "padding": padding, "dilation": dilation, "output_padding": output_padding}
    sizes = {k: _each(v, n) for k, v in fields.items()}
    y = c(ops.Conv, _batched(c, x, n), w, bias, groups=groups, transposed=True, **sizes)
    return c.reshape(y, c.out.shape)


@lowers(aten.convolution.default)
def convolution(
    c: Context,
    x: Value,
    w: Value,
    bias: Value | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Value:
    if transposed:
        return conv_transpose(c, x, w, bias, stride, padding, output_padding, groups, dilation)
    return _conv(c, x, w, bias, stride, padding, dilation, groups)


@lowers(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
def max_pool(
    c: Context, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Value:
    n = int(str(c.node.target)[len("aten.max_pool")])
    sizes = [_each(v, n) for v in (kernel, stride or kernel, padding, dilation)]
    return c.reshape(c(ops.MaxPool, _batched(c, x, n), *sizes, ceil_mode), c.out.shape)


@lowers(aten.max_pool2d_with_indices.default)
def max_pool_indices(c: Context, x: Value, *_: Any) -> Value:
    return c.fail("gives indices of the maxima; use max_pool2d without return_indices")


@lowers(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def avg_pool(
    c: Context,
    x: Value,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Value:
    if divisor is not None or ceil_mode:
        c.fail("with divisor_override or ceil_mode; pad the input, or scale the result instead")
    n = int(str(c.node.target)[len("aten.avg_pool")])
    sizes = [_each(v, n) for v in (kernel, stride or kernel, padding)]
    return c.reshape(c(ops.AvgPool, _batched(c, x, n), *sizes, ceil_mode, count_include_pad), c.out.shape)


@lowers(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default)
def adaptive_avg_pool(c: Context, x: Value, size: Any) -> Value:
    """To one element an axis it is a mean, which also takes inputs of any size."""
    n = int(str(c.node.target)[len("aten.adaptive_avg_pool")])
    axes = tuple(range(x.tensor.rank - n, x.tensor.rank))
    if all(s == 1 for s in size):
        return c(ops.Reduce, x, "mean", axes, True)
    if not all(isinstance(s, int) for s in size):
        c.fail(f"to the varying size {size}; make it a constant")
    return c.reshape(c(ops.AdaptiveAvgPool, _batched(c, x, n), tuple(size)), c.out.shape)


_RESIZE = {
    aten.upsample_nearest1d.vec: "nearest",
    aten.upsample_nearest2d.vec: "nearest",
    aten.upsample_nearest3d.vec: "nearest",
    aten.upsample_linear1d.vec: "bilinear",
    aten.upsample_bilinear2d.vec: "bilinear",
    aten.upsample_trilinear3d.vec: "bilinear",
}


@lowers(*_RESIZE)
def upsample(c: Context, x: Value, size: Any, *rest: Any) -> Value:
    out = c.out.shape[2:]
    if not all(isinstance(s, int) for s in out):
        c.fail(f"to the varying size {list(map(str, out))}; make the input's size static")
    mode = _RESIZE[c.node.target]
    corners = bool(rest[0]) if mode == "bilinear" else False
    scales = rest[-1]
    if scales is not None and any(as_dim(int(n * s)) != o or n * s != o for n, s, o in zip(x.shape[2:], scales, out)):
        c.fail(f"by the factor {scales}, which does not give whole sizes; pass a size instead")
    return c(ops.Resize, x, tuple(out), mode, corners)
