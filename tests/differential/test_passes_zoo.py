"""Every pass leaves every model of the zoo what it computes, and text that parses back; then the graphs are clean."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tests.traced_zoo import traced
from tests.zoo import ZOO
from tilewright.ir import Module, interpret, ops, parse_module, print_module
from tilewright.passes import Pass, Pipeline

TOLERANCE = 2e-5
GRAPH = "clean,fusions"
OPERATIONS = {
    "llama": 46,
    "qwen2": 46,
    "qwen3": 50,
    "mistral": 46,
    "gemma2": 56,
    "phi3": 46,
    "gpt2": 42,
    "gpt-neox": 48,
    "opt": 40,
    "mixtral": 60,
    "nanogpt": 40,
    "bert": 45,
    "t5": 148,
    "vit": 44,
    "resnet": 18,
    "mlp": 5,
    "convnet": 8,
}
"""How many operations may be left, the return apart: a match that is lost shows here."""


def results(module: Module, name: str) -> list[list[np.ndarray]]:
    entry = ZOO[name]
    inputs = [{k: v.numpy() for k, v in entry.inputs(shape).items()} for shape in entry.shapes[:2]]
    return [interpret(module, "forward", x) for x in inputs]


def counts(module: Module) -> Counter[str]:
    return Counter(op.name for op in module.functions["forward"].body)


@pytest.mark.parametrize("name", ZOO)
def test_each_pass_keeps_the_results(name: str) -> None:
    module = traced(name)
    want = results(module, name)

    def check(p: Pass, m: Module) -> None:
        assert parse_module(print_module(m)) == m, p
        for before, after in zip(want, results(m, name)):
            for x, y in zip(before, after, strict=True):
                assert np.abs(x - y).max() <= TOLERANCE * np.abs(x).max(), p

    Pipeline.parse(GRAPH).run(module, on_pass=check)


@pytest.mark.parametrize("name", ZOO)
def test_graphs_are_clean(name: str) -> None:
    module = traced(name)
    Pipeline.parse(GRAPH).run(module)
    found = counts(module)
    assert sum(found.values()) - 1 <= OPERATIONS[name], found
    text = print_module(module)
    Pipeline.parse(GRAPH).run(module)
    assert print_module(module) == text, "a second run still changes something"


DECODERS = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt-neox", "mixtral"]


@pytest.mark.parametrize("name", [*DECODERS, "gpt2", "opt", "nanogpt", "bert", "t5"])
def test_attention_needs_no_transposes(name: str) -> None:
    module = traced(name)
    Pipeline.parse(GRAPH).run(module)
    for op in module.functions["forward"].walk(ops.Attention):
        for value in op.operands[:3]:
            assert not isinstance(value.owner, ops.Transpose)
        assert not any(isinstance(user, ops.Transpose) for user in op.result.users)
        assert not op.attrs["causal"] or op.operand_slots()[3] is None
    found = counts(module)
    assert found["core.transpose"] == {"t5": 2}.get(name, 0)  # of the position biases
    assert found["nn.rope"] == (4 if name in DECODERS else 0)
    assert not {"core.sigmoid", "core.rsqrt", "core.matmul"} & set(found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_eight_bit_weights_stay_close(name: str) -> None:
    module = traced(name)
    want = results(module, name)
    Pipeline.parse(f"{GRAPH},quantize,dce").run(module)
    layers = module.functions["forward"].walk(ops.Linear, ops.GatedLinear)
    made = [op.operands[1].owner for op in layers]
    assert {op.codes.dtype.value for op in made if isinstance(op, ops.Dequantize)} == {"i8"}
    assert all(isinstance(op, ops.Dequantize) for op in made)
    for before, after in zip(want, results(module, name)):
        assert np.abs(before[0] - after[0]).max() <= 0.1 * np.abs(before[0]).max()
