"""Layers that go whole: which branches there are, how far they turn the hidden state, and what is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.models import tiny_decoder as tiny
from tests.models.tiny_decoder import Decoder
from tilewright.ir import ArraySource, Module, PassError, empty_states, interpret, ops, parse_module, verify
from tilewright.passes.base import PassContext
from tilewright.passes.pipeline import Pipeline, PipelineReport
from tilewright.passes.structured.branches import find_branches, influences, layers_of

Array = np.ndarray[Any, Any]


def decoder(layers: int = 4, **options: Any) -> Module:
    module = Decoder(rope=True, layers=layers, **options).build()
    Pipeline.parse("clean,fusions").run(module)
    return module


def data(seed: int = 0) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(0, tiny.V, (4, 32))} for _ in range(2)]


def run(module: Module, text: str) -> PipelineReport:
    return Pipeline.parse(f"{text},dce").run(module, ctx=PassContext({"calibration": data()}))


def forward(module: Module) -> Array:
    return interpret(module, "forward", data(seed=9)[0])[0]


def times(module: Module, name: str, factor: float) -> None:
    """Make what a branch adds smaller or larger."""
    weight = module.weights[name]
    weight.source = ArraySource(weight.load() * np.float32(factor))


def test_branches_are_found_by_what_they_compute() -> None:
    function = decoder(3, merged=True).functions["forward"]
    branches = find_branches(function)
    assert [b.attends for b in branches] == [True, False] * 3
    assert [len(block) for block in layers_of(branches)] == [2, 2, 2]


def test_influence_is_the_angle_of_states() -> None:
    module = decoder(2)
    function = module.functions["forward"]
    blocks = layers_of(find_branches(function))
    seen: dict[Any, list[Array]] = {}

    def remember(op: Any, results: Any) -> None:
        for value, array in zip(op.results, results):
            seen.setdefault(value, []).append(array)

    for batch in data():
        interpret(module, "forward", batch, observer=remember)
    for block, found in zip(blocks, influences(function, blocks, data()), strict=True):
        cosines = [
            float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
            for a, b in zip(seen[block[0].trunk], seen[block[-1].add.result])
            for x, y in zip(a.reshape(-1, tiny.H).astype(np.float64), b.reshape(-1, tiny.H).astype(np.float64))
        ]
        assert found.turn == pytest.approx(1 - np.mean(cosines), abs=1e-6)
        assert found.angle == pytest.approx(np.mean(np.arccos(cosines)) / np.pi, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "quiet"),
    [("ratio=0.25", ["2.o", "2.down"]), ("count=2", ["0.o", "0.down", "2.o", "2.down"]),
     ("count=1 blocks=attention", ["1.o"]), ("ratio=0.5 blocks=feedforward", ["1.down", "3.down"]),
     ("count=3 blocks=branches", ["0.down", "1.o", "3.o"])],
)  # fmt: skip
def test_those_that_do_least_go(options: str, quiet: list[str]) -> None:
    module = decoder()
    for name in quiet:
        times(module, name, 1e-3)
    silent = decoder()
    for name in quiet:
        times(silent, name, 0.0)
    want = forward(silent)
    done = run(module, f"prune-layers{{{options}}}")
    verify(module)
    assert not set(quiet) & set(module.weights)
    np.testing.assert_allclose(forward(module), want, atol=1e-4, rtol=1e-4)
    assert "are gone" in done.ctx.notes[-1][1]


def test_caches_are_those_of_the_layers_that_stay() -> None:
    module = decoder(3)
    run(module, "prune-layers{count=1}")
    ids = data(seed=9)[0]["input_ids"][:2, :6]
    want = interpret(module, "forward", [ids])[0]
    Pipeline.parse("kv-layout{length=16},canonicalize,cse,dce").run(module)
    assert len(module.states) == 2
    start = np.zeros(2, np.int64)
    got = interpret(module, "prefill", [ids, start, start + 5], empty_states(module, 2))[0]
    np.testing.assert_allclose(got, want[:, -1], atol=1e-4, rtol=1e-4)


def test_a_branch_that_others_read_stays() -> None:
    module = parse_module("""
module @m {
  dim B : 1..64
  weight @a : tensor<8x8xf32>
  weight @b : tensor<8x8xf32>
  func @forward(%x: tensor<Bx8xf32>) {
    %0 = nn.linear(%x, @a) : tensor<Bx8xf32>
    %1 = core.add(%x, %0) : tensor<Bx8xf32>
    %2 = nn.linear(%1, @b) : tensor<Bx8xf32>
    %3 = core.add(%2, %1) : tensor<Bx8xf32>
    return([%3, %0])
  }
}
""")
    [branch] = find_branches(module.functions["forward"])
    assert branch.add is module.functions["forward"].body[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [("ratio=0", "a ratio above 0"), ("count=0", "a count of 1"), ("ratio=0.5 count=1", "not both"),
     ("blocks=layers", "how much"), ("count=4", "one stays"), ("count=1 skip=*nothing*", "no weight is named"),
     ("count=2 skip=[*0.*,*1.*,*2.*]", "1 layers cannot go")],
)  # fmt: skip
def test_options_that_make_no_sense(options: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        run(decoder(), f"prune-layers{{{options}}}")


def test_it_needs_data() -> None:
    with pytest.raises(PassError, match="needs calibration data"):
        Pipeline.parse("prune-layers{count=1}").run(decoder())


def test_nothing_but_the_branch_goes() -> None:
    module = decoder(2)
    before = len([op for op in module.functions["forward"].walk(ops.Attention)])
    run(module, "prune-layers{count=1 blocks=feedforward}")
    assert len([op for op in module.functions["forward"].walk(ops.Attention)]) == before
