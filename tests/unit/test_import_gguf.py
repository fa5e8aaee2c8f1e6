"""GGUF files: weights bit for bit what the package gguf makes of them, models what transformers' are."""

import json

import numpy as np
import pytest
import torch

from tests.quantized_checkpoints import VOCAB, gguf_file, random_blocks
from tilewright.frontend import trace_folder
from tilewright.frontend.quantized.blocks import BLOCKS
from tilewright.ir import CheckpointError, UnsupportedError, interpret, ops
from tilewright.ir.core import Env

gguf = pytest.importorskip("gguf")
IDS = np.arange(1, 13)[None] * 7 % VOCAB


def logits(module) -> np.ndarray:
    return interpret(module, "forward", {"input_ids": IDS})[0]


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_mean_what_gguf_says(kind: str) -> None:
    rows = random_blocks(kind, 6, 1024, 0)
    want = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    block, octets = BLOCKS[kind], rows.reshape(-1, BLOCKS[kind].bytes)
    made = {name: make(octets).reshape(6, -1) for name, make in block.parts.items()}
    scale = made["scale"].astype(np.float32)[..., None]
    numbers = made["codes"].astype(np.float32).reshape(*scale.shape[:2], -1) * scale
    numbers = numbers + made["offset"][..., None] if "offset" in made else numbers
    np.testing.assert_array_equal(numbers.reshape(6, -1).view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("kind", [*BLOCKS, "F32", "F16", "BF16"])
@torch.no_grad()
def test_files_of_each_type(kind: str, tmp_path) -> None:
    model = gguf_file(tmp_path / "model.gguf", kind)
    module = trace_folder(tmp_path / "model.gguf", dtype="f32")
    dense = dict(model.named_parameters())
    for op in module.ops(ops.Dequantize):
        name, _, codes = op.codes.name.rpartition(".")
        got = op.evaluate(Env({}), *(v and v.load() for v in op.operand_slots()))
        assert codes == BLOCKS[kind].codes.value
        assert torch.equal(torch.from_numpy(got), dense.pop(name))
    for name, weight in module.weights.items():
        if name in dense:
            np.testing.assert_array_equal(weight.load(), dense.pop(name).numpy())
    assert not dense
    want = model(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(logits(module), want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
@torch.no_grad()
def test_architectures(architecture: str, tmp_path) -> None:
    model = gguf_file(tmp_path / "model.gguf", "Q8_0", architecture)
    want = model(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(logits(trace_folder(tmp_path / "model.gguf")), want, atol=1e-4 * np.abs(want).max())


@torch.no_grad()
def test_factors_of_frequencies(tmp_path) -> None:
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    model = gguf_file(tmp_path / "model.gguf", add=lambda w: w.add_tensor("rope_freqs.weight", factors))
    plain = model(torch.from_numpy(IDS)).logits.numpy()
    model.model.rotary_emb.inv_freq /= torch.from_numpy(factors)
    want = model(torch.from_numpy(IDS)).logits.numpy()
    assert np.abs(plain - want).max() > 0.01 * np.abs(want).max()
    module = trace_folder(tmp_path / "model.gguf")
    np.testing.assert_allclose(logits(module), want, atol=1e-4 * np.abs(want).max())
    assert "unused_tensors" not in module.meta


def test_types_and_notes(tmp_path) -> None:
    gguf_file(tmp_path / "six.gguf", "Q6_K")
    module = trace_folder(tmp_path / "six.gguf")
    assert json.loads(module.meta["notes"]) == ["16 tensors of Q6_K: their codes of 6 bits are held in 8"]
    assert module.functions["forward"].returns[0].dtype.value == "f32"
    assert module.meta["eos"] == "[2]"
    gguf_file(tmp_path / "brain.gguf", "BF16")
    assert trace_folder(tmp_path / "brain.gguf").functions["forward"].returns[0].dtype.value == "bf16"


# ---- files that are refused ------------------------------------------------------------------------------------------


def test_a_file_that_is_damaged(tmp_path) -> None:
    file = tmp_path / "model.gguf"
    gguf_file(file)
    whole = file.read_bytes()
    for part in (whole[:-1000], whole[:3000], whole[:10], b"", b"GGML" + whole[4:]):
        file.write_bytes(part)
        with pytest.raises(CheckpointError, match=r"model\.gguf is damaged, or no GGUF file"):
            trace_folder(file)


def test_what_is_not_read(tmp_path) -> None:
    file = tmp_path / "model.gguf"
    gguf_file(file, add=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN))
    with pytest.raises(UnsupportedError, match=r"the rope\.scaling\.type yarn is not read from GGUF; there are"):
        trace_folder(file)
    gguf_file(file, add=lambda w: w.add_tensor("x", np.zeros((2, 8), np.int32)))
    with pytest.raises(UnsupportedError, match="x has the type I32, which is not read; there are F32, F16, BF16, Q4_0"):
        trace_folder(file)
    writer = gguf.GGUFWriter(file, "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="the architecture bert is not read from GGUF; there are llama, mistral"):
        trace_folder(file)
    writer = gguf.GGUFWriter(file, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"model\.gguf lacks the setting llama\.attention\.head_count"):
        trace_folder(file)
