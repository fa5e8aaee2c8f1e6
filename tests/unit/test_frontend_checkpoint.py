"""Hugging Face folders: the same numbers as from_pretrained, read lazily; damaged and unsafe folders are refused."""

import json
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tests.zoo import ZOO
from tilewright.frontend import trace_folder
from tilewright.frontend.checkpoint import Checkpoint, ConvertedSource, SafetensorsFile, TensorSource
from tilewright.ir import CheckpointError, UnsupportedError, interpret


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of zoo models, saved once: ``saved("llama")``."""
    made = {}

    def folder(name, shard="100KB"):
        if (name, shard) not in made:
            made[name, shard] = tmp_path_factory.mktemp(name)
            ZOO[name].model().save_pretrained(made[name, shard], max_shard_size=shard)
        return made[name, shard]

    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """A folder of the llama, in one file, that the test may change."""
    return shutil.copytree(saved("llama", "1GB"), tmp_path / "model")


def rewrite(folder, change):
    """Save the folder's tensors again after ``change``."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def load_all(folder):
    return [weight.load() for weight in trace_folder(folder).weights.values()]


def set_config(folder, **values):
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


# sharded; tied; transposed; names that changed; experts that are stacked from one file each; another base prefix
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt-neox", "mixtral", "vit", "bert", "t5"])
def test_equals_from_pretrained(name, saved):
    entry, folder = ZOO[name], saved(name)
    assert len(list(folder.glob("*.safetensors"))) > 1
    kind = type(entry.model())
    reference = kind.from_pretrained(folder, attn_implementation="eager").eval()
    if name == "mixtral":
        reference.set_experts_implementation("batched_mm")
    module = trace_folder(folder)
    assert not any(isinstance(w.source, torch.Tensor) for w in module.weights.values())
    for shape in entry.shapes[:2]:
        inputs = {k: v.numpy() for k, v in entry.inputs(shape).items()}
        want = entry.reference(reference, shape).numpy()
        np.testing.assert_allclose(interpret(module, "forward", inputs)[0], want, atol=1e-4 * np.abs(want).max())


def test_weights_are_views_of_the_file_under_their_own_names(saved):
    module = trace_folder(saved("llama"))
    name = "model.layers.1.mlp.down_proj.weight"
    source = module.weights[name].source
    assert isinstance(source, TensorSource)
    array = source.load()
    assert not array.flags.owndata
    assert not array.flags.writeable
    before = array.copy()
    source.release()
    np.testing.assert_array_equal(array, before)


def test_experts_are_converted_when_they_are_loaded(saved):
    module = trace_folder(saved("mixtral"))
    weight = module.weights["model.layers.0.mlp.experts.gate_up_proj"]
    assert isinstance(weight.source, ConvertedSource)
    assert len(weight.source.names) == 8
    assert weight.load().shape == weight.shape
    weight.source.release()


def test_tied_weights_come_from_the_one_in_the_file(saved):
    weights = trace_folder(saved("qwen2")).weights
    assert "lm_head.weight" not in weights
    assert weights["model.embed_tokens.weight"].load().shape == (128, 64)


def test_dtype(saved):
    module = trace_folder(saved("llama"), dtype="bf16")
    weight = module.weights["model.embed_tokens.weight"].load()
    assert weight.dtype == ml_dtypes.bfloat16
    assert module.functions["forward"].returns[0].dtype.value == "bf16"
    with pytest.raises(UnsupportedError, match="unknown dtype 'int4'; there are f32, bf16"):
        trace_folder(saved("llama"), dtype="int4")


def test_end_of_sequence_ids_come_from_the_generation_config(copy):
    (copy / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert trace_folder(copy).meta["eos"] == "[2, 5]"


def test_task_chooses_the_class(saved):
    module = trace_folder(saved("bert"), task="encoder")
    assert (module.meta["task"], module.meta["architecture"]) == ("encoder", "BertModel")
    with pytest.raises(UnsupportedError, match="unknown task 'speech'; there are causal-lm"):
        trace_folder(saved("bert"), task="speech")
    with pytest.raises(UnsupportedError, match="no model of type llama for the task seq2seq"):
        trace_folder(saved("llama"), task="seq2seq")


# ---- folders that do not fit ---------------------------------------------------------------------------------------


def test_a_missing_tensor_is_named(copy):
    rewrite(copy, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"the checkpoint lacks model\.layers\.1\.mlp\.up_proj\.weight$"):
        trace_folder(copy)


def test_outputs_whose_weights_are_missing_are_left_out(saved, tmp_path):
    folder = shutil.copytree(saved("bert", "1GB"), tmp_path / "model")
    rewrite(folder, lambda t: [t.pop(k) for k in list(t) if k.startswith("pooler.")])
    module = trace_folder(folder)
    assert module.meta["outputs"] == '["last_hidden_state"]'
    assert not any("pooler" in name for name in module.weights)
    assert not any("pooler" in op.loc.module for op in module.ops())


def test_unused_tensors_are_named(copy):
    rewrite(copy, lambda t: t.update({"extra.weight": torch.ones(2)}))
    assert trace_folder(copy).meta["unused_tensors"] == '["extra.weight"]'


def test_a_wrong_shape_is_named(copy):
    rewrite(copy, lambda t: t.update({"model.norm.weight": torch.ones(65)}))
    message = r"model\.norm\.weight: the model expects shape \[64\], the checkpoint has \[65\]"
    with pytest.raises(CheckpointError, match=message):
        trace_folder(copy)


def test_pickles_are_not_loaded(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"(?s)pytorch_model\.bin; such files can run code.*save_pretrained"):
        trace_folder(copy)


def test_folders_without_weights_or_config(copy, tmp_path):
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no safetensors file; it has config\.json"):
        trace_folder(copy)
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        trace_folder(copy)
    with pytest.raises(CheckpointError, match="is not a folder"):
        trace_folder(tmp_path / "nowhere")


def test_a_missing_shard_is_named(saved, tmp_path):
    folder = shutil.copytree(saved("llama"), tmp_path / "model")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {shard.name}, which its index names"):
        trace_folder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[: len(b) // 2], "is truncated: .* ends at byte"),
        (lambda b: b[:4], "is not a safetensors file"),
        (lambda b: b"\xff" * 64, "is not a safetensors file"),
        (lambda b: b[:8] + b"{" * 100 + b[108:], "has a damaged header"),
        (lambda b: b.replace(b'"F32"', b'"F99"', 1), r"is F99\["),
        (lambda b: b.replace(b"[128,64]", b"[128,63]", 1), r"expects shape \[128, 64\], the checkpoint has \[128, 63\]"),
    ],
)
def test_damaged_files(copy, change, message):
    file = copy / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        load_all(copy)


def test_a_damaged_index_and_config(saved, tmp_path):
    folder = shutil.copytree(saved("llama"), tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        trace_folder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        trace_folder(folder)


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"quantization_config": {"quant_method": "quip"}}, UnsupportedError, r"by a method that is not read \(quip\)"),
        ({"auto_map": {"AutoModel": "x.Y"}, "model_type": "mine"}, UnsupportedError, "brings its own Python code"),
        ({"architectures": ["Nothing"]}, UnsupportedError, r"names the architectures \['Nothing'\]"),
        ({"architectures": None}, UnsupportedError, "give a task"),
        ({"model_type": "nothing"}, CheckpointError, "nothing"),
    ],
)
def test_configs_that_are_refused(copy, values, kind, message):
    set_config(copy, **values)
    with pytest.raises(kind, match=message):
        trace_folder(copy)


MEMORY = """
import resource, sys, time
import torch, transformers.modeling_utils
from tilewright.frontend import api, skeleton

before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
module = api.trace_folder(sys.argv[1])
seconds = time.process_time() - start
for weight in module.weights.values():
    weight.load().view("u2").max()
    if hasattr(weight.source, "release"):
        weight.source.release()
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(round(grown), round(seconds, 1), sum(w.type.bytes for w in module.weights.values()))
"""


def test_tracing_and_reading_a_large_model_takes_little_memory(tmp_path):
    """1.1 billion parameters in bf16, as a sparse file: 2.3 GB that must never be in memory at once."""
    shape = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4}
    config = hf.LlamaConfig(**shape, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=4096)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config)
    header, at = {}, 0
    for name, p in model.named_parameters():
        header[name] = {"dtype": "BF16", "shape": list(p.shape), "data_offsets": [at, at + 2 * p.numel()]}
        at += 2 * p.numel()
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    run = [sys.executable, "-c", MEMORY, str(tmp_path)]
    grown, seconds, size = map(float, subprocess.run(run, check=True, capture_output=True, text=True).stdout.split())
    assert size > 2.2e9
    assert grown < 300 + 270, "MiB; the largest tensor, which is read whole, has 250"
    assert seconds < 10


def test_every_element_type(tmp_path):
    tensors = {
        str(t): torch.arange(6).reshape(2, 3).to(t)
        for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool)
    }
    save_file(tensors | {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.0)}, tmp_path / "model.safetensors")
    file = SafetensorsFile(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(file.array(name).astype(np.float64), tensor.double().numpy())
        file.release(name)
    assert (file.array("empty").shape, file.array("scalar").shape) == ((0, 3), ())
    assert Checkpoint(tmp_path).entry("torch.int8").shape == (2, 3)
