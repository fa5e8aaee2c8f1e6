"""Sequences over a trained model's caches in pages and rings: the same logits, bit for bit, however pages are shared,
prompts are cut and batches are put together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import tilewright
from tests.models import small_lm
from tilewright.runtime import Batch, OutOfPages, Program, Session
from tilewright.runtime.following import follow
from tilewright.runtime.sampling import Sampler

LAYOUTS = {"contiguous": "", "paged": "kind=paged page=16", "ring": "kind=ring window=48 sinks=4 chunk=16"}
LENGTH, NEW = 128, 12
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def text() -> list[int]:
    return small_lm.held_out()


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    found = {}
    for name, options in LAYOUTS.items():
        length = "" if name == "ring" else f" length={LENGTH}"
        passes = f"clean,fusions,kv-layout{{{options}{length}}},canonicalize,cse,dce,kernels"
        found[name] = tilewright.compile(small_lm.traced(), passes=passes).program
    return found


@pytest.fixture
def paged(programs: dict[str, Program]) -> Iterator[Session]:
    with programs["paged"].session(threads=2, batch=4) as session:
        yield session


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every row of logits that a token is chosen from."""
    rows: list[bytes] = []
    choose = Sampler.choose

    def noted(self: Sampler, logits: Array, generator: np.random.Generator) -> int:
        rows.append(logits.tobytes())
        return choose(self, logits, generator)

    monkeypatch.setattr(Sampler, "choose", noted)
    return rows


def logits_of(session: Session, chosen: list[bytes], prompts: list[list[int]], **options: Any) -> list[bytes]:
    """The logits of a generation, in no order."""
    chosen.clear()
    session.generate(prompts, NEW, **options)
    return sorted(chosen)


def test_pages_give_the_bits_of_contiguous_caches(programs: dict[str, Program], text: list[int]) -> None:
    texts = np.array([text[:70], text[200:270]])
    rows = {}
    for name in ("contiguous", "paged"):
        with programs[name].session(threads=2, batch=2) as session:
            rows[name] = np.stack(list(follow(session, texts, 50)))
    assert rows["contiguous"].tobytes() == rows["paged"].tobytes()


def test_sharing_and_batches_change_no_bit(paged: Session, programs: dict[str, Program], text: list[int],
                                           chosen: list[bytes]) -> None:  # fmt: skip
    """Prompts that begin alike, all at once with and without sharing, again from kept pages, in small chunks, alone."""
    prompts = [text[:60], text[:48] + text[300:320], text[:33], text[:49]]
    want = logits_of(paged, chosen, prompts, share=False)
    assert len(set(want)) == len(prompts) * NEW
    assert paged.pages is not None
    assert paged.pages.reused == 0
    assert logits_of(paged, chosen, prompts) == want
    assert paged.pages.reused == 48 + 48 + 32  # the longest prompt comes first
    assert logits_of(paged, chosen, prompts) == want
    assert paged.pages.reused == 128 + 64 + 48 + 48 + 32
    assert logits_of(paged, chosen, prompts, chunk=13) == want
    assert sorted(row for prompt in prompts for row in logits_of(paged, chosen, [prompt])) == want
    with programs["contiguous"].session(threads=1, batch=4) as session:
        assert logits_of(session, chosen, prompts) == want


def test_samples_are_forks(paged: Session, text: list[int], chosen: list[bytes]) -> None:
    """Samples copy the page that is not full when they part; each has the logits of a sequence of its own."""
    hot = {"temperature": 1.0, "seed": [1, 2, 3, 4]}
    together = logits_of(paged, chosen, [text[:40]], n=4, **hot)
    assert together == logits_of(paged, chosen, [text[:40]] * 4, share=False, **hot)
    assert len(set(together)) > 2 * NEW


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sequences_that_join_and_leave(programs: dict[str, Program], text: list[int], layout: str) -> None:
    """Each gives the tokens that it gives alone, a fork those of its parent."""
    prompts = [text[:30], text[:50], text[400:417]]
    with programs[layout].session(threads=2, batch=3) as session:
        alone = [session.generate([prompt], NEW)[0] for prompt in prompts]
        made: dict[int, list[int]] = {}
        with Batch(session, chunk=16) as batch:
            first = batch.add(prompts[0], NEW)
            gone = batch.add(prompts[2], NEW)
            steps(batch, made, 3)
            batch.remove(gone)
            second = batch.add(prompts[1], NEW)
            steps(batch, made, 2)
            twin = batch.fork(first)
            made[twin] = list(made[first])
            steps(batch, made, 2)
            third = batch.add(prompts[2], NEW)
            steps(batch, made, 40)
            assert not batch.running
            assert not batch.pending
    assert [made[i] for i in (first, twin, second, third)] == [alone[0], alone[0], alone[1], alone[2]]


def steps(batch: Batch, made: dict[int, list[int]], count: int) -> None:
    for _ in range(count):
        for identity, event in batch.step().items():
            assert event.token is not None
            made.setdefault(identity, []).append(event.token)


def test_one_that_finds_no_page_fails_alone(programs: dict[str, Program], text: list[int]) -> None:
    with programs["paged"].session(threads=2, batch=2, pages=5) as session:
        alone = session.generate([text[:30]], 20)[0]
        with Batch(session) as batch:
            ids = [batch.add(text[:30], 20), batch.add(text[100:130], 20)]
            made, failed = {i: [] for i in ids}, {}
            while batch.running or batch.pending:
                for identity, event in batch.step().items():
                    made[identity] += [] if event.token is None else [event.token]
                    failed |= {identity: event.error} if event.error else {}
    assert made[ids[0]] == alone
    assert list(failed) == [ids[1]]
    assert isinstance(failed[ids[1]], OutOfPages)


def test_a_ring_goes_on_in_constant_memory(programs: dict[str, Program], text: list[int]) -> None:
    """Past the length that the model was trained for; as long as nothing is forgotten, as if all was kept."""
    with programs["ring"].session(threads=2) as session, programs["contiguous"].session(threads=2) as whole:
        assert session.generate([text[:20]], NEW) == whole.generate([text[:20]], NEW)
        held = session.memory["states"]
        [made] = session.generate([text[:600]], 100)
        assert len(made) == 100
        assert session.memory["states"] == held == programs["ring"].cache_bytes(700)


def test_bytes_are_those_of_the_arithmetic(programs: dict[str, Program], text: list[int]) -> None:
    for program in programs.values():
        need = program.cache_bytes(60, 3)
        with program.session(batch=3, memory=need) as session:
            session.generate([text[:50], text[50:100], text[100:150]], 11, share=False)
            assert session.memory["states"] == need
