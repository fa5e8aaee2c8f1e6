"""The opaque ops that a traced graph carries for attention, masks and experts. They have a shape and no kernel: they
exist only while tracing, and :mod:`tilewright.frontend.aten_hooks` turns them into IR."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("tilewright", "DEF")  # the ops live as long as this object
_LIBRARY.define(
    "mask(Tensor? padding, SymInt batch, SymInt queries, SymInt keys, SymInt query_offset, SymInt key_offset, "
    "bool causal, int left, int right, int chunk) -> Tensor"
)
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? sinks, float scale, bool causal, "
    "float softcap) -> Tensor"
)
_LIBRARY.define(
    "experts(Tensor x, Tensor indices, Tensor weights, Tensor up, Tensor down, str act, bool gated, bool transposed)"
    " -> Tensor"
)


@torch.library.register_fake("tilewright::mask")
def _mask_shape(padding: Tensor | None, batch: int, queries: int, keys: int, *_: Any) -> Tensor:
    return torch.empty((batch, 1, queries, keys), dtype=torch.bool)


@torch.library.register_fake("tilewright::attention")
def _attention_shape(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


@torch.library.register_fake("tilewright::experts")
def _experts_shape(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)
