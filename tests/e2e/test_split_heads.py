"""A model of which some heads stream: pages for the others, and sequences that come, fork and go."""

from __future__ import annotations

import numpy as np
import pytest

import tilewright
from tests.differential.test_kv_zoo import case
from tilewright import Compiled
from tilewright.bisect import copy_of
from tilewright.ir import interpret
from tilewright.passes import Pipeline
from tilewright.runtime import Batch

SPLIT = "clean,fusions,split-heads{window=8 sinks=2 full=[0.1,1.0]},canonicalize,cse,dce"
LENGTH, CHUNK, PAGE = 96, 16, 16


def made(options: str) -> Compiled:
    layout = f"kv-layout{{kind=ring chunk={CHUNK} length={LENGTH} {options}}}"
    return tilewright.compile(copy_of(case("llama").module), passes=f"{SPLIT},{layout},canonicalize,cse,dce,kernels")


@pytest.fixture(scope="module")
def mixed() -> Compiled:
    return made(f"page={PAGE}")


@pytest.fixture(scope="module")
def text() -> list[int]:
    return np.random.default_rng(0).integers(3, 128, 200).tolist()


def test_tokens_are_those_of_the_stateless_model(mixed: Compiled, text: list[int]) -> None:
    module = copy_of(case("llama").module)
    Pipeline.parse(SPLIT).run(module)
    made = mixed.generate([text[:50]], 40)[0]
    logits = interpret(module, "forward", [np.array([text[:50] + made[:-1]])])[0]
    assert logits[0, 49:].argmax(-1).tolist() == made


def test_bytes(mixed: Compiled) -> None:
    """Full heads have pages, the others a ring of 64 slots and what the sinks take in memory."""
    head = 2 * 16 * 4  # bytes of a token's key and value, f32
    pages = -(-90 // PAGE)
    own = 2 * (64 + 64) * head
    assert mixed.program.cache_bytes(90, 3) == 3 * own + (3 * pages + 1) * PAGE * 2 * head


def test_pages_beside_rings_change_nothing(mixed: Compiled, text: list[int]) -> None:
    prompts = [text[:50], text[100:120], text[:40]]
    assert mixed.generate(prompts, 40) == made("").generate(prompts, 40)


def test_forks_and_equal_beginnings(mixed: Compiled, text: list[int]) -> None:
    """Prompts that begin alike share nothing, since rings have no pages to share; forks copy what is their own."""
    alone = mixed.generate([text[:40]], 30)[0]
    with mixed.session(batch=3) as session, Batch(session) as batch:
        first = batch.add(text[:40], 30)
        tokens: dict[int, list[int]] = {first: []}
        for step in range(60):
            if step == 8:
                tokens[batch.fork(first)] = list(tokens[first])
                tokens[batch.add(text[:40], 30)] = []
            for identity, event in batch.step().items():
                assert event.token is not None
                tokens[identity].append(event.token)
        assert session.pages is not None
        assert session.pages.reused == 0
    assert list(tokens.values()) == [alone] * 3
