"""Scales that move from activations into weights: nothing changes before rounding, and rounding gets better."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.models.tiny_decoder import Decoder
from tilewright.frontend import trace
from tilewright.ir import ArraySource, Module, PassError, interpret, ops, parse_module
from tilewright.passes.base import PassContext
from tilewright.passes.calibration.sites import Rows, Site, find_sites
from tilewright.passes.calibration.statistics import moments
from tilewright.passes.calibration.stream import LAYERS, stream
from tilewright.passes.pipeline import Pipeline

Array = np.ndarray[Any, Any]


def decoder(outliers: float = 1.0, **options: Any) -> Module:
    """A decoder, two channels of whose norms are ``outliers`` times as large, and their columns as much smaller."""
    module = Decoder(rope=True, heads=4, **options).build()
    for op in module.functions["forward"].walk(ops.RmsNorm):
        for layer in op.results[0].users:
            if isinstance(layer, ops.Linear):
                plant(layer.weight, outliers, axis=1)
        plant(op.weight, 1 / outliers, axis=0)
    Pipeline.parse("clean,fusions").run(module)
    return module


def plant(weight: Any, outliers: float, axis: int) -> None:
    array = weight.load().copy()
    np.moveaxis(array, axis, 0)[[2, 11]] /= np.float32(outliers)
    weight.source = ArraySource(array)


def data(seed: int = 0) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(0, 40, (4, 32))} for _ in range(2)]


def run(module: Module, pipeline: str) -> Array:
    """What the module computes after ``pipeline``, on tokens it was not calibrated with."""
    Pipeline.parse(f"{pipeline},dce").run(module, ctx=PassContext({"calibration": data()}))
    return interpret(module, "forward", data(seed=9)[0])[0]


def distance(got: Array, want: Array) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("text", ["smooth", "smooth{alpha=0.9}", "awq{group=8 steps=4}", "smooth,awq{steps=3}"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_module_computes_the_same(text: str, kv_heads: int) -> None:
    want = interpret(decoder(kv_heads=kv_heads), "forward", data(seed=9)[0])[0]
    module = decoder(kv_heads=kv_heads)
    got = run(module, text)
    assert distance(got, want) < 1e-5
    scaled = {name for name in module.weights if name.endswith(".scaled")}
    assert scaled >= {"0.norm.scaled", "0.o.scaled", "0.q_k_v.scaled"}, "q, k and v, and o have scales"


@pytest.mark.parametrize("text", ["smooth", "awq{group=8 steps=4}"])
def test_layer_norms_gated_layers_and_relus_take_scales_too(text: str) -> None:
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.plain = nn.LayerNorm(16), nn.LayerNorm(32, elementwise_affine=False)
            self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 32)
            self.fc1, self.fc2 = nn.Linear(32, 48), nn.Linear(48, 8)

        def forward(self, x: torch.Tensor) -> Any:
            h = self.norm(x)
            y = self.down(nn.functional.silu(self.gate(h)) * self.up(h))
            return self.fc2(torch.relu(self.fc1(self.plain(y))))

    torch.manual_seed(0)
    x = torch.randn(200, 16) * torch.logspace(-1, 1, 16)
    module = trace(Block(), (x,), {}, dynamic={"x": {0: "B"}})
    Pipeline.parse("clean,fusions").run(module)
    want = interpret(module, "forward", [x.numpy()])[0]
    ctx = PassContext({"calibration": [{module.functions["forward"].args[0].name: x.numpy()}]})
    Pipeline.parse(f"{text},dce").run(module, ctx=ctx)
    assert distance(interpret(module, "forward", [x.numpy()])[0], want) < 1e-5
    assert any(line.startswith("the inputs of 4 groups of layers were scaled") for _, line in ctx.notes)


def test_smoothed_inputs_and_columns_reach_as_far_as_the_formula_says() -> None:
    module = decoder(outliers=30)
    before = [ranges(module, s) for s in sites(module)]
    Pipeline.parse("smooth{alpha=0.5}").run(module, ctx=PassContext({"calibration": data()}))
    assert before
    for site, (was_x, was_w) in zip(sites(module), before, strict=True):
        x, w = ranges(module, site)
        if isinstance(site.target, Rows):
            continue
        np.testing.assert_allclose(x, np.sqrt(was_x * was_w), rtol=1e-4)
        assert was_x.max() / was_x.min() > 2 * x.max() / x.min()
        assert w.shape == was_w.shape


def sites(module: Module) -> list[Site]:
    return find_sites(module.functions["forward"], lambda op, reason: None)


def ranges(module: Module, site: Site) -> tuple[Array, Array]:
    """The largest magnitudes of input channels and of columns."""
    seen: list[Array] = []
    function = module.functions["forward"]
    stream(function, data(), lambda op, xs: seen.append(moments(xs).top), [site.layers[0]])
    return seen[0], np.max([np.abs(w.load()).max(0) for w in site.weights()], axis=0)


def test_planted_outliers_do_less_harm_after_smoothing() -> None:
    want = interpret(decoder(outliers=40), "forward", data(seed=9)[0])[0]
    plain = distance(run(decoder(outliers=40), "quantize{scheme=w8a8}"), want)
    smooth = distance(run(decoder(outliers=40), "smooth,quantize{scheme=w8a8}"), want)
    level = distance(run(decoder(outliers=1), "quantize{scheme=w8a8}"), want)
    assert smooth < 0.4 * plain
    assert smooth < 1.5 * level


def test_heads_that_share_values_share_scales() -> None:
    module = decoder(kv_heads=2)
    values = [s for s in sites(module) if isinstance(s.target, Rows)]
    assert len(values) == 2
    for site in values:
        assert (site.count, len(site.index)) == (16, 32)
        np.testing.assert_array_equal(site.index.reshape(2, 2, 8)[:, 0], site.index.reshape(2, 2, 8)[:, 1])
        assert (site.target.start, site.target.stop) == (48, 64), "the rows of v in q_k_v"


def test_values_that_something_else_reads_are_left_alone() -> None:
    module = parse_module("""module @m {
      dim B : 1..8
      dim S : 1..64
      weight @qkv : tensor<24x8xf32>
      weight @o : tensor<8x8xf32>
      func @forward(%x: tensor<BxSx8xf32>) {
        %0 = nn.linear(%x, @qkv) : tensor<BxSx24xf32>
        %1 = core.slice(%0) {starts=[0, 0, 0] stops=[B, S, 8] steps=[1, 1, 1]} : tensor<BxSx8xf32>
        %2 = core.reshape(%1) {shape=[B, S, 2, 4]} : tensor<BxSx2x4xf32>
        %3 = core.slice(%0) {starts=[0, 0, 12] stops=[B, S, 20] steps=[1, 1, 1]} : tensor<BxSx8xf32>
        %4 = core.reshape(%3) {shape=[B, S, 2, 4]} : tensor<BxSx2x4xf32>
        %5 = core.slice(%0) {starts=[0, 0, 16] stops=[B, S, 24] steps=[1, 1, 1]} : tensor<BxSx8xf32>
        %6 = core.reshape(%5) {shape=[B, S, 2, 4]} : tensor<BxSx2x4xf32>
        %7 = nn.attention(%2, %4, %6) {causal=true} : tensor<BxSx2x4xf32>
        %8 = core.reshape(%7) {shape=[B, S, 8]} : tensor<BxSx8xf32>
        %9 = nn.linear(%8, @o) : tensor<BxSx8xf32> loc("o")
        return([%9])
      }
    }""")
    reasons = {}
    assert find_sites(module.functions["forward"], lambda op, reason: reasons.update({op.loc.module: reason})) == []
    assert "is read as a whole too" in reasons["o"]


def test_weights_of_zeros_and_silent_channels_have_no_scale() -> None:
    module = decoder()
    for op in module.functions["forward"].walk(*LAYERS):
        array = op.weight.load().copy()
        array[:, 3] = 0
        op.weight.source = ArraySource(array)
    want = interpret(module, "forward", data(seed=9)[0])[0]
    assert distance(run(module, "smooth,awq{group=8 steps=2}"), want) < 1e-5


def test_data_that_became_infinite_are_named() -> None:
    module = decoder()
    weight = next(op.weight for op in module.functions["forward"].walk(ops.RmsNorm))
    weight.source = ArraySource(np.full(16, np.inf, np.float32))
    with pytest.raises(PassError, match=r"smooth: inputs or weights of the layer are NaN or infinite\n  at module model"):
        run(module, "smooth")


@pytest.mark.parametrize("text", ["smooth{alpha=1.5}", "awq{rows=0}", "awq{scheme=w5a16}"])
def test_options_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(PassError, match=r"alpha is a share of 0 to 1|rows are 1 or more|no scheme 'w5a16'"):
        Pipeline.parse(text)
