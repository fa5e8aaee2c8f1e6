"""``add(matmul(x, transpose(w)), b)`` -> ``nn.linear(x, w, b)``: products with a constant matrix are layers."""

from __future__ import annotations

import numpy as np

from tilewright.ir import Pattern, Rewriter, TensorType, Value, Weight, ops, product, same_dim
from tilewright.passes.match import either, is_one, made_by, replace, same_shape, used_once
from tilewright.passes.weights import as_weight, derive


def product_with_weight(op: ops.Matmul, rw: Rewriter) -> None:
    """``x @ w`` and ``x @ w.T`` of a weight -> a linear layer; ``w`` is stored transposed if nothing else needs it."""
    transposed = made_by(op.b, ops.Transpose)
    weight = as_weight(transposed.x, 2) if transposed is not None else None
    if weight is not None:
        replace(rw, op, ops.Linear(op.a, weight))
        return
    weight = as_weight(op.b, 2)
    if weight is None:
        return
    others = [u for u in weight.users if not (isinstance(u, ops.Matmul) and u.b is weight and u.a is not weight)]
    if others:
        rw.skip(op, f"@{weight.name} is also used by {others[0].name}, so it is not stored transposed")
        return
    flipped = transpose_weight(rw, weight)
    for user in list(weight.users):
        assert isinstance(user, ops.Matmul)
        replace(rw, user, ops.Linear(user.a, flipped, loc=user.loc))


def transpose_weight(rw: Rewriter, weight: Weight) -> Weight:
    shape = (weight.shape[1], weight.shape[0])
    return derive(rw.module, f"{weight.name}.T", TensorType(shape, weight.dtype), [weight], _transpose)


def _transpose(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T)


def weight_transposes(op: ops.Transpose, rw: Rewriter) -> None:
    """A matrix that is only used transposed -> the transposed matrix."""
    weight = as_weight(op.x, 2)
    if weight is None or not used_once(weight) or any(isinstance(u, ops.Matmul) for u in op.result.users):
        return
    replace(rw, op, transpose_weight(rw, weight))


def linear_bias(op: ops.Binary, rw: Rewriter) -> None:
    """``linear(x, w) + b`` -> ``linear(x, w, b)``."""
    if not isinstance(op, ops.Add):
        return
    for value, bias in either(op):
        linear = made_by(value, ops.Linear)
        vector = _vector(bias)
        if linear is None or vector is None or not same_dim(vector.shape[0], value.shape[-1]):
            continue
        if linear.bias is not None or not used_once(value) or vector.dtype != linear.x.dtype:
            continue
        replace(rw, op, ops.Linear(linear.x, linear.weight, vector))
        return


def _vector(value: Value) -> Weight | None:
    """A weight of one axis, maybe with axes of size one in front."""
    reshape = made_by(value, ops.Reshape)
    if reshape is not None and all(map(is_one, reshape.shape[:-1])):
        value = reshape.x
    return as_weight(value, 1)


def late_reshape(op: ops.Linear | ops.GatedLinear | ops.RmsNorm | ops.LayerNorm, rw: Rewriter) -> None:
    """A reshape comes after the layer, but for the part of it that makes the last axis."""
    source = made_by(op.x, ops.Reshape)
    if source is None:
        return
    shape, last = source.x.shape, source.shape[-1]
    tails = [i for i in range(len(shape)) if same_dim(product(shape[i:]), last)]
    lead = shape[: tails[-1]] if tails else shape
    if not tails or same_shape(lead, source.shape[:-1]):
        return
    rows = rw.before(op).add(ops.Reshape(source.x, (*lead, last)))
    early = rw.before(op).insert(op.clone({op.x: rows})).result
    replace(rw, op, ops.Reshape(early, op.result.shape))


def conv_bias(op: ops.Binary, rw: Rewriter) -> None:
    """``conv(x, w) + b[:, 1, 1]`` -> ``conv(x, w, b)``."""
    if not isinstance(op, ops.Add):
        return
    for value, bias in either(op):
        conv, reshape = made_by(value, ops.Conv), made_by(bias, ops.Reshape)
        vector = as_weight(reshape.x, 1) if reshape is not None else None
        if conv is None or vector is None or conv.bias is not None or not used_once(value):
            continue
        channel = len(bias.shape) - (value.tensor.rank - 1)
        if same_dim(vector.shape[0], value.shape[1]) and channel >= 0 and not is_one(bias.shape[channel]):
            replace(rw, op, conv.clone({}, bias=vector))
            return


def conv_padding(op: ops.Conv, rw: Rewriter) -> None:
    """Zeros put around the input, as many before as after -> the convolution's own padding."""
    pad = made_by(op.x, ops.Pad)
    if pad is None or pad.value != 0 or op.transposed or pad.low != pad.high or pad.low[:2] != (0, 0):
        return
    extra = [d for d in pad.low[2:] if isinstance(d, int)]
    if len(extra) == len(op.padding):
        wider = tuple(p + e for p, e in zip(op.padding, extra))
        replace(rw, op, op.clone({op.x: pad.x}, padding=wider))


def whole_rows(op: ops.Embedding | ops.Gather, rw: Rewriter) -> None:
    """``gather(w, indices, axis=0)`` of a matrix -> an embedding."""
    if isinstance(op, ops.Gather) and op.axis == 0 and as_weight(op.x, 2) is not None:
        replace(rw, op, ops.Embedding(op.indices, op.x))


PATTERNS: tuple[Pattern, ...] = (
    product_with_weight,
    weight_transposes,
    linear_bias,
    late_reshape,
    conv_bias,
    conv_padding,
    whole_rows,
)
