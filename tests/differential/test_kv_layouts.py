"""Causal models of the zoo over pages and rings give the tokens of transformers: interpreted, and compiled."""

from __future__ import annotations

import numpy as np
import pytest

import tilewright
from tests.differential.test_kv_zoo import CAUSAL, CUTS, NEW, case
from tilewright.bisect import copy_of
from tilewright.ir import Module, Ring, empty_states, interpret
from tilewright.passes import Pipeline

WINDOWED = ("mistral", "gemma2")


def decode(module: Module, ids: np.ndarray) -> np.ndarray:
    """The prompt, in chunks, and NEW tokens after it, in pages in any order."""
    states, at, batch = empty_states(module, len(ids)), 0, np.ones(len(ids), np.int64)
    pages = next(iter(module.states.values())).cache.pages
    table = np.random.default_rng(0).permutation(len(ids) * pages).reshape(len(ids), pages).astype(np.int32)
    more = {"table": table} if pages else {}
    for n in CUTS:
        given = {"ids": ids[:, at : at + n], "start": at * batch, "last": (n - 1) * batch, **more}
        logits = interpret(module, "prefill", given, states)[0]
        at += n
    for _ in range(NEW):
        ids = np.concatenate([ids, logits.argmax(-1)[:, None]], 1)
        logits = interpret(module, "decode", {"ids": ids[:, -1:], "start": at * batch, **more}, states)[0]
        at += 1
    return ids


@pytest.mark.parametrize(("name", "options"), [
    *((name, "kind=paged page=16 length=64") for name in CAUSAL),
    *((name, "kind=ring chunk=8 length=64") for name in WINDOWED),
])  # fmt: skip
def test_greedy_tokens(name: str, options: str) -> None:
    known = case(name)
    module = copy_of(known.module)
    Pipeline.parse(f"clean,fusions,kv-layout{{{options}}},canonicalize,cse,dce").run(module)
    assert decode(module, known.prompt.numpy()).tolist() == known.tokens.tolist()


@pytest.mark.parametrize(("name", "options"), [
    ("mistral", "kind=ring window=8 chunk=8"), ("gemma2", "kind=ring chunk=8 length=64"),
])  # fmt: skip
def test_compiled(name: str, options: str) -> None:
    """A window's ring is exact; mistral has nothing else, so that no length bounds its text."""
    known = case(name)
    pipeline = f"clean,fusions,kv-layout{{{options}}},canonicalize,cse,dce,kernels"
    run = tilewright.compile(copy_of(known.module), passes=pipeline)
    layouts = {str(state.layout) for state in run.program.manifest.states}
    assert layouts == ({str(Ring(8, 8))} if name == "mistral" else {str(Ring(8, 8)), "contiguous"})
    with run.session(batch=2) as session:
        made = session.generate(known.prompt.numpy(), NEW)
    assert made == known.tokens[:, sum(CUTS) :].tolist()
