"""Stateless decoders of a few lines of IR, ``forward(ids[B, S]) -> logits[B, S, V]``, in the spellings models use."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tilewright.ir import Builder, DType, Function, Loc, Module, Return, TensorType, Value, ops, sym

V, H, D, LONGEST = 40, 16, 8, 64
B, S = sym("B"), sym("S")
Spell = Callable[["Decoder"], Value]


@dataclass
class Decoder:
    """Builds a model; ``mask`` and ``bias`` spell what attention gets, ``positions`` adds to the embeddings."""

    heads: int = 2
    kv_heads: int = 2
    layers: int = 2
    rope: bool = False
    merged: bool = False
    positions: Spell | None = None
    mask: Spell | None = None
    bias: Spell | None = None
    attention: dict[str, Any] = field(default_factory=lambda: {"causal": True})
    sinks: bool = False
    middle: Callable[[Decoder, Value], Value] | None = None
    after: Callable[[Decoder, Value], Value] | None = None

    def build(self) -> Module:
        self.module = Module("tiny", dims={"B": (1, 8), "S": (1, LONGEST)}, meta={"task": "causal-lm"})
        self.rng = np.random.default_rng(0)
        function = self.module.add(Function("forward"))
        self.ids = function.arg("input_ids", TensorType((B, S), DType.i64))
        self.b = Builder(function, loc=Loc("model"))
        x: Value = self.b(ops.Embedding, self.ids, self.weight("embed", V, H, gain=1.0))
        if self.positions:
            x = self.b(ops.Add, x, self.positions(self))
        for i in range(self.layers):
            with self.b.at(Loc(f"model.layers.{i}")):
                x = self.layer(i, x)
        x = self.b(ops.RmsNorm, x, self.weight("norm", H))
        logits = self.b(ops.Linear, x, self.weight("head", V, H))
        if self.after:
            logits = self.after(self, logits)
        self.b.insert(Return((logits,)))
        return self.module

    def weight(self, name: str, *shape: int, gain: float = 2.0) -> Value:
        if name in self.module.weights:
            return self.module.weights[name]
        data = self.rng.standard_normal(shape) * gain / math.sqrt(shape[-1] if len(shape) > 1 else 4 * gain**2)
        return self.module.constant((data + (len(shape) == 1)).astype(np.float32), name)

    def layer(self, i: int, x: Value) -> Value:
        b = self.b
        h = b(ops.RmsNorm, x, self.weight(f"{i}.norm", H))
        heads = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        q, k, v = (self.split(b(ops.Linear, h, self.weight(f"{i}.{n}", c * D, H)), c) for n, c in heads.items())
        if self.rope:
            cos, sin = self.rope_table(ops.Cos), self.rope_table(ops.Sin)
            q, k = b(ops.Rope, q, cos, sin), b(ops.Rope, k, cos, sin)
        mask, bias = self.mask and self.mask(self), self.bias and self.bias(self)
        sinks = self.weight(f"{i}.sinks", self.heads) if self.sinks else None
        y = b(ops.Attention, q, k, v, mask, bias, sinks, scale=D**-0.5, **self.attention)
        y = b(ops.Reshape, y, (B, S, self.heads * D))
        x = b(ops.Add, x, b(ops.Linear, y, self.weight(f"{i}.o", H, self.heads * D)))
        if self.middle:
            x = self.middle(self, x)
        h = b(ops.Reshape, x, (B * S, H)) if self.merged else x
        h = b(ops.Gelu, b(ops.Linear, h, self.weight(f"{i}.up", 2 * H, H)))
        h = b(ops.Linear, h, self.weight(f"{i}.down", H, 2 * H))
        return b(ops.Add, x, b(ops.Reshape, h, (B, S, H)) if self.merged else h)

    def split(self, x: Value, heads: int) -> Value:
        return self.b(ops.Reshape, x, (B, S, heads, D))

    def rope_table(self, fn: Any) -> Value:
        """``[1, S, D]``"""
        b = self.b
        inverse = 0.2 ** (np.arange(0, D, 2) / D).astype(np.float32)
        at = b(ops.Cast, b(ops.Reshape, b(ops.Iota, S, DType.i64), (1, S, 1)), DType.f32)
        freqs = b(ops.Mul, at, self.module.constant(inverse, "inv_freq"))
        return b(fn, b(ops.Concat, (freqs, freqs), 2))

    # -- spellings of positions, masks and biases ------------------------------------------------------------------

    def iota(self, axis: int, rank: int = 2, dtype: DType = DType.i64) -> Value:
        """Positions along ``axis`` of ``rank``."""
        x = self.b(ops.Iota, S, DType.i64)
        x = self.b(ops.Reshape, x, [S if i == axis else 1 for i in range(rank)])
        return x if dtype is DType.i64 else self.b(ops.Cast, x, dtype)

    def scalar(self, value: float, dtype: DType = DType.i64) -> Value:
        return self.b(ops.Full, (), value, dtype)

    def distance(self) -> Value:
        """i64 ``[S, S]``: query minus key."""
        return self.b(ops.Sub, self.iota(0), self.iota(1))


def learned(m: Decoder) -> Value:
    return m.b(ops.Embedding, m.b(ops.Iota, S, DType.i64), m.weight("positions", LONGEST, H))


def learned_slice(m: Decoder) -> Value:
    table = m.weight("positions", LONGEST, H)
    return m.b(ops.Slice, table, (0, 0), (S, H), (1, 1))


def learned_from_two(m: Decoder) -> Value:
    """OPT: positions are a running sum of the mask, plus two."""
    ones = m.b(ops.Full, (B, S), 1, DType.i64)
    at = m.b(ops.Add, m.b(ops.CumSum, ones, 1), m.scalar(1))
    return m.b(ops.Embedding, at, m.weight("positions", LONGEST + 2, H))


def tril(m: Decoder) -> Value:
    """``[1, 1, S, S]`` cut out of a buffer of the whole context."""
    buffer = m.module.constant(np.tril(np.ones((1, 1, LONGEST, LONGEST), np.bool_)), "tril")
    return m.b(ops.Slice, buffer, (0, 0, 0, 0), (1, 1, S, S), (1, 1, 1, 1))


def window_mask(m: Decoder) -> Value:
    near = m.b(ops.Lt, m.distance(), m.scalar(5))
    return m.b(ops.And, near, m.b(ops.Ge, m.distance(), m.scalar(0)))


def chunk_mask(m: Decoder) -> Value:
    def chunk(x: Value) -> Value:
        return m.b(ops.FloorDiv, x, m.scalar(4))

    same = m.b(ops.Eq, chunk(m.iota(0)), chunk(m.iota(1)))
    return m.b(ops.And, same, m.b(ops.Ge, m.distance(), m.scalar(0)))


def odd_mask(m: Decoder) -> Value:
    """Causal, and blind for every other token."""
    even = m.b(ops.Eq, m.b(ops.Mod, m.distance(), m.scalar(2)), m.scalar(0))
    return m.b(ops.And, even, m.b(ops.Ge, m.distance(), m.scalar(0)))


def float_mask(m: Decoder) -> Value:
    keep = m.b(ops.Ge, m.distance(), m.scalar(0))
    low = float(np.finfo(np.float32).min)
    return m.b(ops.Where, keep, m.scalar(0.0, DType.f32), m.scalar(low, DType.f32))


def slopes(m: Decoder) -> Value:
    return m.module.constant(np.array([0.5, 0.0625], np.float32).reshape(2, 1, 1), "slopes")


def alibi_key(m: Decoder) -> Value:
    """``[1, 2, 1, S]``, rising along the keys and ending at zero, as in MPT."""
    at = m.b(ops.Sub, m.b(ops.Iota, S, DType.i64), m.b(ops.Sub, m.b(ops.SizeOf, S), m.scalar(1)))
    at = m.b(ops.Cast, m.b(ops.Reshape, at, (1, 1, S)), DType.f32)
    return m.b(ops.Reshape, m.b(ops.Mul, at, slopes(m)), (1, 2, 1, S))


def alibi_distance(m: Decoder) -> Value:
    """``[2, S, S]``: minus the distance times a slope."""
    back = m.b(ops.Cast, m.b(ops.Neg, m.distance()), DType.f32)
    return m.b(ops.Mul, m.b(ops.Reshape, back, (1, S, S)), slopes(m))


def relative(m: Decoder) -> Value:
    """``[1, 2, S, S]``: a learned number for each distance up to 12, as in T5."""
    near = m.b(ops.Minimum, m.b(ops.Maximum, m.distance(), m.scalar(0)), m.scalar(12))
    found = m.b(ops.Embedding, near, m.weight("relative", 13, 2))
    return m.b(ops.Reshape, m.b(ops.Transpose, found, (2, 0, 1)), (1, 2, S, S))


def uneven(m: Decoder) -> Value:
    """``[1, 1, S, S]``: a bias that no rule shortens: sin(query * key)."""
    both = m.b(ops.Cast, m.b(ops.Mul, m.iota(0), m.iota(1)), DType.f32)
    return m.b(ops.Reshape, m.b(ops.Sin, both), (1, 1, S, S))
