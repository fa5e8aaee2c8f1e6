"""Every kind of sparsity with every scheme of quantization and every KV cache: the cached step gives what the stateless
model gives, and each kernel has a family that takes it. What does not go together is refused by name."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.zoo import randomize
from tilewright.bisect import copy_of
from tilewright.codegen.emitters import choose
from tilewright.codegen.target import parse_target
from tilewright.fallbacks import lower_refused
from tilewright.frontend import trace
from tilewright.ir import ArraySource, Module, PassError, empty_states, interpret
from tilewright.passes.base import PassContext
from tilewright.passes.formats import SCHEMES
from tilewright.passes.pipeline import Pipeline

Array = np.ndarray[Any, Any]
VOCAB, HIDDEN, LENGTH, PROMPT, RANK = 96, 128, 128, 40, 16
REST = f"kv-layout{{length={LENGTH}}},canonicalize,cse,dce,kernels"
SPARSE = {
    "zeros": ("prune{method=magnitude sparsity=0.5}", "sparse-store"),
    "groups": ("prune{method=wanda group=8}", "sparse-store"),
    "inputs": ("sparsify-activations{method=teal sparsity=0.3}", ""),
    "inputs of low rank": (f"sparsify-activations{{method=r-sparse sparsity=0.3 rank={RANK}}}", ""),
    "channels": ("prune-structured{method=magnitude ratio=0.5 units=channels multiple=128}", ""),
    "key heads": ("prune-structured{method=magnitude ratio=0.5 units=groups}", ""),
}
CACHES = {
    "": "",
    **{f"{kind} {dtype}": f"kind={kind} dtype={dtype}" for kind in ("contiguous", "paged") for dtype in ("i8", "i4", "i2")},
    "bf16": "dtype=bf16",
    "channels i2": "dtype=i2 keys=channel group=16 recent=0",
    "ring": "kind=ring window=64 sinks=4",
}
COARSE = {"i2": 2.0, "i4": 0.7, "i8": 0.3, "bf16": 0.3}
"""Relative errors of logits that a cache's numbers may make: thresholds turn small differences into others."""


SMALL = {"inputs of low rank": ("*.lift", RANK), "key heads": ("*.kept", 64)}
"""Weights whose rows are too short for some groups."""


@cache
def model() -> Module:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=LENGTH, use_cache=True, pad_token_id=0,
        bos_token_id=None, eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    return ran(trace(randomize(LlamaForCausalLM(config).eval(), 0)), "clean,fusions")


def ran(source: Module, *passes: str) -> Module:
    """A copy of the module behind the passes."""
    module = copy_of(source)
    ctx = PassContext({"calibration": [{"input_ids": tokens(8, 64, 1)}]})
    Pipeline.parse(",".join(filter(None, passes))).run(module, ctx=ctx)
    return module


def tokens(batch: int, length: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(3, VOCAB, (batch, length))


@cache
def sparse(name: str) -> Module:
    """Sparse, and nothing else."""
    module = ran(model(), SPARSE[name][0])
    for weight in module.weights.values():
        weight.source = ArraySource(weight.load())
    return module


@cache
def want(name: str) -> Array:
    """Logits of the sparse model for the tokens behind the prompt."""
    return logits(sparse(name))


def logits(module: Module) -> Array:
    return interpret(module, "forward", [tokens(2, PROMPT + 2)])[0][:, PROMPT - 1 :]


def told(module: Module) -> Array:
    """The same logits by way of the cache."""
    ids, states, batch = tokens(2, PROMPT + 2), empty_states(module, 2), np.ones(2, np.int64)
    page = next((s.cache.page for s in module.states.values()), 0)
    pages = [1 + np.arange(2 * (LENGTH // page), dtype=np.int32).reshape(2, -1)] if page else []
    steps = [interpret(module, "prefill", [ids[:, :PROMPT], 0 * batch, *pages, (PROMPT - 1) * batch], states)[0]]
    for at in range(PROMPT, PROMPT + 2):
        steps.append(interpret(module, "decode", [ids[:, at : at + 1], at * batch, *pages], states)[0])
    return np.stack(steps, 1)


def expect_near(got: Array, expected: Array, bound: float) -> None:
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert error <= bound


def expect_kernels(module: Module) -> None:
    """Raises CodegenError with the kernel that no family takes, whole or in the plainer forms that the report names."""
    lower_refused(module, parse_target("native"))
    for function in module.functions.values():
        if function.kind == "kernel":
            choose(function, parse_target("native"))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", SPARSE)
def test_every_cache(name: str, cache: str) -> None:
    module = ran(sparse(name), SPARSE[name][1], REST.replace("length=", f"{CACHES[cache]} length="))
    expect_kernels(module)
    coarse = next((bound for word, bound in COARSE.items() if word in cache), 1e-4)
    expect_near(told(module), want(name), coarse)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", SPARSE)
def test_every_scheme(name: str, scheme: str) -> None:
    quantize = f"quantize{{scheme={scheme}}}"
    pattern, rows = SMALL.get(name, ("", HIDDEN))
    if reason := SCHEMES[scheme].format.unfit(HIDDEN, rows):
        with pytest.raises(PassError, match=f"{reason}; .* skip="):
            ran(sparse(name), quantize)
        quantize = f"quantize{{scheme={scheme} skip=[{pattern}]}}"
    quantized = ran(sparse(name), quantize)
    module = ran(quantized, SPARSE[name][1], REST)
    expect_kernels(module)
    expect_near(told(module), logits(quantized), 0.02)
