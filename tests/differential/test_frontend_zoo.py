"""The zoo through the frontend: the interpreter on the traced IR gives what eager PyTorch gives."""

import json

import numpy as np
import pytest

from tests.traced_zoo import known
from tests.zoo import LAYERS, ZOO
from tilewright.ir import interpret, ops


@pytest.mark.parametrize("name", ZOO)
def test_interpreter_equals_eager(name):
    entry, model = ZOO[name], ZOO[name].model()
    module = known(name)
    assert all(op.loc.module for op in module.ops()), "an operation without a location"
    assert set(module.dims) == set(entry.dims)
    assert [a.name for a in module.functions["forward"].args] == list(entry.axes)
    for shape in entry.shapes:
        inputs = {k: v.numpy() for k, v in entry.inputs(shape).items()}
        want = entry.reference(model, shape).numpy()
        got = interpret(module, "forward", inputs)[0]
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=1e-4 * max(1.0, np.abs(want).max()), err_msg=str(shape))


@pytest.mark.parametrize("name", [n for n, e in ZOO.items() if e.is_causal])
def test_causal_models_have_one_attention_a_layer_and_no_built_mask(name):
    module = known(name)
    attentions = list(module.ops(ops.Attention))
    assert len(attentions) == LAYERS
    assert all(a.causal and a.mask is None and a.bias is None and a.padding is None for a in attentions)
    assert not list(module.ops(ops.Le, ops.Lt, ops.Gt, ops.Ge))
    heads, groups = attentions[0].q.shape[2], attentions[0].k.shape[2]
    assert (heads, groups) == ((4, 4) if name in ("gpt2", "gpt-neox", "opt", "nanogpt") or groups == 4 else (4, 2))


def test_windows_and_softcaps_are_attributes():
    mistral = list(known("mistral").ops(ops.Attention))
    assert {a.window for a in mistral} == {8}
    gemma = list(known("gemma2").ops(ops.Attention))
    assert [a.window for a in gemma] == [8, -1]
    assert {a.softcap for a in gemma} == {5.0}


def test_mixtral_has_one_experts_operation_a_layer():
    module = known("mixtral")
    assert len(list(module.ops(ops.Experts))) == LAYERS


def test_the_padding_of_an_encoder_is_an_operand():
    attentions = list(known("bert").ops(ops.Attention))
    assert all(a.padding is not None and a.mask is None and not a.causal for a in attentions)


def test_meta_of_a_causal_language_model():
    meta = known("llama").meta
    assert (meta["task"], meta["token_input"], meta["logits"]) == ("causal-lm", "input_ids", "logits")
    assert (meta["vocab_size"], meta["eos"], meta["outputs"]) == ("128", "[2]", '["logits"]')
    assert json.loads(meta["config"])["hidden_size"] == 64


def test_outputs_are_what_the_model_returns():
    assert json.loads(known("bert").meta["outputs"]) == ["last_hidden_state", "pooler_output"]
    assert json.loads(known("t5").meta["outputs"]) == ["logits", "encoder_last_hidden_state"]


def test_tied_weights_are_one():
    weights = known("qwen2").weights
    assert "model.embed_tokens.weight" in weights
    assert "lm_head.weight" not in weights
