"""Export as compressed-tensors: what is read again has the same codes, and the package makes the same numbers of it."""

import json

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from tests.quantized_checkpoints import VOCAB, awq, float_model, gguf_file, gptq
from tilewright.calibration_data import Calibration
from tilewright.compiler import trace
from tilewright.exporting import before_kernels, export
from tilewright.frontend import trace_folder
from tilewright.ir import CheckpointError, UnsupportedError, interpret, ops
from tilewright.ir.core import Env
from tilewright.passes.base import PassContext
from tilewright.passes.pipeline import Pipeline

IDS = np.arange(1, 13)[None] * 7 % VOCAB
BODY = "clean,fusions,quantize{{scheme={} {} layers=body}}"
PIPELINES = {  # and the format that the folder says
    "w8a16": ("w8a16", "pack-quantized"),
    "w8a8": ("w8a8", "mixed-precision"),
    "int8": (BODY.format("w8a8", ""), "int-quantized"),
    "w4a16": ("w4a16", "pack-quantized"),
    "groups": (BODY.format("w4a16", "group=32"), "pack-quantized"),
    "zeros": (BODY.format("w4a16", "group=16 zero=true"), "pack-quantized"),
    "channel with zeros": (BODY.format("w8a16", "zero=true"), "pack-quantized"),
    "int8 with zeros": (BODY.format("w8a8", "zero=true"), "int-quantized"),
    "w3a16": (BODY.format("w3a16", "group=32"), "pack-quantized"),
    "w2a16": (BODY.format("w2a16", "group=32"), "pack-quantized"),
    "fp8": (BODY.format("fp8", ""), "naive-quantized"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama as save_pretrained writes it."""
    path = tmp_path_factory.mktemp("float")
    float_model().save_pretrained(path)
    return path


def quantized(source, pipeline, samples=None):
    module, _ = trace(source, (), None, None, None)
    options = {} if samples is None else {"calibration": Calibration(samples, source).inputs(module)}
    before_kernels(Pipeline.parse(pipeline)).run(module, ctx=PassContext(options))
    return module


def logits(module):
    return interpret(module, "forward", {"input_ids": IDS})[0]


def numbers(module):
    """What the IR makes of each dequantized weight, by the names of its codes."""
    return {
        op.codes.name.rpartition(".")[0]: (op.evaluate(Env({}), *(v and v.load() for v in op.operand_slots())), op)
        for op in module.ops(ops.Dequantize)
        if hasattr(op.codes, "source")
    }


def package_says(out, name):
    """The package's numbers for a weight."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    config, module = QuantizationConfig.model_validate(settings), name.removesuffix(".weight")
    groups = list(config.config_groups.values())
    scheme = next((g for g in groups if module in g.targets), groups[0])
    state = {k[len(module) + 1 :]: v for k, v in load_file(out / "model.safetensors").items() if k.startswith(f"{module}.")}
    return BaseCompressor.get_value_from_registry(scheme.format).decompress(state, scheme)["weight"]


@pytest.mark.parametrize("case", PIPELINES)
def test_the_same_numbers_come_back(case, folder, tmp_path) -> None:
    pipeline, kind = PIPELINES[case]
    out = export(folder, tmp_path / "out", passes=pipeline)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["format"] == kind
    ours, back = quantized(folder, pipeline), trace_folder(out)
    np.testing.assert_allclose(logits(back), logits(ours), rtol=1e-4, atol=1e-4 * np.abs(logits(ours)).max())
    mine, theirs = numbers(ours), numbers(back)
    assert len(theirs) >= 14
    joined = mine["model.layers.0.self_attn.q_proj_k_proj_v_proj.weight"][0]
    parts = [theirs[f"model.layers.0.self_attn.{p}_proj.weight"][0] for p in "qkv"]
    np.testing.assert_array_equal(np.concatenate(parts), joined)
    np.testing.assert_array_equal(
        theirs["model.layers.1.mlp.gate_proj.weight"][0], mine["model.layers.1.mlp.gate_proj.weight"][0]
    )
    for name, (array, op) in theirs.items():
        said = package_says(out, name)
        np.testing.assert_array_equal(array.astype(op.scale.dtype.np), said.to(torch.float32).numpy())
        assert said.dtype in (torch.float32, torch.float16)


@pytest.mark.parametrize("before", ["smooth", "awq{scheme=w4a16 group=32}"])
def test_weights_that_passes_changed_are_exported_as_they_are(before, folder, tmp_path) -> None:
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, VOCAB, 40).tolist() for _ in range(4)]
    pipeline = f"clean,fusions,{before},quantize{{scheme=w4a16 group=32 layers=body method=gptq}}"
    out = export(folder, tmp_path / "out", passes=pipeline, calibration=samples)
    want = logits(quantized(folder, pipeline, samples))
    np.testing.assert_allclose(logits(trace_folder(out)), want, atol=1e-4 * np.abs(want).max())


def test_a_table_that_is_tied_to_the_head(tmp_path) -> None:
    model = float_model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    out = export(tmp_path / "tied", tmp_path / "out", passes="w8a16")
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["config_groups"]["group_0"]["targets"] == ["Linear", "model.embed_tokens"]
    assert settings["ignore"] == ["lm_head"]
    want = logits(quantized(tmp_path / "tied", "w8a16"))
    np.testing.assert_allclose(logits(trace_folder(out)), want, atol=1e-4 * np.abs(want).max())


@torch.no_grad()
def test_transformers_reads_the_folder(folder, tmp_path) -> None:
    out = export(folder, tmp_path / "out", passes=PIPELINES["groups"][0])
    model = hf.AutoModelForCausalLM.from_pretrained(out).eval()
    want = model(torch.from_numpy(IDS)).logits.float().numpy()
    np.testing.assert_allclose(logits(trace_folder(out)), want, atol=5e-3 * np.abs(want).max())


def test_one_format_becomes_another(tmp_path) -> None:
    for make in (gptq, awq):
        saved = make(tmp_path / make.__name__)
        out = export(saved.folder, tmp_path / f"{make.__name__}-out", passes="")
        np.testing.assert_array_equal(logits(trace_folder(out)), logits(trace_folder(saved.folder)))
    gguf_file(tmp_path / "model.gguf", "Q8_0")
    out = export(tmp_path / "model.gguf", tmp_path / "gguf-out", passes="")
    np.testing.assert_array_equal(logits(trace_folder(out, dtype="f32")), logits(trace_folder(tmp_path / "model.gguf")))


@pytest.mark.parametrize(("passes", "message"), [
    (BODY.format("nf4", ""), r"by way of quant\.lookup is not carried"),
    (BODY.format("mxfp4", ""), r"@model\.\S+f4e2m1: compressed-tensors carries no codes f4e2m1 with scales f8e8m0"),
    (BODY.format("fp8-e5m2", ""), r"carries no codes f8e5m2"),
    (BODY.format("two-level", "group=32"), r"by way of quant\.dequantize is not carried"),
    ("O2", r"no weight is quantized after the passes 'O2'; name a scheme, such as w4a16"),
])  # fmt: skip
def test_what_the_format_does_not_carry(passes, message, folder, tmp_path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        export(folder, tmp_path / "out", passes=passes)
    assert not (tmp_path / "out").exists()


def test_requests_that_are_refused(folder, tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(CheckpointError, match="full is there already and not empty"):
        export(folder, tmp_path / "full")
    with pytest.raises(UnsupportedError, match="unknown format 'gptq'; there are compressed-tensors"):
        export(folder, tmp_path / "out", format="gptq")
    (tmp_path / "art").mkdir()
    (tmp_path / "art" / "manifest.json").touch()
    with pytest.raises(UnsupportedError, match="art is an artifact"):
        export(tmp_path / "art", tmp_path / "out")
    with pytest.raises(UnsupportedError, match="columns in an order of their own are not carried"):
        export(gptq(tmp_path / "ordered", act_order=True).folder, tmp_path / "out", passes="")
