"""Activation sparsity: limits beside NumPy, shares that are reached, graphs beside expressions by hand, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.models.gated_decoder import HEADS, D, gated_decoder
from tilewright.ir import ArraySource, Module, Op, PassError, Rewriter, interpret, ops, parse_module
from tilewright.passes.activations.blocks import blocks_of
from tilewright.passes.activations.histogram import Histogram
from tilewright.passes.activations.limits import fill
from tilewright.passes.activations.low_rank import factored
from tilewright.passes.activations.methods import METHODS
from tilewright.passes.base import PassContext
from tilewright.passes.pipeline import Pipeline
from tilewright.passes.sparsify_activations import SparsifyActivations

Array = np.ndarray[Any, Any]
CALIBRATION = [{"input_ids": np.random.default_rng(i).integers(0, 40, (4, 48))} for i in range(3)]
HELD_OUT = np.random.default_rng(9).integers(0, 40, (4, 48))


def run(text: str, module: Module | None = None) -> tuple[Module, list[str]]:
    """A decoder after ``text``, and the notes of the report."""
    module = module or gated_decoder()
    ctx = PassContext({"calibration": CALIBRATION})
    Pipeline.parse(f"{text},dce").run(module, ctx=ctx)
    return module, [line for _, line in ctx.notes]


def thresholds(module: Module) -> list[ops.Threshold]:
    return [op for op in module.functions["forward"].body if isinstance(op, ops.Threshold)]


def seen(module: Module) -> dict[Any, Array]:
    """What all values of a module are on the calibration data, tokens one after the other."""
    found: dict[Any, list[Array]] = {}

    def keep(op: Op, out: Any) -> None:
        for result, array in zip(op.results, out):
            found.setdefault(result, []).append(np.asarray(array).reshape(-1, np.shape(array)[-1]))

    for batch in CALIBRATION:
        interpret(module, "forward", batch, observer=keep)
    return {value: np.concatenate(arrays) for value, arrays in found.items() if len({a.shape[1] for a in arrays}) == 1}


def norms(*weights: Array) -> Array:
    return np.linalg.norm(np.concatenate(weights), axis=0)


def behind(threshold: ops.Threshold) -> list[Array]:
    """The weights of the layers that read it."""
    return [v.load() for op in threshold.result.users for v in op.operands[1:] if v.tensor.rank == 2]


# ---- limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.93, 1.0])
def test_quantiles_of_a_histogram_are_those_of_the_numbers(share: float) -> None:
    numbers = np.abs(np.random.default_rng(0).standard_normal(20000)).astype(np.float32) ** 3
    found = Histogram()
    for part in np.split(numbers, 4):
        found.add(part)
    assert abs(np.mean(numbers < found.quantile(share)) - share) < 2e-4


def test_a_weight_counts_as_often() -> None:
    found = Histogram()
    found.add(np.full(10, 1.0), weight=3)
    found.add(np.full(30, 4.0))
    assert found.quantile(0.51) * 1.001 > 1
    assert found.quantile(0.49) < 1.01
    assert found.is_finite
    found.add(np.array([np.nan, 1]))
    assert not found.is_finite


REFERENCE: dict[str, Callable[[ops.Threshold, dict[Any, Array]], Array]] = {
    "teal": lambda t, known: np.ones(1, np.float32),
    "cats": lambda t, known: np.ones(1, np.float32),
    "wina": lambda t, known: norms(*behind(t)),
    "chess": lambda t, known: np.abs(known[t.x.owner.b]).mean(0) if t.by is not None else np.ones(1, np.float32),  # type: ignore[union-attr]
}


@pytest.mark.parametrize("method", REFERENCE)
@pytest.mark.parametrize("share", [0.25, 0.6])
def test_limits_are_those_of_the_paper(method: str, share: float) -> None:
    module, _ = run(f"sparsify-activations{{method={method} sparsity={share}}}")
    known = seen(module)
    assert thresholds(module)
    for op in thresholds(module):
        factors = REFERENCE[method](op, known)
        scores = np.abs(known[op.by or op.x]) * factors
        limits = op.limits.load()  # type: ignore[union-attr]
        np.testing.assert_allclose(limits * factors, np.quantile(scores, share), rtol=0.02)
        assert abs(np.mean(scores < limits * factors) - share) < 0.005
        assert limits.shape == factors.shape


def test_plain_has_one_limit_and_saves_its_share_of_all_bytes() -> None:
    module, notes = run("sparsify-activations{method=plain sparsity=0.5}")
    known = seen(module)
    found = thresholds(module)
    assert len({float(op.limits.load()[0]) for op in found}) == 1  # type: ignore[union-attr]
    sizes = np.array([sum(w.nbytes for w in behind(op)) for op in found])
    zeros = np.array([np.mean(known[op.result] == 0) for op in found])
    assert abs((zeros * sizes).sum() / sizes.sum() - 0.5) < 0.01
    assert zeros.max() - zeros.min() > 0.1, "layers differ"
    assert notes[-2].endswith(f"of the {sizes.sum()} bytes of weights behind them")


def test_a_channel_that_no_column_reads_is_always_zero() -> None:
    module = gated_decoder()
    weight = module.weights["0.o"]
    array = weight.load().copy()
    array[:, 3] = 0
    weight.source = ArraySource(array)
    run("sparsify-activations{method=wina only=[0.o]}", module)
    limits = thresholds(module)[0].limits.load()  # type: ignore[union-attr]
    assert np.isinf(limits[3])
    assert np.isfinite(np.delete(limits, 3)).all()


def test_the_report_says_what_was_reached() -> None:
    module, notes = run("sparsify-activations{method=teal sparsity=0.4}")
    places = [f"@{i}.{name}" for i in range(2) for name in ("qkv", "o", "gate", "down")]
    assert [line.partition(":")[0] for line in notes[:8]] == places
    assert all(" 40." in line or " 39.9% zeros" in line for line in notes[:8])
    assert notes[-1] == "limits are those of 576 tokens"
    again, _ = run("sparsify-activations{method=teal sparsity=0.4}")
    for a, b in zip(thresholds(module), thresholds(again), strict=True):
        assert a.limits.load() == b.limits.load()  # type: ignore[union-attr]


# ---- graphs ------------------------------------------------------------------------------------------------------

FEED_FORWARD = """
module @m {
  dim B : 1..512
  weight @gate : tensor<24x16xf32>
  weight @up : tensor<24x16xf32>
  weight @down : tensor<16x24xf32>
  func @forward(%x: tensor<Bx16xf32>) {
    %0 = nn.gated_linear(%x, @gate, @up) {act="silu"} : tensor<Bx24xf32>
    %1 = nn.linear(%0, @down) : tensor<Bx16xf32>
    return([%1])
  }
}
"""
ROWS = np.random.default_rng(1).standard_normal((300, 16)).astype(np.float32)


def feed_forward(text: str) -> tuple[Module, Array]:
    """The module after a pass for all its layers, and its result."""
    module, rng = parse_module(FEED_FORWARD), np.random.default_rng(0)
    for w in module.weights.values():
        w.source = ArraySource((rng.standard_normal(tuple(map(int, w.shape))) / 4).astype(np.float32))
    ctx = PassContext({"calibration": [{"x": ROWS[:200]}, {"x": ROWS[200:]}]})
    Pipeline.parse(f"sparsify-activations{{{text} layers=all}},dce").run(module, ctx=ctx)
    return module, interpret(module, "forward", [ROWS])[0]


def kept(x: Array, limits: Array, by: Array | None = None) -> Array:
    return np.where(np.abs(x if by is None else by) >= limits, x, 0)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("method", ["teal", "wina", "plain"])
def test_small_inputs_are_left_out_of_each_layer(method: str) -> None:
    module, got = feed_forward(f"method={method}")
    w = {name: weight.load() for name, weight in module.weights.items()}
    x = kept(ROWS, w["gate.limits"])
    h = silu(x @ w["gate"].T) * (x @ w["up"].T)
    np.testing.assert_allclose(got, kept(h, w["down.limits"]) @ w["down"].T, atol=1e-5)


@pytest.mark.parametrize("method", ["cats", "chess"])
def test_small_gates_end_what_they_multiply(method: str) -> None:
    module, got = feed_forward(f"method={method}")
    w = {name: weight.load() for name, weight in module.weights.items()}
    gate = silu(ROWS @ w["gate"].T)
    want = kept(gate * (ROWS @ w["up"].T), w["down.limits"], gate) @ w["down"].T
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert w["down.limits"].shape == ((24,) if method == "chess" else (1,))


def test_what_falls_below_goes_through_a_part_of_low_rank() -> None:
    module, got = feed_forward("method=r-sparse rank=2 sparsity=0.4")
    w = {name: weight.load() for name, weight in module.weights.items()}

    def layer(x: Array, name: str, first: str) -> Array:
        large = kept(x, w[f"{first}.limits"])
        return large @ w[name].T + (x - large) @ w[f"{first}.low"].T @ w[f"{name}.lift"].T

    h = silu(layer(ROWS, "gate", "gate")) * layer(ROWS, "up", "gate")
    np.testing.assert_allclose(got, layer(h, "down", "down"), atol=1e-5)
    zeros = np.mean(np.abs(ROWS) < w["gate.limits"])
    assert abs(zeros - (0.4 + 2 * (16 + 48) / (16 * 48))) < 0.01, "zeros make up for the bytes of the other part"


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_no_product_of_this_rank_is_nearer(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape).astype(np.float32)
    x = rng.standard_normal((500, shape[1])) * np.exp(rng.standard_normal(shape[1])) @ rng.standard_normal((shape[1],) * 2)
    lift, low = factored(weight, x.T @ x / 500, 4)
    assert (lift.shape, low.shape) == ((shape[0], 4), (4, shape[1]))
    least = np.sqrt(np.square(np.linalg.svd(weight @ x.T, compute_uv=False)[4:]).sum())
    assert abs(np.linalg.norm((weight - lift @ low) @ x.T) / least - 1) < 1e-3


def test_queries_come_apart_from_keys_and_values() -> None:
    plain, want = gated_decoder(), []
    interpret(plain, "forward", [HELD_OUT], observer=lambda op, out: want.append((op, out[0])))
    module, notes = run("sparsify-activations{method=chess}")
    got = []
    interpret(module, "forward", [HELD_OUT], observer=lambda op, out: got.append((op, out[0])))
    inputs = [next([v for v in op.operands] for op, _ in found if isinstance(op, ops.Attention)) for found in (want, got)]
    values = [{op.results[0]: out for op, out in found} for found in (want, got)]
    (q, k, v), (q2, k2, v2) = ([value[i] for i in which] for value, which in zip(values, (i[:3] for i in inputs)))
    np.testing.assert_allclose(k2, k, atol=1e-6)
    np.testing.assert_allclose(v2, v, atol=1e-6)
    assert np.abs(q2 - q).max() > 1e-3
    assert [line.partition(":")[0] for line in notes[:3]] == [f"@0.qkv.0_{HEADS * D}", "@0.o", "@0.down"]


@pytest.mark.parametrize("method", METHODS)
def test_heads_and_what_is_skipped_stay(method: str) -> None:
    module, _ = run(f"sparsify-activations{{method={method} rank=2 skip=[1.*]}}")
    assert not any(isinstance(op, ops.Threshold) for op in module.weights["head"].users for op in [op.x.owner])
    assert all(op.limits.name.startswith("0.") for op in thresholds(module))  # type: ignore[union-attr]


# ---- what is better ----------------------------------------------------------------------------------------------


def test_where_columns_do_not_meet_norms_choose_best() -> None:
    """With columns at right angles the error is the sum over zeros of ``(x_k |w_k|)^2``: the smallest of them are least."""
    text = FEED_FORWARD.split("  weight @gate")[0] + """  weight @w : tensor<16x16xf32>
  func @forward(%x: tensor<Bx16xf32>) {
    %0 = nn.linear(%x, @w) : tensor<Bx16xf32>
    return([%0])
  }
}"""
    sizes = np.geomspace(0.05, 5, 16).astype(np.float32)
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((16, 16)))[0].astype(np.float32)
    x, errors = ROWS / sizes**0.5, {}
    for method in ("teal", "wina"):
        module = parse_module(text)
        module.weights["w"].source = ArraySource(turn * sizes)
        want = interpret(module, "forward", [x])[0]
        ctx = PassContext({"calibration": [{"x": x}]})
        Pipeline.parse(f"sparsify-activations{{method={method} layers=all}}").run(module, ctx=ctx)
        errors[method] = np.linalg.norm(interpret(module, "forward", [x])[0] - want)
    assert errors["wina"] < 0.5 * errors["teal"]


def divergence(module: Module) -> float:
    """The squared error of the logits."""
    want = interpret(gated_decoder(), "forward", [HELD_OUT])[0]
    return float(np.square(interpret(module, "forward", [HELD_OUT])[0] - want).mean())


@pytest.mark.parametrize("method", ["teal", "cats"])
def test_a_search_for_shares_does_less_harm(method: str) -> None:
    harms = {}
    for allocation in ("uniform", "greedy", "global"):
        module, notes = run(f"sparsify-activations{{method={method} allocation={allocation} tokens=96}}")
        harms[allocation] = divergence(module)
        saved = float(notes[-2].partition("they save ")[2].partition("%")[0])
        assert abs(saved - 50) < 1, allocation
    assert harms["global"] < harms["uniform"]
    if method == "teal":
        assert harms["greedy"] < harms["uniform"]


def test_each_block_saves_its_share() -> None:
    module, _ = run("sparsify-activations{method=teal allocation=greedy sparsity=0.5 tokens=96}")
    known = seen(module)
    found = [(np.mean(known[op.result] == 0), sum(w.nbytes for w in behind(op))) for op in thresholds(module)]
    assert len({round(zeros, 1) for zeros, _ in found}) > 1
    for block in (found[:4], found[4:]):
        assert abs(sum(z * n for z, n in block) / sum(n for _, n in block) - 0.5) < 0.01


def test_blocks_are_layers_of_the_decoder() -> None:
    module = gated_decoder(layers=3)
    config, rw, function = SparsifyActivations(method="teal"), Rewriter(module), module.functions["forward"]
    places = config.row.find(rw, config.chosen(function, rw), 1)
    blocks = blocks_of(function, places)
    names = [f"{i}.{name}" for i in range(3) for name in ("qkv", "o", "gate", "down")]
    assert [[p.name for p in block.places] for block in blocks] == [names[i : i + 4] for i in (0, 4, 8)]
    parts = blocks_of(function, [p for p in places if "gate" in p.name])
    assert [len(block.places) for block in parts] == [1, 1, 1]
    assert all(isinstance(b.last, ops.Add) for b in blocks)
    reached = fill(function, CALIBRATION, places, lambda place, run: place.array(0.0, None))
    assert [r.zeros for r in reached] == [0.0] * 12


# ---- with other passes, and refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["wina", "cats", "r-sparse"])
def test_quantized_weights_behind_thresholds(method: str) -> None:
    alone, _ = run(f"sparsify-activations{{method={method} rank=4}}")
    for scheme in ("w8a16", "w8a8"):
        module, notes = run(f"sparsify-activations{{method={method} rank=4}},quantize{{scheme={scheme} layers=body}}")
        assert len(thresholds(module)) == len(thresholds(alone))
        assert divergence(module) < 2 * divergence(alone)
        assert any("rounds the inputs" in line for line in notes) == (scheme == "w8a8"), "kernels that skip want floats"


def test_compensation_sees_the_zeros() -> None:
    quantize = "quantize{scheme=w3a16 group=0 layers=body method=gptq}"
    before, after = run(f"{quantize}")[0], run(f"sparsify-activations{{sparsity=0.3}},{quantize}")[0]
    assert not thresholds(before)
    assert len(thresholds(after)) == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsify-activations{sparsity=0}", "sparsity is a share of zeros, above 0, at most 0.96; got 0"),
        ("sparsify-activations{sparsity=1.0}", "got 1.0"),
        ("sparsify-activations{rank=0}", "rank are 1 or more"),
        ("sparsify-activations{method=plain allocation=greedy}", "method=plain goes with allocation=uniform alone"),
        ("sparsify-activations{method=r-sparse allocation=global}", "method=r-sparse goes with"),
        ("sparsify-activations{method=r-sparse rank=40}", "has rank 32 itself"),
        ("sparsify-activations{method=r-sparse rank=20}", "take a smaller rank or sparsity"),
        ("sparsify-activations{skip=[*missing*]}", "no weight is named"),
        ("sparsify-activations{only=[head]}", "no layer can have sparse inputs: the option only does not name"),
        ("quantize,sparsify-activations", "its weight is computed"),
        ("sparsify-activations,sparsify-activations", "its inputs have a threshold already"),
        ("kv-layout,sparsify-activations", "must stand before kv-layout"),
        ("sparsify-activations{method=cats only=[*.qkv]}", "none of 2 layers is gated"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(PassError, match=message.replace("*", ".*")):
        run(text)


def test_without_data_or_finite_numbers_there_are_no_limits() -> None:
    with pytest.raises(PassError, match="sparsify-activations needs calibration data"):
        Pipeline.parse("sparsify-activations").run(gated_decoder())
    module = gated_decoder()
    array = module.weights["0.norm"].load().copy()
    array[0] = np.inf
    module.weights["0.norm"].source = ArraySource(array)
    with pytest.raises(PassError, match="activations are NaN or infinite"):
        run("sparsify-activations", module)
