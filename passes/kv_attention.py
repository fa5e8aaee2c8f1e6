"""Causal ``nn.attention(q, k, v)`` over tokens -> ``kv.append(@kv.0, k, v, start)``, ``kv.attend(q, cache, start)``.

Values that are the first components of keys are not stored a second time (``values=keys``, without v). With pages both take
the ``table`` too; over kept tokens it is ``kv.retain``, with the ``count`` of a call's tokens. With sinks by the options
``kv.attend`` takes the queries a second time, turned by the rope as if they stood at the end of the sinks and the window:
that is how far from the sinks they are taken to be. The first tokens that an attention sees of its own are as far away as
they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tilewright.ir import CONTIGUOUS, Builder, KVType, Module, Ring, Value, dim_symbols, ops
from tilewright.passes.kv_axes import PLAIN, Axes
from tilewright.passes.kv_bias import Biases
from tilewright.passes.kv_mask import Sight, read_sight
from tilewright.passes.kv_options import KvOptions
from tilewright.passes.kv_shapes import ShapeValues, refuse
from tilewright.passes.kv_values import begins_with

_KINDS = {
    "ring": "ring does not keep apart; leave out window and sinks",
    "kept": "cache of kept tokens does not keep apart; give another kind",
}


@dataclass
class Attentions:
    """Gives each attention over tokens its cache. ``start`` ``[B]`` is the position of a call's first token, ``count``
    ``[B]``, for kept tokens, how many of them are of the text."""

    module: Module
    shapes: ShapeValues
    biases: Biases
    start: Value
    table: Value | None
    count: Value | None
    options: KvOptions
    length: int
    turn: Callable[[ops.Attention, int], Value]
    """Makes the queries of an attention as they would be at a position, where they stand behind it."""
    sights: list[Sight] = field(default_factory=list)
    """What each attention sees, in order; for the report."""
    _whole: int = 0
    _known: dict[tuple[Any, ...], Sight] = field(default_factory=dict)

    def cache(self, op: ops.Attention, axes: Mapping[Value, Axes]) -> Value:
        """Put the cached form before ``op`` and give its result."""
        self._check(op, axes)
        sight = self.options.sight(self._sight(op))
        assert op.parent is not None
        builder = Builder(op.parent, op, op.loc)
        kind = self._type(op, sight)
        bias = None if op.bias is None else self._bias(op, kind, sight, builder)
        if sight.first > kind.sinks:
            raise refuse(op, f"sees the first {sight.first} tokens beside a window, as a ring does: give kind=ring")
        state = self.module.state(f"kv.{len(self.module.states)}", kind)
        table = self.table if kind.page else None
        turned = isinstance(kind.layout, Ring) and self.options.sinks
        far = self.turn(op, kind.sinks + kind.layout.window - 1) if turned else None  # type: ignore[union-attr]
        cache = builder(ops.Append, state, op.k, op.v if kind.own_vdim else None, self.start, table)
        self.sights.append(sight)
        given: dict[str, Any] = {"scale": op.scale, "window": sight.window, "chunk": sight.chunk, "softcap": op.softcap}
        if kind.budget:
            given |= {"count": self.count, **self.options.retention}
            return builder.add_all(ops.Retain(op.q, cache, self.start, bias, op.sinks, **given, loc=op.loc))[0]
        return builder(ops.Attend, op.q, cache, self.start, bias, op.sinks, **given, table=table, q_sinks=far)

    def _bias(self, op: ops.Attention, kind: KVType, sight: Sight, builder: Builder) -> Value | None:
        if self.options.is_endless and op.bias is not None and self.shapes.varies(op.bias):
            raise refuse(op, f"adds a bias by position, which a {_KINDS[self.options.kind]}")
        return self.biases.place(op, sight, builder)

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

    def _type(self, op: ops.Attention, sight: Sight) -> KVType:
        heads, dim, vdim = op.k.shape[2], op.k.shape[3], op.v.shape[3]
        if dim_symbols([heads, dim, vdim]):
            raise refuse(op, f"has heads of symbolic size: {op.k.type}")
        plain = KVType(int(heads), int(dim), int(vdim), self.length, op.k.dtype)
        kind = self.options.type(plain, sight)
        if not kind.is_coded and begins_with(op.k, op.v):
            kind = replace(kind, values="keys")
        if kind.has_summary and self._whole < self.options.whole_layers:
            kind, self._whole = replace(kind, summary="none"), self._whole + 1
        by_position = op.bias is not None and self.shapes.varies(op.bias)
        return replace(kind, layout=CONTIGUOUS) if by_position and isinstance(kind.layout, Ring) else kind
