"""Where scales of a linear layer's input channels can go: into the norm, the values or the up projection before it.

    norm(x) * w        -> linear           w / s, and the columns of the layer * s
    attention(q, k, v) -> linear (o)       the rows of v / s; heads of q that share a head of v share its scales
    act(gate) * up     -> linear (down)    the rows of up / s
    relu(linear)       -> linear           the rows of the first / s

s is positive, so that relu lets it through. The function computes the same, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tilewright.ir import Function, Module, Op, Value, Weight, ops, same_dim
from tilewright.passes.calibration.data import Array
from tilewright.passes.calibration.stream import LAYERS, Layer
from tilewright.passes.match import made_by, used_once
from tilewright.passes.weights import as_weight, derive

Norm = ops.RmsNorm | ops.LayerNorm


@dataclass(frozen=True)
class Rows:
    """The rows ``[start, stop)`` of a layer's weight, and of its bias."""

    layer: Layer
    field: str
    bias: str
    start: int
    stop: int


@dataclass(frozen=True)
class Site:
    """Layers that read one value, and what makes its channels. ``index`` ``[K]`` says which channels share a scale."""

    layers: tuple[Layer, ...]
    target: Norm | Rows
    index: Array

    @property
    def count(self) -> int:
        """How many scales there are."""
        return int(self.index.max()) + 1

    def weights(self) -> list[Weight]:
        """Those that read the channels, ``[N, K]`` each."""
        return [w for op in self.layers for f in fields(op) if (w := as_weight(getattr(op, f), 2)) is not None]

    def shared(self, values: Array, reduce: Any = np.maximum) -> Array:
        """``values`` ``[K]`` of channels, reduced to one for each scale."""
        out = np.zeros(self.count, values.dtype)
        reduce.at(out, self.index, values)
        return out


def fields(op: Layer) -> tuple[str, ...]:
    """The fields that hold the layer's weights."""
    return ("weight",) if isinstance(op, ops.Linear) else ("gate", "up")


def find_sites(function: Function, skip: Callable[[Op, str], None]) -> list[Site]:
    """The sites of a function in its order. ``skip`` hears why a layer has none."""
    groups: dict[Value, list[Layer]] = {}
    for op in function.walk(*LAYERS):
        assert isinstance(op, LAYERS)
        groups.setdefault(root(op.x), []).append(op)
    found = []
    for value, layers in groups.items():
        site = site_of(value, layers)
        if isinstance(site, Site):
            found.append(site)
        else:
            skip(layers[0], site)
    return found


def root(value: Value) -> Value:
    """``value`` before reshapes that keep its channels."""
    reshape = made_by(value, ops.Reshape)
    while reshape is not None and same_dim(reshape.x.shape[-1], reshape.shape[-1]):
        value = reshape.x
        reshape = made_by(value, ops.Reshape)
    return value


def site_of(value: Value, layers: Sequence[Layer]) -> Site | str:
    """The site of ``layers``, which all read ``value``; or why its channels cannot be scaled."""
    for op in layers:
        for weight in (as_weight(getattr(op, f), 2) for f in fields(op)):
            if weight is None:
                return "its weight is computed"
            if len(weight.users) > 1:
                return f"@{weight.name} has {len(weight.users)} users"
    others = [op for op in readers(value) if op not in layers]
    if others:
        return f"{others[0].name} reads its input too"
    target = _target(value)
    if isinstance(target, str):
        return target
    k = int(layers[0].x.shape[-1])
    return Site(tuple(layers), target[0], np.arange(k) if target[1] is None else target[1])


def readers(value: Value) -> list[Op]:
    """What takes ``value``, also behind reshapes that keep its channels."""
    found: list[Op] = []
    for op in value.users:
        keeps = isinstance(op, ops.Reshape) and same_dim(op.x.shape[-1], op.shape[-1])
        found += readers(op.results[0]) if keeps else [op]
    return found


def _target(value: Value) -> tuple[Norm | Rows, Array | None] | str:
    """What makes the channels of ``value``, and which of them share a scale (None: none do)."""
    op = value.owner
    if isinstance(op, (ops.RmsNorm, ops.LayerNorm)):
        shared = [v for v in op.operands[1:] if as_weight(v, 1) is None or not used_once(v)]
        return "the norm's weight is computed, or used elsewhere too" if shared else (op, None)
    if isinstance(op, ops.Relu):
        value, op = op.x, op.x.owner if used_once(op.x) else None
    if isinstance(op, LAYERS) and used_once(value):
        field, bias = ("weight", "bias") if isinstance(op, ops.Linear) else ("up", "up_bias")
        return _rows(Rows(op, field, bias, 0, int(op.result.shape[-1])), None)
    attention = made_by(op.x, ops.Attention) if isinstance(op, ops.Reshape) else None
    if attention is not None and used_once(attention.result):
        return _values(attention, value)
    return f"{op.name if op is not None else 'an argument'} stands before it"


def _rows(rows: Rows, index: Array | None) -> tuple[Rows, Array | None] | str:
    """``rows`` when they can be scaled; else why not."""
    weight, bias = as_weight(getattr(rows.layer, rows.field), 2), getattr(rows.layer, rows.bias)
    if weight is None or (bias is not None and as_weight(bias, 1) is None):
        return "the layer before it has a computed weight or bias"
    if not used_once(weight) or (bias is not None and not used_once(bias)):
        return "the layer before it shares its weight or bias"
    return rows, index


def _values(attention: ops.Attention, value: Value) -> tuple[Rows, Array | None] | str:
    """The rows of the layer that makes the values of ``attention``, whose heads ``value`` ``[..., H * D]`` joins."""
    heads, size, own = (int(d) for d in (attention.result.shape[2], attention.v.shape[3], attention.v.shape[2]))
    split = made_by(attention.v, ops.Reshape)
    if split is None or not used_once(attention.v) or attention.v in (attention.q, attention.k):
        return "the values of the attention before it are not a layer's alone"
    if not same_dim(value.shape[-1], heads * size) or not same_dim(split.x.shape[-1], own * size):
        return "heads are not joined behind the attention as they were split before it"
    rows = _part(split.x, own * size)
    if isinstance(rows, str):
        return rows
    channel = np.arange(heads * size)
    return _rows(rows, channel // size // (heads // own) * size + channel % size)


def _part(value: Value, count: int) -> Rows | str:
    """The rows of the layer that makes ``value``: all of them, or those of a slice that no other slice meets."""
    part = made_by(value, ops.Slice)
    linear = made_by(part.x if part is not None else value, ops.Linear)
    if linear is None or not used_once(value):
        return "the values of the attention before it are not a layer's alone"
    if part is None:
        return Rows(linear, "weight", "bias", 0, count)
    start, stop = int(part.starts[-1]), int(part.stops[-1])
    for other in linear.result.users:
        apart = isinstance(other, ops.Slice) and (int(other.stops[-1]) <= start or int(other.starts[-1]) >= stop)
        if other is not part and not apart:
            return "what makes the values of the attention before it is read as a whole too"
    if any(step != 1 for step in part.steps):
        return "the values of the attention before it are every other row of a layer"
    return Rows(linear, "weight", "bias", start, stop)


# ---- folding -----------------------------------------------------------------------------------------------------


def fold(module: Module, site: Site, scales: Array) -> None:
    """Multiply the columns that read the channels of ``site`` by ``scales`` f32 ``[count]``, divide what makes them."""
    for op in site.layers:
        for field in fields(op):
            _change(module, op, field, partial(times_columns, scales[site.index]))
    if isinstance(site.target, Rows):
        rows = site.target
        for field in (rows.field, rows.bias):
            _change(module, rows.layer, field, partial(divide_rows, scales, rows.start, rows.stop))
        return
    norm = site.target
    offset = norm.offset if isinstance(norm, ops.RmsNorm) else 0.0
    if norm.weight is None:
        _give_weight(module, norm, 1 / scales - offset)
    else:
        _change(module, norm, "weight", partial(divide, scales, offset))
    if isinstance(norm, ops.LayerNorm):
        _change(module, norm, "bias", partial(divide, scales, 0.0))


def _change(module: Module, op: Op, field: str, make: Callable[[Array], Array]) -> None:
    """Give ``op`` what ``make`` computes of its weight ``field``, when the artifact is written."""
    weight = getattr(op, field)
    if weight is None:
        return
    assert isinstance(weight, Weight)
    name = weight.name.removesuffix(".scaled")
    if name != weight.name and len(weight.users) == 1:
        del module.weights[weight.name]  # a step on the way: the new one takes its name
    op.replace_operand(weight, derive(module, f"{name}.scaled", weight.tensor, [weight], make))


def _give_weight(module: Module, norm: Norm, values: Array) -> None:
    kind = norm.x.dtype
    weight = module.constant(values.astype(kind.np), f"{norm.loc.module or 'norm'}.scale")
    norm.weight = weight
    weight.users[norm] = None


def times_columns(scales: Array, weight: Array) -> Array:
    return (weight.astype(np.float32) * scales).astype(weight.dtype)


def divide_rows(scales: Array, start: int, stop: int, weight: Array) -> Array:
    out = weight.astype(np.float32)
    out[start:stop] /= scales.reshape(-1, *(1,) * (out.ndim - 1))
    return out.astype(weight.dtype)


def divide(scales: Array, offset: float, weight: Array) -> Array:
    return ((weight.astype(np.float32) + np.float32(offset)) / scales - np.float32(offset)).astype(weight.dtype)
