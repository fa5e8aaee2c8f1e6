"""The pass prune: which weights it takes, what it reports, where numbers wait; and shares of layers under one budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.unit.test_calibration import decoder, given, ids
from tilewright.ir import ArraySource, ComputedSource, DType, Module, PassError, interpret, ops, parse_module
from tilewright.passes.base import PassContext
from tilewright.passes.calibration.spill import SpilledSource
from tilewright.passes.pipeline import Pipeline
from tilewright.passes.prune import Prune
from tilewright.passes.sparsity.allocation import ALLOCATIONS

Array = np.ndarray[Any, Any]
DATA = ids((4, 64), seed=2)


def pruned(text: str, module: Module | None = None) -> tuple[Module, PassContext]:
    module, ctx = module or decoder(), given(DATA)
    Pipeline.parse(f"prune{{{text}}},dce").run(module, ctx=ctx)
    return module, ctx


def zeros(module: Module) -> dict[str, int]:
    return {n: int((w.load() == 0).sum()) for n, w in module.weights.items() if n.endswith(".pruned")}


def notes(ctx: PassContext) -> list[str]:
    return [line for _, line in ctx.notes]


def test_the_body_is_pruned_and_the_head_is_not() -> None:
    module, ctx = pruned("")
    names = {f"{i}.{n}.pruned" for i in (0, 1) for n in ("q_k_v", "o", "gate", "up", "down")}
    assert zeros(module).keys() == names & module.weights.keys()
    assert {"head", "embed"} <= module.weights.keys()
    assert notes(ctx)[0] == "@0.q_k_v: 384 of 768 weights are 0 (50.0%)"
    total = sum(zeros(module).values())
    assert notes(ctx)[-1] == f"{total} of 4096 weights in {len(zeros(module))} matrices are 0 (50.00%)"
    module, _ = pruned("layers=head sparsity=0.25")
    assert zeros(module) == {"head.pruned": 160}


@pytest.mark.parametrize("text", ["wanda", "wanda refine=dsnot", "sparsegpt", "sparsegpt group=8", "sparsegpt pattern=2:4",
                                  "magnitude pattern=4:8", "alps", "alps group=8"])  # fmt: skip
def test_notes_count_the_zeros_and_functions_stay_near(text: str) -> None:
    want = interpret(decoder(), "forward", DATA[0])[0]
    module, ctx = pruned(f"method={text} only=[*down]")
    lines = dict(line.split(": ") for line in notes(ctx)[:-1])
    assert lines.keys() == {"@0.down", "@1.down"}
    for name, count in zeros(module).items():
        assert lines[f"@{name.removesuffix('.pruned')}"].startswith(f"{count} of ")
    got = interpret(module, "forward", DATA[0])[0]
    assert 0 < np.linalg.norm(got - want) < 0.9 * np.linalg.norm(want)


def test_later_layers_see_what_earlier_ones_became() -> None:
    """The second layer is chosen by its inputs behind the first one with zeros."""
    module, _ = pruned("method=wanda only=[0.*]")
    again, _ = pruned("method=wanda only=[1.*]", module)
    once, _ = pruned("method=wanda")
    for name in zeros(once):
        np.testing.assert_array_equal(again.weights[name].load(), once.weights[name].load())


def test_numbers_wait_a_bit_a_weight_where_those_that_stay_are_as_they_were() -> None:
    module, _ = pruned("method=wanda")
    source = module.weights["0.o.pruned"].source
    assert isinstance(source, ComputedSource)
    assert [p.size for p in source.parts if isinstance(p, SpilledSource)] == [256 // 8]
    moved, _ = pruned("method=sparsegpt")
    assert isinstance(moved.weights["0.o.pruned"].source, SpilledSource)


def test_magnitude_reads_nothing_before_the_artifact_is_written() -> None:
    module = decoder()
    loads = []

    class Source(ArraySource):
        def load(self) -> Array:
            loads.append(1)
            return super().load()

    for weight in module.weights.values():
        weight.source = Source(weight.load())
    Pipeline.parse("prune").run(module)
    assert not loads


TIED = """module @m {
  dim B : 1..999
  weight @embed : tensor<16x8xbf16>
  weight @w : tensor<8x8xbf16>
  weight @i8 : tensor<8x8xi8>
  weight @s : tensor<8x1xf32>
  func @forward(%ids: tensor<Bxi64>) {
    %0 = nn.embedding(%ids, @embed) : tensor<Bx8xbf16>
    %1 = nn.linear(%0, @w) : tensor<Bx8xbf16>
    %2 = nn.linear(%1, @w) : tensor<Bx8xbf16>
    %3 = quant.dequantize(@i8, @s) : tensor<8x8xf32>
    %4 = core.cast(%2) {dtype=f32} : tensor<Bx8xf32>
    %5 = nn.linear(%4, %3) : tensor<Bx8xf32>
    %6 = core.cast(%5) {dtype=bf16} : tensor<Bx8xbf16>
    %7 = nn.linear(%6, @embed) : tensor<Bx16xbf16>
    return([%7])
  }
}"""


def tied() -> Module:
    module, rng = parse_module(TIED), np.random.default_rng(0)
    for weight in module.weights.values():
        numbers = rng.standard_normal([int(d) for d in weight.shape])
        weight.source = ArraySource((numbers * 3).astype(weight.dtype.np))
    return module


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_shared_weights_are_pruned_once_and_tables_stay(method: str) -> None:
    module, ctx = tied(), given([{"ids": np.arange(256) % 16}])
    Pipeline.parse(f"prune{{method={method} layers=all}},dce").run(module, ctx=ctx)
    assert [op.operands[1].name for op in module.ops(ops.Linear) if hasattr(op.operands[1], "name")][:2] == ["w.pruned"] * 2
    assert module.weights["w.pruned"].load().dtype == DType.bf16.np
    assert "embed.pruned" not in module.weights
    assert {s.reason for s in ctx.skips} == {"its weight is computed", "nn.embedding takes @embed too"}


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_nothing_to_prune_is_said(allocation: str) -> None:
    module, ctx = pruned(f"method=wanda allocation={allocation} only=[embed]")
    assert notes(ctx) == ["there is no weight to prune"]
    assert not zeros(module)


def test_pruning_again_goes_further() -> None:
    module, _ = pruned("sparsity=0.3")
    before = {n: w.load() == 0 for n, w in module.weights.items() if n.endswith(".pruned")}
    module, _ = pruned("method=sparsegpt sparsity=0.6", module)
    for name, mask in before.items():
        after = module.weights[f"{name}.1"].load() == 0
        assert (after | ~mask).all()
        assert after.sum() == pytest.approx(0.6 * mask.size, abs=1)


@pytest.mark.parametrize(("text", "message"), [
    ("sparsity=1", "sparsity is a share of zeros between 0 and 1; got 1.0"),
    ("sparsity=0.6 pattern=2:4", "pattern=2:4 has a sparsity of 0.5, not of 0.6: leave one out"),
    ("pattern=2:4 allocation=owl", "pattern=2:4 is the same in all layers: allocation=owl is for pattern=unstructured"),
    ("allocation=globl", r"prune has no allocation 'globl' \(did you mean global\?\); there are uniform, global, owl"),
    ("damping=-1", "damping and spread are 0 or more"),
    ("method=optimal", "prune has no method 'optimal'; there are magnitude, wanda, sparsegpt, alps"),
])  # fmt: skip
def test_options_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        Pipeline.parse(f"prune{{{text}}}")


def test_what_cannot_be_is_refused_before_any_work() -> None:
    module = decoder()
    for weight in module.weights.values():
        weight.source = None
    with pytest.raises(PassError, match=r"group=3\}: @0\.q_k_v: the pattern takes 3 neighbours.*divide rows of 16; choose"):
        Pipeline.parse("prune{group=3}").run(module)
    with pytest.raises(PassError, match=r"prune\{method=wanda\} needs calibration data"):
        Pipeline.parse("prune{method=wanda}").run(module)
    with pytest.raises(PassError, match="refine=dsnot} needs calibration data"):
        Pipeline.parse("prune{refine=dsnot}").run(module)
    with pytest.raises(PassError, match="option skip of prune: no weight is named 'nothing'"):
        Pipeline.parse("prune{skip=nothing}").run(module)
    with pytest.raises(PassError, match="allocation=owl needs calibration data"):
        Pipeline.parse("prune{allocation=owl}").run(module)


# ---- budgets -----------------------------------------------------------------------------------------------------


def loud() -> Module:
    """A decoder with a layer whose weights are mostly small, and some very large."""
    module = decoder()
    w = module.weights["1.down"].load().copy()
    w *= np.where(np.random.default_rng(0).uniform(size=w.shape) < 0.05, 30, 0.5).astype(np.float32)
    module.weights["1.down"].source = ArraySource(w)
    return module


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
@pytest.mark.parametrize("sparsity", [0.35, 0.6])
def test_the_total_is_what_was_asked(allocation: str, method: str, sparsity: float) -> None:
    module, _ = pruned(f"method={method} allocation={allocation} sparsity={sparsity} spread=0.15")
    found = zeros(module)
    sizes = {n: module.weights[n].load().size for n in found}
    assert sum(found.values()) == pytest.approx(sparsity * sum(sizes.values()), abs=len(found) * 2)
    reach = {"uniform": 0, "global": 0.15, "owl": 0.3}[allocation]
    shares = [found[n] / sizes[n] for n in found]
    assert all(abs(s - sparsity) <= reach + 0.02 for s in shares)
    assert (np.ptp(shares) > 0.02) == (allocation != "uniform")


def test_owl_leaves_more_where_more_products_are_outliers() -> None:
    module, _ = pruned("method=wanda allocation=owl sparsity=0.5 spread=0.1", loud())
    shares = {n: (module.weights[n].load() == 0).mean() for n in zeros(module)}
    assert min(shares, key=lambda n: shares[n]) == "1.down.pruned"
    assert np.ptp(list(shares.values())) == pytest.approx(0.2, abs=0.02)


def test_global_takes_where_the_least_of_the_output_is_lost() -> None:
    """One limit: of two layers between the bounds the largest loss, relative to the whole, is about the same."""
    before, module = loud(), loud()
    Pipeline.parse("prune{allocation=global sparsity=0.5 spread=0.3},dce").run(module)
    shares = {n.removesuffix(".pruned"): count / module.weights[n].load().size for n, count in zeros(module).items()}
    assert shares["1.down"] == pytest.approx(0.8, abs=0.02)
    ends = []
    for name in {n for n, s in shares.items() if 0.22 < s < 0.78} & before.weights.keys():
        w = np.square(before.weights[name].load().astype(np.float64)).reshape(-1)
        ends.append(np.sort(w / w.sum())[int(shares[name] * w.size) - 1])
    assert len(ends) > 3
    assert max(ends) < 1.2 * min(ends)


def test_text_of_the_pass_comes_back() -> None:
    text = "prune{method=sparsegpt sparsity=0.6 group=8 allocation=owl}"
    assert str(Pipeline.parse(text)) == text
    assert Prune(pattern="1:4").target == 0.75
