"""Causal ``nn.attention(q, k, v)`` over tokens -> ``kv.append(@kv.0, k, v, start)``, ``kv.attend(q, cache, start)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tilewright.ir import Builder, DType, KVType, Module, Value, dim_symbols, ops
from tilewright.passes.kv_axes import PLAIN, Axes
from tilewright.passes.kv_bias import Biases
from tilewright.passes.kv_mask import Sight, read_sight
from tilewright.passes.kv_shapes import ShapeValues, refuse


@dataclass
class Attentions:
    """Gives each attention over tokens its cache. ``start`` ``[B]`` is the position of a call's first token."""

    module: Module
    shapes: ShapeValues
    biases: Biases
    start: Value
    dtype: DType | None
    sights: list[Sight] = field(default_factory=list)
    """What each attention sees, in order; for the report."""
    _known: dict[tuple[Any, ...], Sight] = field(default_factory=dict)

    def cache(self, op: ops.Attention, axes: Mapping[Value, Axes]) -> Value:
        """Put the cached form before ``op`` and give its result."""
        self._check(op, axes)
        sight = self._sight(op)
        assert op.parent is not None
        builder = Builder(op.parent, op, op.loc)
        bias = self.biases.place(op, sight, builder)
        state = self.module.state(f"kv.{len(self.module.states)}", self._type(op))
        cache = builder(ops.Append, state, op.k, op.v, self.start)
        self.sights.append(sight)
        return builder(
            ops.Attend, op.q, cache, self.start, bias, op.sinks,
            scale=op.scale, window=sight.window, chunk=sight.chunk, softcap=op.softcap,
        )  # fmt: skip

    def _sight(self, op: ops.Attention) -> Sight:
        """What ``op`` sees; layers that share a mask share its evaluation."""
        key = (op.mask, op.bias, op.padding, op.causal, op.window, op.window_right, op.chunk)
        if key not in self._known:
            self._known[key] = read_sight(self.shapes, op, self.biases.square_numbers(op.bias))
        return self._known[key]

    def _check(self, op: ops.Attention, axes: Mapping[Value, Axes]) -> None:
        for what in ("q", "k", "v"):
            value = getattr(op, what)
            if value not in axes:
                raise refuse(op, f"has a {what} that does not depend on the tokens, and others that do")
            if axes[value] != PLAIN:
                raise refuse(op, f"has its positions on an unusual axis of {what}: {value.type}")
        for what in ("mask", "bias", "sinks", "padding"):
            value = getattr(op, what)
            if value is not None and value in axes:
                raise refuse(op, f"has a {what} computed from the tokens: it cannot be known for those in the cache")
        if op.sinks is not None and self.shapes.varies(op.sinks):
            raise refuse(op, "has sinks that depend on how many tokens there are")

    def _type(self, op: ops.Attention) -> KVType:
        heads, dim, vdim = op.k.shape[2], op.k.shape[3], op.v.shape[3]
        if dim_symbols([heads, dim, vdim]):
            raise refuse(op, f"has heads of symbolic size: {op.k.type}")
        return KVType(int(heads), int(dim), int(vdim), self.shapes.length, self.dtype or op.k.dtype)
