"""A whole model over texts that begin alike: the same tokens whether pages, and reading them, are shared or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import tilewright
from tests.zoo import randomize

COMMON, LENGTH = 600, 768


@pytest.mark.parametrize(("options", "page"), [("", 64), (" page=16 select=0.3 whole=0", 16)], ids=["all", "chosen"])
def test_draws_are_the_same_with_and_without_sharing(tmp_path: Path, options: str, page: int) -> None:
    """Two groups that come interleaved; draws tell logits apart that differ in their last bits. Pages that are chosen
    carry what they are chosen by from one sequence to the next."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    randomize(LlamaForCausalLM(config).eval(), 0).save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 96, 2 * COMMON).tolist()
    begin = tokens[:COMMON], tokens[COMMON:]
    prompts = [[*begin[i % 2], *tokens[7 * i:7 * i + 3 + i]] for i in range(4)]
    draws = {"temperature": 1.0, "seed": 3}
    passes = f"clean,fusions,kv-layout{{kind=paged{options}}},canonicalize,cse,dce,kernels"
    with tilewright.compile(tmp_path, passes=passes, max_length=LENGTH).session(batch=4) as session:
        apart = session.generate(prompts, 12, share=False, **draws)
        assert session.pages is not None
        assert session.pages.reused == 0
        assert session.generate(prompts, 12, **draws) == apart
        assert session.pages.reused >= 2 * (COMMON // page) * page
