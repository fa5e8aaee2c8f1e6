"""prune-keys against plain loops: which channels stay, and what attention gives without the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.models.tiny_decoder import D, Decoder
from tests.unit.test_kv_layout import LENGTH, cached, forward, prompts
from tests.unit.test_kv_layout_kinds import Run, last_logits
from tilewright.ir import DType, Function, Module, PassError, Return, TensorType, interpret, ops
from tilewright.passes import PassContext, Pipeline
from tilewright.passes.prune_keys import PruneKeys

Array = np.ndarray[Any, Any]
SHAPES = {"q": (3, 70, 4, 6), "k": (3, 70, 2, 6), "v": (3, 70, 2, 5)}


def attention() -> Module:
    module = Module("m")
    function = module.add(Function("forward"))
    args = [function.arg(n, TensorType(s, DType.f32)) for n, s in SHAPES.items()]
    function.append(Return(function.append(ops.Attention(*args, scale=0.5, causal=True)).results))
    return module


def test_channels_with_the_least_energy_go() -> None:
    """Each head of keys has its own; scores are those without the channels, under the old scale."""
    rng = np.random.default_rng(0)
    gains = {"q": rng.uniform(0.1, 2, (4, 6)), "k": rng.uniform(0.1, 2, (2, 6)), "v": np.ones((2, 5))}
    given = {n: (rng.standard_normal(s) * gains[n]).astype(np.float32) for n, s in SHAPES.items()}
    module = attention()
    Pipeline((PruneKeys(share=0.5, multiple=1),)).run(module, ctx=PassContext(options={"calibration": [given]}))
    [got] = interpret(module, "forward", list(given.values()))
    kept = []
    for h in range(2):
        score = [sum(np.square(given["q"][b, :, 2 * h + g, c]).sum() * np.square(given["k"][b, :, h, c]).sum()
                     for b in range(3) for g in range(2)) for c in range(6)]  # fmt: skip
        kept.append(sorted(np.argsort(score)[3:]))
    assert kept[0] != kept[1]
    for b in range(3):
        for h in range(4):
            channels = kept[h // 2]
            scores = 0.5 * given["q"][b, :, h][:, channels] @ given["k"][b, :, h // 2][:, channels].T
            weights = np.exp(np.where(np.tri(70, dtype=bool), scores, -np.inf))
            want = weights / weights.sum(1, keepdims=True) @ given["v"][b, :, h // 2]
            np.testing.assert_allclose(got[b, :, h], want, rtol=1e-4, atol=1e-5)


def pruned(**given: Any) -> Module:
    module = Decoder(heads=4, kv_heads=2, rope=True, **given).build()
    ctx = PassContext(options={"calibration": [{"input_ids": prompts(4, 40)}]})
    Pipeline.parse("prune-keys{share=0.4}").run(module, ctx=ctx)
    return module


def test_caches_are_smaller() -> None:
    module = pruned()
    before = forward(module, prompts())
    caches = cached(module, keep_forward=True)
    assert {(s.cache.dim, s.cache.vdim) for s in caches.states.values()} == {(4, D)}
    np.testing.assert_array_equal(forward(caches, prompts()), before)
    np.testing.assert_allclose(Run(cached(pruned()), 2).feed(prompts()), before[:, -1], rtol=1e-4, atol=1e-4)


def test_pages_and_codes() -> None:
    ids = prompts(2, LENGTH - 2)
    paged = cached(pruned(), kind="paged", page=16)
    np.testing.assert_allclose(Run(paged, 2).feed(ids), last_logits(pruned(), ids), rtol=1e-4, atol=1e-4)
    assert {s.cache.bytes_of(1) for s in cached(pruned(), dtype="i8").states.values()} == {2 * (4 + D + 2 * 2)}


def test_sinks_meet_pruned_queries() -> None:
    """The queries that are turned a second time lose the same channels."""
    module = cached(pruned(), kind="ring", window=LENGTH, sinks=4, length=LENGTH)
    ids = prompts(2, LENGTH - 2)
    np.testing.assert_allclose(Run(module, 2).feed(ids), last_logits(pruned(), ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("options", "message"), [
    ("share=0", "a share above 0 and below 1"), ("share=1.0", "a share above 0 and below 1"),
    ("multiple=0", "a multiple of 1 or more"), ("share=0.4", "prune-keys needs calibration data"),
])  # fmt: skip
def test_refusals(options: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        Pipeline.parse(f"prune-keys{{{options}}}").run(Decoder(rope=True).build())


def test_too_few_channels() -> None:
    module, ctx = Decoder(rope=True).build(), PassContext(options={"calibration": [{"input_ids": prompts(4, 40)}]})
    Pipeline.parse("prune-keys{share=0.2 multiple=8}").run(module, ctx=ctx)
    assert {s.reason for s in ctx.skips} == {"of 8 channels none would go: they stay by 8"}


def test_values_that_are_the_keys_stay_whole() -> None:
    module = Module("m")
    function = module.add(Function("forward"))
    x = function.arg("x", TensorType((4, 40, 2, 6), DType.f32))
    function.append(Return(function.append(ops.Attention(x, x, x, causal=True)).results))
    given = np.random.default_rng(0).standard_normal((4, 40, 2, 6)).astype(np.float32)
    Pipeline.parse("prune-keys").run(module, ctx=PassContext(options={"calibration": [{"x": given}]}))
    [op] = module.ops(ops.Attention)
    assert isinstance(op, ops.Attention)
    assert (op.q.shape[3], op.k.shape[3], op.v) == (4, 4, x)
