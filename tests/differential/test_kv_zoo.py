"""Every causal model of the zoo, traced and given its cache, decodes the tokens that eager PyTorch does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from tests.traced_zoo import OWN, known
from tests.zoo import VOCAB, ZOO
from tilewright.bisect import copy_of
from tilewright.ir import Module, empty_states, interpret
from tilewright.passes import Pipeline

CAUSAL = [name for name, entry in ZOO.items() if entry.is_causal]
NEW, CUTS = 32, (7, 4)
PIPELINES = {
    "plain": "canonicalize,dce,kv-layout{length=64}",
    "O2": "clean,fusions,kv-layout{length=64},canonicalize,cse,dce",
}


@dataclass
class Case:
    """One model, traced once, and what it generates."""

    module: Module
    prompt: torch.Tensor
    tokens: torch.Tensor
    logits: np.ndarray


@cache
def case(name: str) -> Case:
    model: Any = ZOO[name].model()
    prompt = torch.randint(3, VOCAB, (2, sum(CUTS)), generator=torch.Generator().manual_seed(7))
    tokens = generate(model, prompt) if hasattr(model, "generate") else greedy(model, prompt)
    with torch.no_grad():
        out = model(tokens)
    full = out if isinstance(out, torch.Tensor) else out.logits
    return Case(traced(name), prompt, tokens, full[:, sum(CUTS) - 1 : -1].numpy())


def traced(name: str) -> Module:
    module = copy_of(known(name))
    if name in OWN:
        module.meta["task"] = "causal-lm"  # nobody else knows what a module of the user's own is for
    return module


def greedy(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The prompt and NEW tokens after it."""
    with torch.no_grad():
        for _ in range(NEW):
            out = model(ids)
            logits = out if isinstance(out, torch.Tensor) else out.logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids


def generate(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """As :func:`greedy`, by transformers with its own cache."""
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "use_cache": True}
    out = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, eos_token_id=None, pad_token_id=0, **options)
    return torch.as_tensor(out)


def decode(module: Module, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The prompt, in chunks, and NEW tokens after it; and the logits of each."""
    states, at, steps = empty_states(module, len(ids)), 0, []
    batch = np.ones(len(ids), np.int64)
    for n in CUTS:
        logits = interpret(module, "prefill", [ids[:, at : at + n], at * batch, (n - 1) * batch], states)[0]
        at += n
    for _ in range(NEW):
        steps.append(logits)
        ids = np.concatenate([ids, logits.argmax(-1)[:, None]], 1)
        logits = interpret(module, "decode", [ids[:, -1:], at * batch], states)[0]
        at += 1
    return ids, np.stack(steps, 1)


@pytest.mark.parametrize(("name", "pipeline"), [(name, pipeline) for name in CAUSAL for pipeline in PIPELINES])
def test_greedy_tokens(name: str, pipeline: str) -> None:
    want = case(name)
    module = copy_of(want.module)
    Pipeline.parse(PIPELINES[pipeline]).run(module)
    assert sorted(module.functions) == ["decode", "prefill"]
    assert len(module.states) == 2
    got, logits = decode(module, want.prompt.numpy())
    assert got.tolist() == want.tokens.tolist()
    assert np.abs(logits - want.logits).max() <= 2e-5 * np.abs(want.logits).max()
    assert len(set(got[:, sum(CUTS) :].ravel().tolist())) > 4, "the tokens say something"
