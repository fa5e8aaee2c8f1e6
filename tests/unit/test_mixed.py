"""A scheme for each layer under a budget: the choice among known harms, and the harms that are measured."""

from __future__ import annotations

from itertools import product
from random import Random
from typing import Any

import numpy as np
import pytest

from tests.unit.test_calibration import decoder, given, ids
from tilewright.bisect import copy_of
from tilewright.ir import ArraySource, Module, PassError, interpret, ops, parse_module
from tilewright.passes.calibration.budget import Choice, Evolution, Unit, greedy, size
from tilewright.passes.calibration.data import rows
from tilewright.passes.calibration.outputs import first
from tilewright.passes.pipeline import Pipeline

Array = np.ndarray[Any, Any]


# ---- choosing ----------------------------------------------------------------------------------------------------


def units(count: int, seed: int) -> list[Unit]:
    """Units of two sizes; fewer bytes do more harm, by a factor of their own."""
    rng = Random(seed)
    found = []
    for _ in range(count):
        scale, harm = rng.choice((100, 250)), rng.uniform(0.1, 5)
        found.append(Unit({0: 8 * scale, 1: 4 * scale, 2: 3 * scale}, {0: 0.01 * harm, 1: harm, 2: 4 * harm}))
    return found


def total(us: list[Unit], choice: Choice) -> float:
    return sum(u.harm[way] for u, way in zip(us, choice))


@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_near_the_best_of_all_choices(seed: int) -> None:
    us = units(7, seed)
    budget = sum(u.bytes[1] for u in us)
    fitting = [c for c in product(range(3), repeat=7) if size(us, c) <= budget]
    best, worst = (pick(total(us, c) for c in fitting) for pick in (min, max))
    found = greedy(us, budget)
    assert size(us, found) <= budget
    assert total(us, found) <= best + 0.1 * (worst - best)
    assert total(us, found) <= total(us, (1,) * 7)


def test_greedy_takes_everything_when_the_budget_allows_it_and_nothing_when_not() -> None:
    us = units(5, 0)
    assert greedy(us, sum(u.bytes[0] for u in us)) == (0,) * 5
    assert greedy(us, sum(u.bytes[2] for u in us)) == (2,) * 5


def test_a_way_with_more_bytes_and_more_harm_is_never_taken() -> None:
    us = [Unit({0: 10, 1: 20, 3: 10}, {0: 1.0, 1: 2.0, 3: 0.5})]
    assert greedy(us, 100) == (3,)


@pytest.mark.parametrize("seed", range(3))
def test_evolution_finds_what_harms_of_single_layers_do_not_say(seed: int) -> None:
    """Units 0 and 1 do harm together only when both are small; the search sees whole models."""
    us = [Unit({0: 8, 1: 4}, {0: 0.0, 1: 1.0}) for _ in range(6)]
    budget, calls = 4 * 8 + 2 * 4, []

    def judge(choice: Choice, stage: int) -> float:
        calls.append((choice, stage))
        assert size(us, choice) <= budget
        small = {i for i, way in enumerate(choice) if way == 1}
        harm = sum({0: 0.5, 1: 0.5}.get(i, 1.0) for i in small) + 5 * ({4, 5} <= small)
        return harm + (0.3 if stage == 0 and 3 in small else 0)  # the first part of the data misleads a little

    evolution = Evolution(us, budget, judge, 2, 8, seed)
    start = (0, 0, 0, 0, 1, 1)
    best, harm = evolution.run(start, 30)
    assert (best, harm) == ((1, 1, 0, 0, 0, 0), 1.0)
    again = Evolution(us, budget, judge, 2, 8, seed).run(start, 30)
    assert again == (best, harm)
    late = sum(stage == 1 for _, stage in calls)
    assert late < 0.7 * len(calls), "most are measured on the first part alone"


# ---- measuring ---------------------------------------------------------------------------------------------------


def sensitive() -> Module:
    """A decoder whose last layer is the loudest: its first attention does far more harm than its second."""
    module = decoder()
    weight = module.weights["1.down"]
    weight.source = ArraySource(weight.load() * np.float32(8))
    return module


def notes(module: Module, text: str, seed: int = 0) -> dict[str, str]:
    """What the report says of each weight."""
    ctx = given(ids((4, 64), (4, 64), seed=seed))
    Pipeline.parse(text).run(module, ctx=ctx)
    return dict(line.split(": ", 1) for _, line in ctx.notes if line.startswith("@"))


def stored(module: Module) -> int:
    """Bytes of quantized weights."""
    tails = ("i8", "i4", "i3", "i2", "scale")
    return sum(int(w.tensor.bytes) for n, w in module.weights.items() if n.rpartition(".")[2] in tails)


CANDIDATES = 'candidates=[w8a16,"w4a16 group=8","w2a16 group=8"]'


@pytest.mark.parametrize("search", ["greedy", "evolve generations=3 offspring=4"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_layer_that_does_most_harm_gets_more_bits(search: str, method: str) -> None:
    module = sensitive()
    said = notes(module, f"quantize-mixed{{bits=5 {CANDIDATES} search={search} tokens=128 method={method}}},dce")
    assert len(said) == 9
    assert said["@0.q_k_v"].startswith("w4a16 group=8")
    assert said["@1.q_k_v"].startswith("w2a16 group=8")
    elements = sum(int(w.tensor.elements) for n, w in module.weights.items() if n.rpartition(".")[2] in ("i8", "i4", "i2"))
    assert stored(module) <= 5 * elements / 8
    assert stored(module) == sum(int(line.split(", ")[1].split()[0]) for line in said.values())


def test_mixed_is_better_than_uniform_at_equal_bytes() -> None:
    batch = ids((4, 30), seed=9)[0]
    want = interpret(sensitive(), "forward", batch)[0]
    uniform, mixed = sensitive(), sensitive()
    Pipeline.parse("quantize{scheme=w4a16 group=8},dce").run(uniform)
    notes(mixed, f"quantize-mixed{{bytes={stored(uniform)} {CANDIDATES} tokens=256}},dce")
    assert stored(mixed) <= stored(uniform)
    far, near = (np.linalg.norm(interpret(m, "forward", batch)[0] - want) for m in (uniform, mixed))
    assert near < 0.7 * far


def test_harm_is_the_divergence_of_next_tokens_with_one_layer_changed() -> None:
    said = notes(decoder(), f"quantize-mixed{{bits=30 {CANDIDATES.replace('w8a16,', '')} tokens=256}}")
    batch = ids((4, 64), seed=0)[0]
    want = log_softmax(interpret(decoder(), "forward", batch)[0])
    for name in ("@0.q_k_v", "@1.down"):
        module = decoder()
        Pipeline.parse(f"quantize{{scheme=w4a16 group=8 only={name[1:]}}}").run(module)
        got = log_softmax(interpret(module, "forward", batch)[0])
        harm = (np.exp(want) * (want - got)).sum(-1).mean()
        assert said[name].startswith("w4a16 group=8")
        assert float(said[name].split()[-1]) == pytest.approx(harm, rel=0.01)


def log_softmax(x: Array) -> Array:
    x = x.astype(np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_the_choice_depends_on_the_seed_alone() -> None:
    text = f"quantize-mixed{{bits=5 {CANDIDATES} search=evolve generations=4 offspring=4 tokens=128 seed=3}}"
    assert notes(sensitive(), text) == notes(sensitive(), text)


MODEL = """module @m {
  dim B : 1..999
  weight @a : tensor<16x12xf32>
  weight @b : tensor<16x16xf32>
  func @forward(%x: tensor<Bx12xf32>) {
    %0 = nn.linear(%x, @a) : tensor<Bx16xf32>
    %1 = nn.linear(%0, @b) : tensor<Bx16xf32>
    return([%1])
  }
}"""


def plain() -> tuple[Module, Any]:
    module, rng = parse_module(MODEL), np.random.default_rng(0)
    for weight in module.weights.values():
        weight.source = ArraySource(rng.standard_normal(tuple(map(int, weight.shape))).astype(np.float32))
    return module, given([{"x": rng.standard_normal((200, 12)).astype(np.float32)}])


def test_a_candidate_that_does_not_fit_a_layer_is_none_of_its() -> None:
    module, ctx = plain()
    Pipeline.parse('quantize-mixed{bits=32 candidates=[keep,"w4a16 group=16"] only=[a]}').run(copy_of(module), ctx=ctx)
    assert "@a: keep, 768 bytes, squared error 0" in [line for _, line in ctx.notes]
    with pytest.raises(PassError, match=r"no candidate of quantize-mixed fits @a tensor<16x12xf32>; add keep, or name it"):
        Pipeline.parse('quantize-mixed{bits=32 candidates=["w4a16 group=16"]}').run(module, ctx=ctx)


@pytest.mark.parametrize(("options", "message"), [
    ("", r"quantize-mixed needs a budget: bytes=.*bits="),
    ("bytes=100", r"100 bytes are too few: with the smallest of w8a16, w4a16 group=32, w3a16 group=32 the layers take 576"),
    ("bits=4 skip=[*q_proj*]", r"option skip of quantize-mixed: no weight is named '\*q_proj\*'"),
])  # fmt: skip
def test_what_cannot_be_is_refused(options: str, message: str) -> None:
    module, ctx = plain()
    with pytest.raises(PassError, match=message):
        Pipeline.parse(f"quantize-mixed{{{options}}}").run(module, ctx=ctx)


@pytest.mark.parametrize(("options", "message"), [
    ("bytes=3 bits=4", "a budget above 0: bytes or bits, got bytes=3 bits=4"),
    ("bits=0", "a budget above 0"),
    ("bits=4 tokens=0", "tokens, generations and offspring are 1 or more"),
    ("bits=4 candidates=[w5a16]", "there is no scheme 'w5a16'"),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(options: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        Pipeline.parse(f"quantize-mixed{{{options}}}")


def test_part_of_the_data_is_cut_where_inputs_share_an_axis() -> None:
    function = decoder().functions["forward"]
    batches = ids((4, 32), (4, 32))
    assert [rows(b) for b in first(function, batches, 160)] == [128, 32]
    assert [rows(b) for b in first(function, batches, 1)] == [32]
    assert [rows(b) for b in first(function, batches, 10**6)] == [128, 128]
    np.testing.assert_array_equal(first(function, batches, 64)[0]["input_ids"], batches[0]["input_ids"][:2])
    assert len(list(function.walk(ops.Linear))) == 9
