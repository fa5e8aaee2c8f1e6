"""The search of scales: what it chooses is the least of what it tried, and helps most where channels differ."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.test_smooth import data, decoder, distance, run, sites
from tilewright.ir import interpret
from tilewright.passes.awq import Awq, _Search, scale
from tilewright.passes.base import PassContext
from tilewright.passes.calibration.stream import stream
from tilewright.passes.formats import round_to_nearest
from tilewright.passes.pipeline import Pipeline


@pytest.mark.parametrize("scheme", ["w3a16 group=8", "w4a16 group=16 zero=true", "w4a8 group=8", "nf4 group=16"])
def test_rounding_harms_less_after_scaling(scheme: str) -> None:
    """Channels whose inputs are large by nature: what AWQ is for."""
    want = interpret(decoder(outliers=0.1), "forward", data(seed=9)[0])[0]
    options = f"scheme={scheme}"
    plain = distance(run(decoder(outliers=0.1), f"quantize{{{options}}}"), want)
    scaled = distance(run(decoder(outliers=0.1), f"awq{{{options}}},quantize{{{options}}}"), want)
    assert scaled < 0.9 * plain


def test_the_error_is_that_of_rounding_the_scaled_weight() -> None:
    module, awq = decoder(), Awq("w3a16", 8)
    site, x = sites(module)[0], np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32)
    (weight,) = (w.load() for w in site.weights())
    scales = np.linspace(0.5, 2, 16, dtype=np.float32)
    codes, steps = round_to_nearest(awq.format, weight * scales)
    rounded = (codes.astype(np.float32).reshape(-1, 2, 8) * steps.astype(np.float32)[..., None]).reshape(weight.shape)
    want = np.square(x @ (weight - rounded / scales).T).sum()
    np.testing.assert_allclose(_Search(awq).error(weight, scales, x), want, rtol=1e-4)


def test_the_best_of_what_was_tried_is_taken() -> None:
    module, awq = decoder(outliers=0.1), Awq("w3a16", 8, steps=4)
    search, site = _Search(awq), sites(decoder(outliers=0.1))[0]
    function = module.functions["forward"]
    site = sites(module)[0]
    found: list[tuple[np.ndarray, float]] = []

    def visit(op: object, inputs: list[np.ndarray]) -> None:
        weights = [w.load() for w in site.weights()]
        x = np.concatenate([i.reshape(-1, 16) for i in inputs])
        chosen = search.scales(site, inputs)
        rms, columns = np.sqrt((x**2).mean(0)), np.sqrt((weights[0] ** 2).mean(0))
        grid = [search.errors(weights, scale(rms, a / 4, columns, 0), site, x) for a in range(5)]
        found.append((chosen, min(grid) / search.errors(weights, chosen, site, x)))

    stream(function, data(), visit, [site.layers[0]])
    chosen, gain = found[0]
    assert gain >= 0.999, "no worse than the best without a power of the weight"
    np.testing.assert_allclose(chosen.max() * chosen.min(), 1, rtol=1e-5)
    assert search.gains[0] < 0.9


def test_layers_that_the_format_does_not_fit_keep_their_scales() -> None:
    module = decoder()
    want = interpret(decoder(), "forward", data(seed=9)[0])[0]
    ctx = PassContext({"calibration": data()})
    Pipeline.parse("awq{group=48}").run(module, ctx=ctx)
    np.testing.assert_array_equal(interpret(module, "forward", data(seed=9)[0])[0], want)
