"""Models of ragged sizes, compiled and run: the tokens of PyTorch with zeros in the place of what is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import tilewright
from tests.zoo import randomize
from tilewright import Tokenizer

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "models" / "small-lm"
TEXT = ROOT / "tests" / "zoo.py"  # a text that the model was not trained on
NEW = 24


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokens = Tokenizer(FOLDER).encode(TEXT.read_text())
    return [tokens[150 * i : 150 * i + 9] for i in range(2)]


def greedy(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        done = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        rows.append(done[0, len(prompt) :].tolist())
    return rows


@torch.no_grad()
def without_channels(count: int) -> Any:
    """The small model with zeros for the channels of each layer whose weights have the smallest norms together."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager").eval()
    for layer in model.model.layers:
        mlp = layer.mlp
        norms = [float((mlp.gate_proj.weight[i] ** 2).sum() + (mlp.up_proj.weight[i] ** 2).sum()
                       + (mlp.down_proj.weight[:, i] ** 2).sum()) for i in range(704)]  # fmt: skip
        mlp.down_proj.weight[:, np.argsort(norms)[:count].tolist()] = 0
    return model


def test_fewer_channels_than_the_checkpoint_has(prompts: list[list[int]]) -> None:
    passes = "clean,fusions,prune-structured{method=magnitude ratio=0.25 units=channels multiple=16},cache,kernels"
    small = tilewright.compile(FOLDER, passes=passes, max_length=64, dtype="f32")
    assert sum("704 channels became 528" in note for note in small.report.notes) == 6
    assert small.generate(prompts, NEW) == greedy(without_channels(176), prompts)


def gqa() -> Any:
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, head_dim=16, max_position_embeddings=64, use_cache=True, pad_token_id=0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return randomize(LlamaForCausalLM(config).eval(), 0)


@torch.no_grad()
def without_heads(model: Any, layer: int, heads: list[int]) -> None:
    for head in heads:
        model.model.layers[layer].self_attn.o_proj.weight[:, 16 * head : 16 * head + 16] = 0


def norms(model: Any, layer: int, head: int) -> float:
    """Of the weights of a head of queries."""
    attention, rows = model.model.layers[layer].self_attn, slice(16 * head, 16 * head + 16)
    return float((attention.q_proj.weight[rows] ** 2).sum() + (attention.o_proj.weight[:, rows] ** 2).sum())


@pytest.mark.parametrize("units", ["heads", "groups"])
def test_heads_that_differ_by_layer(tmp_path: Path, units: str) -> None:
    model = gqa()
    model.save_pretrained(tmp_path / "hf")
    out = tmp_path / "small.tw"
    ratio = 0.33 if units == "heads" else 0.5  # keys stay where queries alone go
    prune = f"prune-structured{{method=magnitude ratio={ratio} units={units} skip=*layers.1.*}}"
    passes = f"clean,fusions,{prune},cache,kernels"
    tilewright.compile(tmp_path / "hf", passes=passes, max_length=64, out=out)
    heads = [s.k_bytes // (16 * 64 * 4) for s in tilewright.load(out).manifest.states]
    assert heads == ([4, 4, 4] if units == "heads" else [2, 4, 2])
    for layer in (0, 2):
        size = {g: [norms(model, layer, 2 * g), norms(model, layer, 2 * g + 1)] for g in range(4)}
        if units == "heads":
            gone = [2 * g + int(np.argmin(size[g])) for g in size]
        else:
            attention = model.model.layers[layer].self_attn
            for g in size:
                rows = slice(16 * g, 16 * g + 16)
                size[g] += [float((p.weight[rows] ** 2).sum()) for p in (attention.k_proj, attention.v_proj)]
            gone = [2 * g + i for g in sorted(size, key=lambda g: sum(size[g]))[:2] for i in (0, 1)]
        without_heads(model, layer, gone)
    prompts = [[5, 17, 90, 33], [64, 3, 77, 21, 9, 100, 4]]
    with tilewright.load(out).session(batch=2) as session:
        assert session.generate(prompts, NEW) == greedy(model, prompts)
