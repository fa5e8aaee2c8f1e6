"""A trained model that keeps a budget of tokens: greedy tokens, batches that grow and shrink, constant memory, refusals."""

from __future__ import annotations

import numpy as np
import pytest

import tilewright
from tests.models import small_lm
from tilewright import Compiled
from tilewright.runtime import Batch, InputError

BUDGET, CHUNK = 60, 48


def made(layout: str, **more: object) -> Compiled:
    passes = f"clean,fusions,kv-layout{layout},canonicalize,cse,dce,kernels"
    return tilewright.compile(small_lm.traced("f32"), passes=passes, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["", "policy=snapkv merge=true"])
def kept(request: pytest.FixtureRequest) -> Compiled:
    return made(f"{{kind=kept budget={BUDGET} chunk={CHUNK} sinks=2 {request.param}}}")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokens = small_lm.held_out()
    return [tokens[150 * i:150 * i + count] for i, count in enumerate((8, 40, 100, 61))]


def test_a_budget_of_the_whole_text_gives_the_same_tokens(prompts: list[list[int]]) -> None:
    """With every policy the tokens of contiguous caches."""
    want = made("", max_length=256).generate(prompts, 24)
    assert made("{kind=kept budget=128 chunk=48 policy=keyformer}").generate(prompts, 24, chunk=30) == want


def test_sequences_that_join_fork_and_leave(kept: Compiled, prompts: list[list[int]]) -> None:
    """Each is as if it were alone, whatever rows lie between those that are fed."""
    alone = [kept.generate([prompt], 20, chunk=16)[0] for prompt in prompts]
    with kept.session(batch=4) as session, Batch(session, chunk=16) as batch:
        ids = [batch.add(prompts[0], 20), batch.add(prompts[1], 20), batch.add(prompts[0], 20)]
        said: dict[int, list[int]] = {}

        def step() -> None:
            for identity, token in batch.step().items():
                assert token.token is not None
                said.setdefault(identity, []).append(token.token)

        for _ in range(6):
            step()
        batch.remove(ids[1])
        late = batch.add(prompts[2], 20)  # in the row between two that go on
        twin = batch.fork(ids[0])
        while batch.pending or batch.running:
            step()
    assert [said[ids[0]], said[ids[2]], said[late]] == [alone[0], alone[0], alone[2]]
    assert said[twin] == alone[0][-len(said[twin]):]


def test_memory_is_that_of_the_budget(kept: Compiled, prompts: list[list[int]]) -> None:
    """600 tokens, more than the model was trained for, and the bytes that arithmetic gives: notes included."""
    with kept.session() as session:
        steps = [tokens[0] for _, tokens in session.stream([prompts[0]], 600)]
        held = session.memory["states"]
    slots = 128  # 60 + 48, rounded up
    size = 6 * 2 * slots * (2 * 32 * 4 + 2 * 4)  # layers, heads, numbers of four bytes, notes
    assert (len(steps), held) == (600, size)
    assert kept.program.cache_bytes(10**6, 3) == 3 * size


def test_a_chunk_at_once(kept: Compiled) -> None:
    ids = np.zeros((1, CHUNK), np.int64)
    with kept.session() as session:
        with pytest.raises(InputError, match=r"values in 0\.\.48"):
            session("prefill", ids=ids, start=[0], last=[0], count=[49])
        with pytest.raises(InputError, match="a size from 1 to 48"):
            session("prefill", ids=np.zeros((1, 49), np.int64), start=[0], last=[0], count=[1])
