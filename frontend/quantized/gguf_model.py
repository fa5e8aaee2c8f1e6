"""Which model of transformers a GGUF file is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tilewright.frontend.quantized.gguf_file import FREQUENCIES, GgufFile
from tilewright.frontend.skeleton import model_class
from tilewright.ir.errors import UnsupportedError

_MODELS = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}  # architecture -> model_type
_HALVES = ("llama", "mistral")  # rows of q and k are in llama.cpp's order


def config_of(file: GgufFile) -> Any:
    """The config of transformers that says what the file's settings say.

    Raises UnsupportedError for an architecture or a setting that is not read, CheckpointError for one that is missing.
    """
    if file.architecture not in _MODELS:
        known = ", ".join(_MODELS)
        own = file.architecture
        raise UnsupportedError(f"{file.path}: the architecture {own} is not read from GGUF; there are {known}")
    if file.setting("expert_count", 0):
        raise UnsupportedError(f"{file.path}: experts are not read from GGUF; use the model's Hugging Face folder")
    heads, width = file.setting("attention.head_count"), file.setting("embedding_length")
    if not isinstance(heads, int):
        raise UnsupportedError(f"{file.path}: layers with different numbers of heads are not read from GGUF")
    table = file.tensors.get("token_embd.weight")
    values: dict[str, Any] = {
        "vocab_size": table.shape[0] if table is not None else file.setting("vocab_size"),
        "hidden_size": width,
        "intermediate_size": file.setting("feed_forward_length"),
        "num_hidden_layers": file.setting("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.setting("attention.head_count_kv", heads),
        "head_dim": file.setting("attention.key_length", file.setting("rope.dimension_count", width // heads)),
        "rms_norm_eps": file.setting("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": file.setting("context_length"),
        "rope_parameters": _rope(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "use_cache": False,
    }
    if file.architecture == "llama":
        values["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        values["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    if file.architecture == "mistral" and file.setting("attention.sliding_window", 0):
        values["sliding_window"] = file.setting("attention.sliding_window")
    for name in ("bos", "eos"):
        if f"tokenizer.ggml.{name}_token_id" in file.fields:
            values[f"{name}_token_id"] = file.fields[f"tokenizer.ggml.{name}_token_id"]
    return transformers.AutoConfig.for_model(_MODELS[file.architecture], **values)


def _rope(file: GgufFile) -> dict[str, Any]:
    kind = file.setting("rope.scaling.type", "none")
    base = {"rope_theta": float(file.setting("rope.freq_base", 10000.0))}
    if kind == "none":
        return {**base, "rope_type": "default"}
    if kind == "linear":
        return {**base, "rope_type": "linear", "factor": float(file.setting("rope.scaling.factor"))}
    raise UnsupportedError(f"{file.path}: the rope.scaling.type {kind} is not read from GGUF; there are none and linear")


def heads_of(file: GgufFile, config: Any) -> dict[str, int] | None:
    """The projections whose rows are in llama.cpp's order, with their heads."""
    if file.architecture not in _HALVES:
        return None
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}


def dtype_of(file: GgufFile) -> torch.dtype:
    """The type of activations when none is asked for: that of the matrices if they are plain, else f32."""
    kinds = {at.kind for at in file.tensors.values() if len(at.shape) == 2}
    plain = {"F16": torch.float16, "BF16": torch.bfloat16}
    return plain.get(next(iter(kinds)), torch.float32) if len(kinds) == 1 else torch.float32


def notes_of(file: GgufFile) -> list[str]:
    """What the report should say of how the file's numbers are kept."""
    sixes = sum(at.kind == "Q6_K" for at in file.tensors.values())
    return [f"{sixes} tensors of Q6_K: their codes of 6 bits are held in 8"] if sixes else []


def scale_frequencies(model: Any, file: GgufFile) -> None:
    """Divide the frequencies of rotations by the file's factors, where it has some (Llama 3.1 and later)."""
    if FREQUENCIES not in file.tensors:
        return
    factors = torch.from_numpy(file.bytes_of(FREQUENCIES).view(np.float32).copy())
    frequencies = model.model.rotary_emb.inv_freq
    frequencies.copy_(frequencies / factors)


def write_files(path: Path, folder: Path) -> list[str]:
    """Write config.json and the tokenizer's files for a GGUF file into ``folder``; gives what could not be, in words."""
    file = GgufFile(path)
    config = config_of(file)
    config.architectures = [model_class(config, "causal-lm").__name__]
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1, default=str))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the converter meets files of all sorts; a model without a tokenizer still runs
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return [f"the tokenizer could not be converted: {reason}"]
    return []
