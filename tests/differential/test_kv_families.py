"""More families of causal models, for what the zoo has not: written-out attention, ALiBi, MLA, sinks, partial rope, MoE."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf

from tests.differential.test_kv_zoo import CUTS, decode, generate
from tests.zoo import COMMON, GROUPED, VOCAB, randomize
from tilewright.frontend import trace
from tilewright.passes import Pipeline

SMALL = {"vocab_size": VOCAB, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
GPT = {**SMALL, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
FALCON = {**SMALL, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "llama3 rope": lambda: hf.LlamaConfig(**GROUPED, rope_parameters=LLAMA3),
    "gemma3": lambda: hf.Gemma3TextConfig(**GROUPED, head_dim=32, sliding_window=8, query_pre_attn_scalar=24),
    "phi": lambda: hf.PhiConfig(**COMMON),
    "falcon": lambda: hf.FalconConfig(**FALCON, max_position_embeddings=256),
    "falcon alibi": lambda: hf.FalconConfig(**FALCON, alibi=True, multi_query=False),
    "bloom": lambda: hf.BloomConfig(**SMALL, hidden_size=64, n_layer=2, n_head=4, pad_token_id=0),
    "gptj": lambda: hf.GPTJConfig(**GPT, rotary_dim=8),
    "gpt-neo": lambda: hf.GPTNeoConfig(
        **SMALL, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8,
        max_position_embeddings=256,
    ),
    "deepseek-v3": lambda: hf.DeepseekV3Config(
        **COMMON, **LATENT, num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1,
    ),
    "gpt-oss": lambda: hf.GptOssConfig(
        **GROUPED, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),
    "olmo2": lambda: hf.Olmo2Config(**GROUPED),
    "cohere2": lambda: hf.Cohere2Config(**GROUPED, sliding_window=8, sliding_window_pattern=2),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens(name: str) -> None:
    model = hf.AutoModelForCausalLM.from_config(FAMILIES[name](), attn_implementation="eager")
    model = randomize(model.eval(), 0)
    module = trace(model)
    Pipeline.parse("clean,fusions,kv-layout{length=64},canonicalize,cse,dce").run(module)
    prompt = torch.randint(3, VOCAB, (2, sum(CUTS)), generator=torch.Generator().manual_seed(7))
    want = generate(model, prompt)
    got, logits = decode(module, prompt.numpy())
    with torch.no_grad():
        full = model(want).logits[:, sum(CUTS) - 1 : -1].numpy()
    assert got.tolist() == want.tolist()
    assert abs(logits - full).max() <= 2e-5 * abs(full).max()
