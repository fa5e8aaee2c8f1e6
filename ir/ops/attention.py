"""``nn.attention``. Layout everywhere: batch, sequence, heads, size of a head."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright.ir.core import Env, Op, Value
from tilewright.ir.ops import numerics as num
from tilewright.ir.ops.shapes import expect_broadcast, expect_dim, expect_rank
from tilewright.ir.types import Dim, DType, Type, as_dim, product


def visible(queries: Any, keys: Any, causal: bool, window: int, window_right: int, chunk: int, first: int = 0) -> Any:
    """Which keys (positions ``[T]`` or ``[.., S, T]``) queries (positions ``[.., S]``) attend to: bool ``[.., S, T]``."""
    q, k = np.asarray(queries)[..., :, None], np.asarray(keys)
    keep = np.ones(np.broadcast_shapes(q.shape, k.shape), bool)
    if causal:
        keep &= k <= q
    if window > 0:
        keep &= (k > q - window) | (k < first)
    if window_right > 0:
        keep &= k < q + window_right
    if chunk > 0:
        keep &= k // chunk == q // chunk
    return keep


def attend(q: Any, k: Any, v: Any, keep: Any, bias: Any, sinks: Any, scale: float, softcap: float) -> Any:
    """Scaled dot-product attention in f32: q ``[B, S, Hq, D]``, k, v ``[B, T, Hkv, ...]``.

    ``keep`` and ``bias`` are ``[B|1, Hq|1, S, T]``; see :class:`Attention`.
    """
    return average(products(q, k), v, keep, bias, sinks, scale, softcap).astype(q.dtype)


def products(q: Any, k: Any) -> Any:
    """What queries ``[B, S, Hq, D]`` and keys ``[B, T, Hkv, D]`` give: f32 ``[B, Hq, S, T]``."""
    keys = np.repeat(num.wide(k), q.shape[2] // k.shape[2], axis=2)
    return num.wide(q).transpose(0, 2, 1, 3) @ keys.transpose(0, 2, 3, 1)


def average(scores: Any, v: Any, keep: Any, bias: Any, sinks: Any, scale: float, softcap: float) -> Any:
    """Values ``[B, T, Hkv, Dv]`` weighted by products of queries and keys: f32 ``[B, S, Hq, Dv]``."""
    return mixed(weigh(scores, keep, bias, sinks, scale, softcap), v)


def mixed(weights: Any, v: Any) -> Any:
    """Values ``[B, T, Hkv, Dv]`` by weights ``[B, Hq, S, T]``: f32 ``[B, S, Hq, Dv]``."""
    values = np.repeat(num.wide(v), weights.shape[1] // v.shape[2], axis=2).transpose(0, 2, 1, 3)
    return np.ascontiguousarray((weights @ values).transpose(0, 2, 1, 3))


def weigh(scores: Any, keep: Any, bias: Any, sinks: Any, scale: float, softcap: float, temperature: float = 1.0) -> Any:
    """The weights that products of queries and keys ``[B, Hq, S, T]`` give the keys: f32, a query's add up to 1 at most."""
    scores = scores * np.float32(scale)
    if softcap > 0:
        scores = softcap * np.tanh(scores / softcap)
    if bias is not None:
        scores = scores + num.wide(bias)
    scores = np.where(keep, scores, -np.inf)
    if sinks is None:
        return num.softmax(scores / np.float32(temperature))
    column = np.broadcast_to(num.wide(sinks).reshape(1, -1, 1, 1), (*scores.shape[:3], 1))
    return num.softmax(np.concatenate([scores, column], -1) / np.float32(temperature))[..., :-1]


class Attention(Op):
    """Attention of q ``[B, S, Hq, D]`` over k ``[B, T, Hkv, D]``, v ``[B, T, Hkv, Dv]`` -> ``[B, S, Hq, Dv]``.

    Hkv divides Hq. Positions are aligned to the end: query i stands at ``i + T - S``. ``mask`` (bool, true attends) and
    ``bias`` (float, added to the scaled scores) broadcast to ``[B, Hq, S, T]``; ``padding`` ``[B, T]`` (bool) is true
    for real keys. ``window > 0`` keeps keys above ``query - window`` and the ``first`` ones, ``window_right > 0``
    those below ``query + window_right``, ``chunk > 0`` those of the query's own chunk.

    ``softcap > 0`` bounds scores by ``softcap * tanh(score / softcap)`` (Gemma 2); ``sinks`` ``[Hq]`` adds one score a
    head to the denominator alone (gpt-oss). A query that sees no key gives zeros.
    """

    name = "nn.attention"
    q: Value
    k: Value
    v: Value
    mask: Value | None = None
    bias: Value | None = None
    sinks: Value | None = None
    padding: Value | None = None
    scale: float = 1.0
    causal: bool = False
    window: int = -1
    window_right: int = -1
    chunk: int = 0
    softcap: float = 0.0
    first: int = 0

    def infer(self) -> tuple[Type, ...]:
        self.expect(self.first == 0 or self.window > 0, f"first={self.first} stays where a window moves on; there is none")
        for what, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            expect_rank(self, what, x.shape, 4)
        expect_dim(self, "k, size of a head", self.k.shape[3], self.q.shape[3])
        for axis in range(3):
            expect_dim(self, f"v, axis {axis}", self.v.shape[axis], self.k.shape[axis])
        expect_groups(self, self.q.shape[2], self.k.shape[2])
        self.expect(self.mask is None or self.mask.dtype is DType.bool, "the mask must be bool")
        scores = (self.q.shape[0], self.q.shape[2], self.q.shape[1], self.k.shape[1])
        for what, extra in (("mask", self.mask), ("bias", self.bias)):
            if extra is not None:
                expect_broadcast(self, what, extra.shape, scores)
        if self.padding is not None:
            expect_rank(self, "padding", self.padding.shape, 2)
            self.expect(self.padding.dtype is DType.bool, "padding must be bool")
        return (self.q.tensor.with_shape((*self.q.shape[:3], self.v.shape[3])),)

    def evaluate(
        self, env: Env, q: Any, k: Any, v: Any, mask: Any, bias: Any, sinks: Any, padding: Any
    ) -> Any:
        s, t = q.shape[1], k.shape[1]
        where = np.arange(s) + t - s
        keep = visible(where, np.arange(t), self.causal, self.window, self.window_right, self.chunk, self.first)
        keep = keep if mask is None else keep & mask
        keep = keep if padding is None else keep & padding[:, None, None, :]
        return attend(q, k, v, keep, bias, sinks, self.scale, self.softcap)

    def flops(self) -> Dim:
        b, s, h, d = self.q.shape
        return as_dim(2 * product((b, s, h, self.k.shape[1])) * (d + self.v.shape[3]))


def expect_groups(op: Op, heads: Dim, kv_heads: Dim) -> None:
    """Fail unless the heads of queries divide over those of keys."""
    fits = isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads == 0
    op.expect(fits, f"{heads} query heads do not divide over {kv_heads} key heads")
