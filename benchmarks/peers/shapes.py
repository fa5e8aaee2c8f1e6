"""The models: shapes of well-known ones, with random weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A model: the architecture of a ``transformers`` class, and the numbers of its configuration."""

    name: str
    like: str
    architecture: str
    dtype: str
    config: dict[str, Any] = field(hash=False)

    @property
    def is_encoder(self) -> bool:
        return self.architecture == "BertModel"

    @property
    def vocabulary(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def layer_parameters(self) -> int:
        """Weights of the linear layers of all blocks: each takes a multiply-add a token."""
        config = self.config
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        keys = hidden * config["num_key_value_heads"] // heads
        block = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * config["intermediate_size"]
        return int(config["num_hidden_layers"] * block)


def _decoder(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
    }


_ENCODER = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
}

SHAPES = {
    "S": Shape("S", "SmolLM-135M", "LlamaForCausalLM", "bfloat16", _decoder(576, 30, 9, 3, 1536, 49152, True)),
    "M": Shape("M", "Qwen2.5-0.5B", "Qwen2ForCausalLM", "bfloat16", _decoder(896, 24, 14, 2, 4864, 151936, True)),
    "L": Shape("L", "TinyLlama-1.1B", "LlamaForCausalLM", "bfloat16", _decoder(2048, 22, 32, 4, 5632, 32000, False)),
    "E": Shape("E", "MiniLM-L6", "BertModel", "float32", _ENCODER),
}

_8B = _decoder(4096, 32, 32, 8, 14336, 128256, False)
GPU_SHAPES = {
    "1B": Shape("1B", "TinyLlama-1.1B", "LlamaForCausalLM", "bfloat16", SHAPES["L"].config),
    "8B": Shape("8B", "Llama-3.1-8B", "LlamaForCausalLM", "bfloat16", _8B),
}
"""Those of `benchmarks.gpu`, which needs no checkpoints."""
