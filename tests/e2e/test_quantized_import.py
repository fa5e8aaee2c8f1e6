"""Quantized folders compile, and give the logits of a dense model with the same weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tilewright
from tests.quantized_checkpoints import VOCAB, awq, compressed, gguf_file, gptq

SMALL_LM = Path(__file__).parents[1] / "models" / "small-lm"
TOKENIZER = 400  # tokens of its tokenizer
EVERY_POSITION = "clean,fusions,kernels"  # without a cache: forward(ids) -> logits at every position
INT4 = {"num_bits": 4, "strategy": "group", "group_size": 32}
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
FLOATS = {"num_bits": 8, "type": "float", "strategy": "channel"}
MAKERS = {  # what makes a folder, and the least distance from a logit that 8 bits of activations bring
    "int4": lambda path: compressed(path, "pack-quantized", **INT4),
    "int4 asymmetric": lambda path: compressed(path, "pack-quantized", **INT4, symmetric=False),
    "fp8": lambda path: compressed(path, "naive-quantized", **FLOATS),
    "gptq": gptq,
    "gptq asymmetric": lambda path: gptq(path, symmetric=False),
    "gptq 3 bits": lambda path: gptq(path, bits=3),
    "gptq act-order": lambda path: gptq(path, act_order=True),
    "awq": awq,
}


@pytest.mark.parametrize("maker", MAKERS)
def test_logits_are_those_of_the_dense_model(maker, tmp_path) -> None:
    saved = MAKERS[maker](tmp_path / "model")
    done = tilewright.compile(saved.folder, passes=EVERY_POSITION)
    got, want = np.asarray(done(saved.inputs.numpy())), saved.logits().numpy()
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    assert done.report.fallbacks == []


def test_rounded_activations_cost_little_and_layers_are_joined(tmp_path) -> None:
    saved = compressed(tmp_path / "model", "int-quantized", num_bits=8, strategy="channel", activations=TOKENS)
    done = tilewright.compile(saved.folder, passes=EVERY_POSITION)
    got, want = np.asarray(done(saved.inputs.numpy())), saved.logits().numpy()
    assert 1e-4 < np.linalg.norm(got - want) / np.linalg.norm(want) < 0.03
    assert done.report.fallbacks == []
    layers = [k for k in done.report.kernels if k["backend"] == "mlir.linear"]
    assert sum(k["calls"] for k in layers) == 2 * 4 + 1  # q, k and v; o; gate and up; down; the head


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
@torch.no_grad()
def test_gguf(kind, tmp_path) -> None:
    model = gguf_file(tmp_path / "model.gguf", kind)
    ids = torch.arange(1, 13)[None] * 7 % VOCAB
    done = tilewright.compile(tmp_path / "model.gguf", passes=EVERY_POSITION)
    got, want = np.asarray(done(ids.numpy())), model(ids).logits.numpy()
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    assert done.report.fallbacks == []


@torch.no_grad()
def test_generation(tmp_path) -> None:
    saved = gptq(tmp_path / "model", symmetric=False)
    done = tilewright.compile(saved.folder, max_length=64)
    prompt = saved.inputs[0].tolist()
    want = saved.model().generate(saved.inputs, max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
    assert done.generate([prompt], 8) == [want]
    assert sum(done.report.weight_bytes.values()) > 0


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8"])
def test_what_was_exported_runs_on_the_same_kernels(scheme, tmp_path) -> None:
    """An imported model is as fast as our own: its layers are joined, its kernels and their layouts are the same."""
    own = tilewright.compile(SMALL_LM, passes=scheme, max_length=64)
    imported = tilewright.compile(tilewright.export(SMALL_LM, tmp_path / "out", passes=scheme), max_length=64)
    kernels = [sorted((k["workload"], k["calls"]) for k in done.report.kernels) for done in (own, imported)]
    assert kernels[0] == kernels[1]
    assert own.report.weight_bytes == imported.report.weight_bytes
    assert own.generate([[5, 6, 7]], 8) == imported.generate([[5, 6, 7]], 8)


def test_commands(tmp_path) -> None:
    from typer.testing import CliRunner

    from tilewright.cli import app

    saved, run = gptq(tmp_path / "gptq"), CliRunner().invoke
    done = run(app, ["export", str(saved.folder), "--out", str(tmp_path / "out"), "--passes", ""])
    assert (done.exit_code, done.output) == (0, f"wrote {tmp_path / 'out'}\n")
    gguf_file(tmp_path / "model.gguf", "Q4_0")
    for source in (saved.folder, tmp_path / "out", tmp_path / "model.gguf"):
        assert "quant.dequantize" in run(app, ["opt", str(source)]).output


def add_tokenizer(writer) -> None:
    """The tokenizer of the small model, as far as the vocabulary goes."""
    told = json.loads((SMALL_LM / "tokenizer.json").read_text())["model"]
    tokens = sorted(told["vocab"], key=told["vocab"].get)[:TOKENIZER]
    merges = [" ".join(pair) for pair in told["merges"] if {*pair, "".join(pair)} <= set(tokens)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(merges)


def test_a_gguf_file_brings_its_tokenizer(tmp_path) -> None:
    gguf_file(tmp_path / "model.gguf", "Q8_0", add=add_tokenizer, vocabulary=TOKENIZER)
    done = tilewright.compile(tmp_path / "model.gguf", max_length=64)
    assert not [note for note in done.report.notes if "could not" in note]
    tokenizer = tilewright.Tokenizer(done.path)
    ids = tokenizer.encode("there")
    assert ids
    assert tokenizer.decode(ids) == "there"
    assert json.loads((done.path / "config.json").read_text())["model_type"] == "llama"


def test_a_gguf_file_without_a_tokenizer_says_so(tmp_path) -> None:
    gguf_file(tmp_path / "model.gguf", "Q8_0")
    done = tilewright.compile(tmp_path / "model.gguf", max_length=64)
    assert [n for n in done.report.notes if n.startswith("import: the tokenizer could not be converted: ")]
    assert len(done.generate([[5, 6, 7]], 4)[0]) == 4
