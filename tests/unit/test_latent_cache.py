"""latent-cache against the model as it was: what the cut finds, and attention that has taken in matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.models.latent_decoder import RANK, LatentDecoder
from tests.models.tiny_decoder import Decoder
from tests.unit.test_kv_layout import cached, forward, prompts
from tests.unit.test_kv_layout_kinds import Run, last_logits
from tilewright.ir import Builder, DType, Function, Module, PassError, Return, TensorType, Value, interpret, ops, sym
from tilewright.passes import PassContext, Pipeline
from tilewright.passes.latent_cache import LatentCache
from tilewright.passes.latent_cut import bytes_of, stored_for

Array = np.ndarray[Any, Any]
B, S, X = sym("B"), sym("S"), 48


class Model:
    """``forward(q [B, S, Hq, n], x [B, S, 48])``: attention of keys and values that are made of x."""

    def __init__(self, heads: int, size: int) -> None:
        self.module, self.rng = Module("m", dims={"B": (1, 4), "S": (1, 64)}), np.random.default_rng(0)
        self.function = self.module.add(Function("forward"))
        self.q = self.function.arg("q", TensorType((B, S, heads, size), DType.f32))
        self.x = self.function.arg("x", TensorType((B, S, X), DType.f32))
        self.b = Builder(self.function)

    def linear(self, x: Value, size: int, name: str, bias: bool = False) -> Value:
        def weight(*shape: int) -> Value:
            return self.module.constant(self.rng.standard_normal(shape).astype(np.float32) / 4, name)

        return self.b(ops.Linear, x, weight(size, int(x.shape[2])), weight(size) if bias else None)

    def heads(self, x: Value, count: int) -> Value:
        return self.b(ops.Reshape, x, (B, S, count, int(x.shape[2]) // count))

    def norm(self, x: Value) -> Value:
        """What keys are not linear in."""
        return self.b(ops.Tanh, x)

    def attend(self, k: Value, v: Value, **more: Any) -> Model:
        out = self.b(ops.Attention, self.q, k, v, scale=0.3, causal=True, **more)
        self.b.insert(Return((out,)))
        return self

    def run(self) -> Array:
        rng = np.random.default_rng(1)
        q, x = (rng.standard_normal((2, 9, *a.shape[2:])).astype(np.float32) for a in (self.q, self.x))
        return interpret(self.module, "forward", [q, x])[0]


def latent(heads: int = 4, groups: int = 4) -> Model:
    """A latent of 6 and a shared part of 3; the keys have 5 + 3 components, the values 7."""
    m = Model(heads, 8)
    c, r = m.norm(m.linear(m.x, 6, "down")), m.norm(m.linear(m.x, 3, "rope"))
    both = m.heads(m.linear(c, groups * 12, "up"), groups)
    own = m.b(ops.Slice, both, (0, 0, 0, 0), (B, S, groups, 5), (1,) * 4)
    v = m.b(ops.Slice, both, (0, 0, 0, 5), (B, S, groups, 12), (1,) * 4)
    shared = m.b(ops.Broadcast, m.heads(r, 1), (B, S, groups, 3))
    return m.attend(m.b(ops.Concat, (own, shared), 3), v)


def chain() -> Model:
    """Keys by way of a bottleneck in the middle, values of something else."""
    m = Model(4, 8)
    wide = m.linear(m.norm(m.x), 40, "first")
    narrow = m.linear(wide, 4, "second")
    return m.attend(m.heads(m.linear(narrow, 32, "k"), 4), m.heads(m.linear(m.linear(m.norm(m.x), 5, "a"), 24, "v"), 4))


def two() -> Model:
    """Keys of which each head has a part of two latents, out of their order."""
    m = Model(2, 8)
    first, second = m.norm(m.linear(m.x, 3, "a")), m.norm(m.linear(m.x, 2, "b"))
    joined = m.b(ops.Concat, (second, first), 2)
    return m.attend(m.heads(m.linear(joined, 16, "k"), 2), m.heads(m.linear(second, 16, "v"), 2), softcap=3.0)


@pytest.mark.parametrize(("model", "k", "v"), [
    (latent, 9, 6), (lambda: latent(4, 2), 9, 6), (chain, 4, 5), (two, 5, 2),
], ids=["latent", "groups", "chain", "two"])  # fmt: skip
def test_attention_over_what_is_stored(model: Any, k: int, v: int) -> None:
    m, ctx = model(), PassContext()
    want = m.run()
    Pipeline.parse("latent-cache,dce").run(m.module, ctx=ctx)
    [op] = m.module.ops(ops.Attention)
    assert isinstance(op, ops.Attention)
    assert (op.k.shape[2:], op.v.shape[2:]) == ((1, k), (1, v))
    assert not ctx.skips
    np.testing.assert_allclose(m.run(), want, rtol=2e-4, atol=2e-5)


def test_the_cut_counts_bytes() -> None:
    """By every way of choosing among the values that stand between."""
    m = chain()
    [op] = m.module.ops(ops.Attention)
    assert isinstance(op, ops.Attention)
    stored = stored_for([op.k, op.v])
    assert bytes_of(stored) == 4 * (4 + 5)
    assert sorted(int(v.shape[2]) for v in stored) == [4, 5]


def test_a_model_with_its_cache() -> None:
    """Chunks, then token by token, contiguous and in pages; the bytes are those of the latent."""

    ids = prompts(2, 30)
    want = last_logits(LatentDecoder().build(), ids)
    for options in ({}, {"kind": "paged", "page": 16}, {"kind": "ring", "window": 64, "chunk": 8}):
        module = LatentDecoder().build()
        Pipeline.parse("latent-cache,canonicalize,cse,dce").run(module)
        np.testing.assert_allclose(forward(module, ids)[:, -1], want, rtol=1e-4, atol=1e-4)
        module = cached(module, length=32, **options)
        assert {s.cache.bytes_of(1) for s in module.states.values()} == {4 * RANK}
        np.testing.assert_allclose(Run(module, 2).feed(ids), want, rtol=1e-4, atol=1e-4)


def plain(bias: bool) -> Model:
    m = Model(4, 8)
    return m.attend(m.heads(m.linear(m.x, 32, "k", bias), 4), m.heads(m.linear(m.x, 32, "v", bias), 4))


@pytest.mark.parametrize(("model", "gain", "reason"), [
    (lambda: plain(False), 2, "keys and values take 256 bytes a token, what they follow from 192: not 2 times less"),
    (lambda: plain(True), 1, "keys and values, 256 bytes a token, follow from nothing smaller"),
    (latent, 7, "keys and values take 240 bytes a token, what they follow from 36: not 7 times less"),
], ids=["plain", "bias", "gain"])  # fmt: skip
def test_what_stays(model: Any, gain: float, reason: str) -> None:
    m, ctx = model(), PassContext()
    want = m.run()
    assert Pipeline((LatentCache(gain),)).run(m.module, ctx=ctx).rows[0].changed is False
    assert [s.reason for s in ctx.skips] == [reason]
    np.testing.assert_array_equal(m.run(), want)


def test_refusals() -> None:
    with pytest.raises(PassError, match="takes a gain of 1 or more"):
        LatentCache(0.5)
    with pytest.raises(PassError, match="latent-cache runs the stateless @forward: it must stand before kv-layout"):
        Pipeline.parse("kv-layout,latent-cache").run(Decoder(rope=True).build())
