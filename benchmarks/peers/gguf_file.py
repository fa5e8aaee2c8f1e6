"""A GGUF file from a checkpoint of our own making; further formats are made of it with llama-quantize."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers.checkpoints import MERGED, tokens
from benchmarks.peers.shapes import Shape

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` -> ``blk.3.ffn_up.weight``."""
    module, _, kind = name.rpartition(".")
    if module in OTHER_NAMES:
        return f"{OTHER_NAMES[module]}.{kind}"
    number, _, inside = module.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{LAYER_NAMES[inside]}.{kind}"


def read_bf16(path: Path) -> Iterator[tuple[str, Any]]:
    """Names and tensors of a safetensors file, as the 16 bits of each bf16."""
    import numpy as np

    data = np.memmap(path, np.uint8, "r")
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    header = json.loads(data[8 : 8 + length].tobytes())
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] != "BF16":
            raise ValueError(f"{path}: {name} is {entry['dtype']}; checkpoints here are bf16")
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        yield name, data[start:end].view(np.uint16).reshape(entry["shape"])


def write(shape: Shape, folder: Path, path: Path) -> None:
    """Write ``path``. Queries and keys are not permuted for GGUF's rope: with random weights that changes nothing."""
    import gguf
    import numpy as np

    config = shape.config
    heads = config["num_attention_heads"]
    writer = gguf.GGUFWriter(path, ARCHITECTURES[shape.architecture])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens(shape.vocabulary))
    writer.add_token_types([gguf.TokenType.NORMAL] * shape.vocabulary)
    writer.add_token_merges([" ".join(MERGED)])
    writer.add_eos_token_id(257)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name, bits in read_bf16(folder / "model.safetensors"):
        if bits.ndim == 1:  # norms and biases are f32 in these files
            writer.add_tensor(gguf_name(name), (bits.astype(np.uint32) << 16).view(np.float32))
        else:
            writer.add_tensor(gguf_name(name), bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
