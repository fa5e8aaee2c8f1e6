"""Attention, masks and experts: the ops of :mod:`tilewright.frontend.opaque`, and torch's own attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from tilewright.frontend import opaque  # noqa: F401  (defines torch.ops.tilewright)
from tilewright.frontend.table import Context, lowers
from tilewright.ir import ops
from tilewright.ir.core import Value
from tilewright.ir.types import Dim, DType, as_dim, same_dim

aten, ours = torch.ops.aten, torch.ops.tilewright


@dataclass
class LazyMask:
    """A mask that says what it means. An attention takes its attributes; anything else has it built."""

    padding: Value | None
    batch: Dim
    queries: Dim
    keys: Dim
    shift: Dim  # query i stands at position i + shift, key j at j
    causal: bool
    left: int
    right: int
    chunk: int
    built: Value | None = None

    def fits(self, q: Value, k: Value) -> bool:
        """Whether nn.attention, which aligns positions to the end, gives the queries the same positions."""
        positional = self.causal or self.left >= 0 or self.right >= 0 or self.chunk > 0
        sizes = same_dim(self.queries, q.shape[1]) and same_dim(self.keys, k.shape[1])
        return sizes and (not positional or same_dim(self.shift, as_dim(k.shape[1] - q.shape[1])))

    def build(self, c: Context) -> Value:
        """The mask as a bool tensor ``[batch, 1, queries, keys]``."""
        if self.built is None:
            self.built = c.broadcast(self._conditions(c), (self.batch, 1, self.queries, self.keys))
        return self.built

    def _conditions(self, c: Context) -> Value:
        query, key = c.iota(self.queries, 2, 4, self.shift), c.iota(self.keys, 3, 4)
        parts = [c(ops.Le, key, query)] if self.causal else []
        if self.left >= 0:
            parts.append(c(ops.Gt, key, c(ops.Sub, query, c.value(self.left, DType.i64))))
        if self.right >= 0:
            parts.append(c(ops.Lt, key, c(ops.Add, query, c.value(self.right, DType.i64))))
        if self.chunk > 0:
            size = c.value(self.chunk, DType.i64)
            parts.append(c(ops.Eq, c(ops.FloorDiv, key, size), c(ops.FloorDiv, query, size)))
        if self.padding is not None:
            parts.append(c.reshape(self.padding, (self.batch, 1, 1, self.keys)))
        keep = parts[0] if parts else c.full((1, 1, 1, 1), True, DType.bool)
        for part in parts[1:]:
            keep = c(ops.And, keep, part)
        return keep


def build_lazy(c: Context, arg: Any) -> Any:
    """``arg`` with every mask in it built."""
    if isinstance(arg, (list, tuple)):
        return [build_lazy(c, a) for a in arg]
    return arg.build(c) if isinstance(arg, LazyMask) else arg


@lowers(ours.mask.default)
def mask(
    c: Context,
    padding: Value | None,
    batch: Dim,
    queries: Dim,
    keys: Dim,
    query_offset: Dim,
    key_offset: Dim,
    *attributes: Any,
) -> LazyMask:
    if padding is not None:
        padding = c.slice(c.cast(padding, DType.bool), 1, key_offset, keys)
    return LazyMask(padding, batch, queries, keys, as_dim(query_offset - key_offset), *attributes)


def _attend(c: Context, q: Value, k: Value, v: Value, mask: Any, fields: dict[str, Any]) -> Value:
    """One nn.attention over q, k, v ``[B, S, H, D]``, with what ``mask`` says."""
    if isinstance(mask, LazyMask) and mask.fits(q, k):
        fields["padding"] = mask.padding
        fields["causal"] = mask.causal
        fields |= {"window": mask.left, "window_right": mask.right, "chunk": mask.chunk}
    elif mask is not None:
        mask = build_lazy(c, mask)
        kind = "mask" if mask.dtype is DType.bool else "bias"
        other = fields.get(kind)
        fields[kind] = mask if other is None else c(ops.And if kind == "mask" else ops.Add, other, mask)
    return c(ops.Attention, q, k, v, **fields)


@lowers(ours.attention.default, lazy=True)
def attention(
    c: Context,
    q: Value,
    k: Value,
    v: Value,
    mask: Any,
    bias: Any,
    sinks: Value | None,
    scale: float,
    causal: bool,
    softcap: float,
) -> Value:
    q, k, v = (c.swap(x, 1, 2) for x in (q, k, v))
    fields = {"bias": build_lazy(c, bias), "sinks": sinks, "scale": scale, "causal": causal, "softcap": softcap}
    return _attend(c, q, k, v, mask, fields)


@lowers(aten.scaled_dot_product_attention.default, lazy=True)
def scaled_dot_product_attention(
    c: Context,
    q: Value,
    k: Value,
    v: Value,
    mask: Any = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    if dropout:
        c.fail("with dropout; call model.eval(), or pass dropout_p only when training")
    if scale is None:
        if not isinstance(q.shape[-1], int):
            c.fail(f"over heads of the varying size {q.shape[-1]}; give a scale")
        scale = 1 / math.sqrt(q.shape[-1])
    queries, keys, lead = q.shape[-2], k.shape[-2], q.shape[:-2]
    q, k, v = (c.swap(_four_axes(c, x), 1, 2) for x in (q, k, v))
    if isinstance(mask, Value):
        mask = _mask_axes(c, mask, lead, q.shape[0])
    fields: dict[str, Any] = {"scale": scale}
    if is_causal and same_dim(queries, keys):
        fields["causal"] = True
    elif is_causal:  # torch aligns it to the start
        fields["mask"] = LazyMask(None, 1, queries, keys, 0, True, -1, -1, 0).build(c)
    return c.reshape(c.swap(_attend(c, q, k, v, mask, fields), 1, 2), (*lead, queries, v.shape[-1]))


def _four_axes(c: Context, x: Value) -> Value:
    """``[..., S, D]`` as ``[B, H, S, D]``: missing axes are 1, further ones join the batch."""
    lead, rest = x.shape[:-2], x.shape[-2:]
    if len(lead) == 2:
        return x
    heads = lead[-1] if len(lead) > 2 else 1
    return c.reshape(x, (-1 if lead else 1, heads, *rest))


def _mask_axes(c: Context, mask: Value, lead: Any, batch: Dim) -> Value:
    """A mask that broadcasts to ``[*lead, S, T]`` as one that broadcasts to ``[B, H, S, T]``."""
    rank = len(lead) + 2
    mask = c.reshape(mask, (*[1] * (rank - mask.tensor.rank), *mask.shape))
    if len(lead) == 1:
        return c.unsqueeze(mask, 1)
    if len(lead) == 0:
        return c.reshape(mask, (1, 1, *mask.shape))
    if len(lead) == 2:
        return mask
    full = c.broadcast(mask, (*lead[:-1], *mask.shape[-3:]))
    return c.reshape(full, (batch, *mask.shape[-3:]))


@lowers(ours.experts.default)
def experts(
    c: Context, x: Value, indices: Value, weights: Value, up: Value, down: Value, act: str, gated: bool, flipped: bool
) -> Value:
    if flipped:
        up, down = c.transposed(up), c.transposed(down)
    return c(ops.Experts, x, indices, c.cast(weights, x.dtype), up, down, act=act, gated=gated)
