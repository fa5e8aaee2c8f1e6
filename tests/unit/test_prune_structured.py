"""Smaller graphs of whole models: what goes, what makes up for it, and what comes behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.models import tiny_decoder as tiny
from tests.models.tiny_decoder import Decoder
from tilewright.bisect import copy_of
from tilewright.ir import (
    ArraySource,
    DType,
    Module,
    PassError,
    Rewriter,
    Weight,
    empty_states,
    interpret,
    ops,
    parse_module,
    print_module,
    verify,
)
from tilewright.passes.base import PassContext
from tilewright.passes.pipeline import Pipeline, PipelineReport
from tilewright.passes.prune_structured import PruneStructured
from tilewright.passes.structured.planning import lost

Array = np.ndarray[Any, Any]


def decoder(**options: Any) -> Module:
    module = Decoder(**({"rope": True, "heads": 4} | options)).build()
    Pipeline.parse("clean,fusions").run(module)
    return module


def data(seed: int = 0) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(0, tiny.V, (4, 32))} for _ in range(2)]


def run(module: Module, text: str, **options: Any) -> PipelineReport:
    return Pipeline.parse(f"{text},dce").run(module, ctx=PassContext({"calibration": data()} | options))


def forward(module: Module) -> Array:
    return interpret(module, "forward", data(seed=9)[0])[0]


def zeroed(module: Module, settings: PruneStructured) -> Module:
    """A copy of ``module`` with zeros in the columns that ``settings`` would take away."""
    module = copy_of(module)
    function, batches = settings.data(module, PassContext({"calibration": data()}))
    groups = settings.groups(function, Rewriter(module))
    plan = settings.plan(function, groups, batches, settings.costs(PassContext()))
    taken = settings.taken(function, batches, plan, 0.0)
    gone = lost(groups, {lad.group: lad.gone(n) for lad, n in zip(plan.ladders, taken)})
    assert gone
    for op, mask in gone.items():
        for weight in (v for v in op.operands if isinstance(v, Weight) and v.tensor.rank == 2):
            array = weight.load().copy()
            array[:, mask] = 0
            weight.source = ArraySource(array)
    return module


MODELS: dict[str, dict[str, Any]] = {
    "plain": {"rope": False},
    "grouped": {"kv_heads": 2},
    "one head of keys": {"kv_heads": 1},
    "learned positions": {"rope": False, "positions": tiny.learned},
    "window": {"attention": {"causal": True, "window": 5}},
    "sinks": {"sinks": True, "kv_heads": 2},
    "mask": {"mask": tiny.tril, "attention": {}},
    "merged rows": {"merged": True},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("units", ["heads", "groups"])
def test_the_small_graph_is_the_whole_one_with_zeros(name: str, units: Any) -> None:
    settings = PruneStructured(ratio=0.25, method="magnitude", budget="global", units=("channels", units), multiple=4)
    module = decoder(**MODELS[name])
    want = forward(zeroed(module, settings))
    done = run(module, str(settings))
    verify(module)
    assert parse_module(print_module(module)) == module
    assert any("became" in note for _, note in done.ctx.notes)
    np.testing.assert_allclose(forward(module), want, atol=1e-4, rtol=1e-4)


def test_heads_of_a_bias_go_with_it() -> None:
    module = decoder(rope=False, heads=2, bias=tiny.alibi_distance)
    settings = PruneStructured(ratio=0.25, method="magnitude", units=("heads",))
    want = forward(zeroed(module, settings))
    run(module, str(settings))
    np.testing.assert_allclose(forward(module), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["flap", "wanda", "magnitude", "ziplm"])
@pytest.mark.parametrize("compensate", ["none", "bias", "weights"])
def test_what_makes_up_for_it_helps(method: str, compensate: str) -> None:
    """On the calibration data the layers' own outputs are nearer with more of it; here the whole model's are."""
    text = f"prune-structured{{method={method} ratio=0.2 units=channels multiple=2 compensate={compensate}}}"
    module = decoder()
    want = forward(module)
    run(module, text)
    bare = decoder()
    run(bare, text.replace(compensate, "none"))
    error, without = (float(np.linalg.norm(forward(m) - want)) for m in (module, bare))
    assert error <= without * (1 if compensate == "none" else 1.05)
    assert (compensate == "weights") <= (error < 0.9 * without)


def inputs_of(module: Module, op: ops.Linear) -> Array:
    """What a layer reads of the calibration data, ``[tokens, K]``."""
    seen: list[Array] = []
    for batch in data():
        found: dict[Any, Array] = {}
        interpret(module, "forward", batch, observer=lambda o, results: found.update(zip(o.results, results)))  # noqa: B023
        seen.append(found[op.x].reshape(-1, found[op.x].shape[-1]))
    return np.concatenate(seen).astype(np.float64)


def test_flap_is_the_formula() -> None:
    """Variance times squared norm, standardised in each layer, the lowest of all layers first; means become biases."""
    module = decoder()
    downs = [op for op in module.functions["forward"].walk(ops.Linear) if "down" in getattr(op.operands[1], "name", "")]
    metric, means = [], []
    for op in downs:
        x, w = inputs_of(module, op), op.operands[1].load().astype(np.float64)  # type: ignore[attr-defined]
        score = x.var(0) * (w**2).sum(0)
        metric.append((score - score.mean()) / score.std())
        means.append(x.mean(0))
    order = sorted((m, layer, i) for layer, ms in enumerate(metric) for i, m in enumerate(ms))
    gone = [sorted(i for _, layer, i in order[:13] if layer == want) for want in (0, 1)]
    weights = [op.operands[1].load() for op in downs]  # type: ignore[attr-defined]
    run(module, "prune-structured{ratio=0.2 units=channels multiple=1}")
    pruned = [op for op in module.functions["forward"].walk(ops.Linear) if "down" in getattr(op.operands[1], "name", "")]
    for op, lose, weight, mean in zip(pruned, gone, weights, means, strict=True):
        np.testing.assert_array_equal(op.operands[1].load(), np.delete(weight, lose, 1))  # type: ignore[attr-defined]
        np.testing.assert_allclose(op.operands[2].load(), weight[:, lose] @ mean[lose], atol=1e-5)  # type: ignore[attr-defined]


def test_layers_that_turn_the_state_far_lose_less() -> None:
    module = decoder(layers=3)
    for name in ("1.down", "1.o"):
        weight = module.weights[name]
        weight.source = ArraySource(weight.load() * np.float32(8))
    done = run(module, "prune-structured{ratio=0.3 units=channels multiple=1 budget=layers}")
    left = {op.operands[1].name: op.operands[1].shape[1] for op in module.functions["forward"].walk(ops.Linear)}  # type: ignore[attr-defined]
    sizes = [size for name, size in left.items() if name and "down" in name]
    assert sizes[1] == max(sizes) > min(sizes), done.ctx.notes


def test_a_speedup_is_met_by_the_costs_that_are_given() -> None:
    asked: list[str] = []

    def seconds(rows: int, columns: int, dtype: DType) -> float:
        return rows * columns * 1e-9 + 1e-6

    def costs(stored: str) -> Any:
        asked.append(stored)
        return seconds

    for method in ("ziplm", "flap", "wanda"):
        module = decoder()
        layers = [op for op in module.functions["forward"].walk(ops.Linear)]
        before = sum(seconds(*op.operands[1].shape, DType.f32) for op in layers)  # type: ignore[arg-type]
        text = f"prune-structured{{method={method} speedup=1.2 multiple=2 cost=measured stored=w8a8}}"
        done = run(module, text, layer_costs=costs)
        after = sum(seconds(*op.operands[1].shape, DType.f32) for op in module.functions["forward"].walk(ops.Linear))  # type: ignore[arg-type]
        assert before / after >= 1.2
        assert f"cost {before / after:.3f} times less" in done.ctx.notes[-1][1]
    assert asked == ["w8a8"] * 3


def test_ziplm_chooses_better_than_scores_do() -> None:
    """At equal bytes the errors of its choice are smaller than those of an even one, corrected in the same way."""
    want = forward(decoder(layers=3))
    errors = {}
    for method in ("ziplm", "magnitude"):
        module = decoder(layers=3)
        run(module, f"prune-structured{{method={method} ratio=0.3 units=channels multiple=2 compensate=weights}}")
        errors[method] = float(np.linalg.norm(forward(module) - want))
    assert errors["ziplm"] < errors["magnitude"]


TWO = """
module @m {
  dim B : 1..256
  weight @a : tensor<8x6xf32>
  weight @b : tensor<8x6xf32>
  weight @w : tensor<6x16xf32>
  func @forward(%x: tensor<Bx6xf32>) {
    %0 = nn.linear(%x, @a) : tensor<Bx8xf32>
    %1 = core.relu(%0) : tensor<Bx8xf32>
    %2 = nn.linear(%x, @b) : tensor<Bx8xf32>
    %3 = core.gelu(%2) : tensor<Bx8xf32>
    %4 = core.concat([%1, %3]) {axis=1} : tensor<Bx16xf32>
    %5 = nn.linear(%4, @w) : tensor<Bx6xf32>
    return([%5])
  }
}
"""


@pytest.mark.parametrize("options", ["method=ziplm", "method=flap", "method=wanda compensate=weights"])
def test_two_groups_that_one_layer_reads(options: str) -> None:
    module, rng = parse_module(TWO), np.random.default_rng(0)
    for weight in module.weights.values():
        weight.source = ArraySource(rng.standard_normal([int(d) for d in weight.shape]).astype(np.float32))
    x = rng.standard_normal((256, 6)).astype(np.float32)
    want = interpret(module, "forward", [x])[0]
    run(module, f"prune-structured{{ratio=0.25 multiple=1 {options}}}", calibration=[{"x": x}])
    left = module.functions["forward"].body[-2].operands[1].shape[1]
    assert left == 12
    error = np.linalg.norm(interpret(module, "forward", [x])[0] - want) / np.linalg.norm(want)
    assert error < 0.5


# ---- what comes behind -------------------------------------------------------------------------------------------

PRUNE = "prune-structured{method=magnitude ratio=0.25 units=[channels,groups] budget=global multiple=4}"


@pytest.mark.parametrize(
    "behind", ["quantize{scheme=w8a8}", "quantize{scheme=w4a8 group=4}", "quantize{scheme=w4a16 group=4 method=gptq}"]
)
def test_quantized_behind_and_cached(behind: str) -> None:
    module = decoder(kv_heads=2)
    run(module, f"{PRUNE},{behind}")
    ids = data(seed=9)[0]["input_ids"][:2, :8]
    want = interpret(module, "forward", [ids])[0]
    Pipeline.parse("kv-layout{length=16 keep_forward=true},canonicalize,cse,dce").run(module)
    states = empty_states(module, 2)
    start = np.zeros(2, np.int64)
    got = [interpret(module, "prefill", [ids[:, :5], start, start + 4], states)[0]]
    got += [interpret(module, "decode", [ids[:, i : i + 1], start + i], states)[0] for i in range(5, 8)]
    np.testing.assert_allclose(np.stack(got, 1), want[:, 4:], atol=1e-3, rtol=1e-3)


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("ratio=0", "a ratio above 0"), ("ratio=1", "below 1"), ("speedup=1", "a speedup above 1"),
        ("ratio=0.2 speedup=1.2", "not both"), ("ratio=0.2 units=[heads,groups]", "heads or groups"),
        ("ratio=0.2 multiple=0", "multiple is 1 or more"),
        ("ratio=0.2 damping=0", "damping above 0"), ("ratio=0.2 method=ziplm budget=uniform", "leave budget out"),
        ("method=flap", "how much"), ("ratio=0.2 skip=*nothing*", "no weight is named"),
        ("ratio=0.2 cost=measured", "nothing here times layers"), ("ratio=0.97", "at most"),
        ("ratio=0.97 method=ziplm", "at most"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(options: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        run(decoder(), f"prune-structured{{{options}{'' if 'multiple' in options else ' multiple=8'}}}")


@pytest.mark.parametrize("options", ["method=flap", "method=ziplm", "method=magnitude compensate=bias"])
def test_data_that_are_missing_are_asked_for(options: str) -> None:
    with pytest.raises(PassError, match="needs calibration data"):
        Pipeline.parse(f"prune-structured{{ratio=0.2 {options}}}").run(decoder())


def test_it_stands_before_the_cache() -> None:
    module = decoder()
    with pytest.raises(PassError, match="before kv-layout"):
        run(module, "kv-layout{length=8},prune-structured{ratio=0.2 method=magnitude}")


def test_what_stays_is_named() -> None:
    module = decoder()
    before = print_module(module)
    done = run(module, "prune-structured{ratio=0.2 multiple=32 method=magnitude units=channels}")
    assert print_module(module) == before, "nothing may go"
    notes = " ".join(line for _, line in done.ctx.notes)
    assert "it has 32 channels, and 32 are the least that stay" in notes
    assert "nn.rms_norm" in notes
    assert "heads, which are not asked for" in notes


def test_numbers_that_are_not_finite_are_refused() -> None:
    for method in ("flap", "wanda", "ziplm"):
        module = decoder()
        weight = module.weights["0.up"]
        weight.source = ArraySource(np.full_like(weight.load(), np.inf))
        with pytest.raises(PassError, match="NaN or infinite"):
            run(module, f"prune-structured{{ratio=0.2 method={method} multiple=2}}")
