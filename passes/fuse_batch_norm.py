"""``conv(x, @w) * @scale + @shift`` -> ``conv(x, @w.scaled, @shift)``: batch norm goes into the weights before it.

Also for linear layers. Weights are scaled when the artifact is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tilewright.ir import DType, Module, Rewriter, Shape, TensorType, Value, Weight, ops, product, rewrite, same_dim
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.match import either, padded, replace, used_once
from tilewright.passes.weights import as_weight, derive

Layer = ops.Conv | ops.Linear


@dataclass(frozen=True)
class FuseBatchNorm(Pass):
    """Folds a factor and a term for each output channel into the layer that makes the channels."""

    name: ClassVar[str] = "fuse-batch-norm"

    def run(self, module: Module, ctx: PassContext) -> bool:
        return ctx.take(rewrite(module, scaled, shifted, functions=module.entries()))


def _channels(value: Value, layer: Layer) -> Weight | None:
    """``value`` if it is a weight with one number for each output channel of ``layer``, or one for all."""
    weight = as_weight(value, len(value.shape))
    shape, rank = layer.result.shape, len(layer.result.shape)
    axis = 1 if isinstance(layer, ops.Conv) else rank - 1
    if weight is None or len(weight.shape) > rank:
        return None
    full = padded(weight.shape, rank)
    fits = same_dim(full[axis], shape[axis]) and same_dim(product(full), shape[axis])
    return weight if fits else None


def _pair(op: ops.Binary) -> tuple[Layer, Weight] | None:
    """The layer and the weight for its channels that ``op`` takes."""
    for a, b in either(op):
        layer = a.owner
        if isinstance(layer, (ops.Conv, ops.Linear)) and used_once(a):
            weight = _channels(b, layer)
            if weight is not None and weight.dtype == a.dtype:
                return layer, weight
    return None


def scaled(op: ops.Binary, rw: Rewriter) -> None:
    """``conv(x, w, b) * s`` -> ``conv(x, w * s, b * s)``."""
    pair = _pair(op) if isinstance(op, ops.Mul) else None
    if pair is None:
        return
    layer, scale = pair
    weight, bias = as_weight(layer.weight, len(layer.weight.shape)), layer.bias
    if weight is None or not used_once(weight) or (bias is not None and as_weight(bias, 1) is None):
        rw.skip(op, "the layer's weight is computed, or used elsewhere too")
        return
    if weight.dtype is DType.f16:
        rw.skip(op, "small factors would make weights of f16 vanish")
        return
    if weight.dtype != scale.dtype or (isinstance(layer, ops.Conv) and layer.transposed):
        rw.skip(op, "the layer is transposed, or has another element type than the factor")
        return
    new = derive(rw.module, f"{weight.name}.scaled", weight.tensor, [weight, scale], times_rows)
    parts = [v for v in (as_weight(bias, 1), scale) if v is not None]
    moved = derive(rw.module, f"{parts[0].name}.scaled", parts[0].tensor, parts, times_rows) if bias else None
    replace(rw, op, layer.clone({}, weight=new, bias=moved))


def times_rows(weight: Any, scale: Any) -> Any:
    return (weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))).astype(weight.dtype)


def shifted(op: ops.Binary, rw: Rewriter) -> None:
    """``conv(x, w) + t`` -> ``conv(x, w, t)``, ``conv(x, w, b) + t`` -> ``conv(x, w, b + t)``."""
    pair = _pair(op) if isinstance(op, ops.Add) else None
    if pair is None:
        return
    layer, shift = pair
    bias = as_weight(layer.bias, 1)
    if layer.bias is not None and bias is None:
        rw.skip(op, "the layer's bias is computed")
        return
    shape: Shape = (product(shift.shape),)
    parts = [shift] if bias is None else [shift, bias]
    new = derive(rw.module, f"{shift.name}.bias", TensorType(shape, shift.dtype), parts, summed)
    replace(rw, op, layer.clone({}, bias=new))


def summed(*arrays: Any) -> Any:
    return np.sum([a.reshape(-1) for a in arrays], axis=0, dtype=arrays[0].dtype)
