"""DeepSeek's models over the cache of their latent give the tokens of transformers: interpreted, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf

import tilewright
from tests.differential.test_kv_families import FAMILIES, LATENT
from tests.differential.test_kv_layouts import decode
from tests.differential.test_kv_zoo import CUTS, NEW, generate
from tests.zoo import COMMON, VOCAB, randomize
from tilewright.bisect import copy_of
from tilewright.frontend import trace
from tilewright.ir import Module
from tilewright.passes import Pipeline

MODELS: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "v3": FAMILIES["deepseek-v3"],
    "v2": lambda: hf.DeepseekV2Config(
        **COMMON, **LATENT, num_key_value_heads=4, first_k_dense_replace=2, n_routed_experts=4, num_experts_per_tok=2
    ),
}


@cache
def case(name: str) -> tuple[Module, torch.Tensor, torch.Tensor]:
    """The module, a prompt, and the prompt with what follows."""
    model: Any = hf.AutoModelForCausalLM.from_config(MODELS[name](), attn_implementation="eager")
    model = randomize(model.eval(), 0)
    prompt = torch.randint(3, VOCAB, (2, sum(CUTS)), generator=torch.Generator().manual_seed(7))
    return trace(model), prompt, generate(model, prompt)


@pytest.mark.parametrize(("name", "options"), [
    ("v3", ""), ("v3", "kind=paged page=16"), pytest.param("v2", "", marks=pytest.mark.slow),
])  # fmt: skip
def test_greedy_tokens(name: str, options: str) -> None:
    known, prompt, tokens = case(name)
    module = copy_of(known)
    layout = f"kv-layout{{length=64 {options}}}"
    Pipeline.parse(f"clean,fusions,latent-cache,canonicalize,cse,dce,{layout},canonicalize,cse,dce").run(module)
    rank, rope = LATENT["kv_lora_rank"], LATENT["qk_rope_head_dim"]
    kinds = {(s.cache.heads, s.cache.dim, s.cache.vdim, s.cache.values) for s in module.states.values()}
    assert kinds == {(1, rank + rope, rank, "keys")}
    assert decode(module, prompt.numpy()).tolist() == tokens.tolist()


@pytest.mark.slow
def test_compiled() -> None:
    known, prompt, tokens = case("v3")
    passes = "clean,fusions,latent-cache,canonicalize,cse,dce,kv-layout{kind=paged page=16 length=64},canonicalize,cse,dce"
    run = tilewright.compile(copy_of(known), passes=f"{passes},kernels")
    assert run.generate(prompt.tolist(), NEW) == tokens[:, sum(CUTS) :].tolist()
    assert run.program.cache_bytes(64) == 5 * 16 * 2 * 24 * 4  # pages and the spare one, layers, numbers of 4 bytes
