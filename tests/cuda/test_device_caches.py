"""Sessions on a GPU over caches in pages and of codes: what the runtime does with their memory, on the emulated device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tilewright
import tilewright.runtime.cuda as cuda
from tests.cuda.driver import fake_driver
from tests.models.tiny_decoder import Decoder
from tilewright.codegen.cuda import source
from tilewright.codegen.cuda.compile import Cubin
from tilewright.codegen.workers import Compilation
from tilewright.ir import Module, interpret
from tilewright.runtime import Batch, Program

TARGET = "cuda{arch=sm_90a}"
LAYOUTS = {"floats": "kind=paged page=16", "codes": "kind=contiguous dtype=i4", "paged": "kind=paged page=16 dtype=i4"}
PROMPTS = [list(range(1, 21)), [*range(1, 17), 30, 31], [7, 8, 9]]
NEW = 6


def model() -> Module:
    return Decoder(rope=True, heads=4, layers=2).build()


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Artifact and driver of each layout. Cubins are empty: the device's compiler takes longest, and nothing runs them."""
    folder, found = tmp_path_factory.mktemp("caches"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(source, "compile_source", lambda text, target: Cubin(b"\x7fELF", {}))
        patch.setattr(Compilation, "helpers", lambda self: 0)
        for name, options in LAYOUTS.items():
            passes = f"clean,fusions,kv-layout{{{options} length=64}},canonicalize,cse,dce,kernels"
            run = tilewright.compile(model(), passes=passes, target=TARGET, out=folder / name)
            assert run.report.fallbacks == []
            found[name] = run.path, fake_driver(run.path, tmp_path_factory.mktemp("driver"))
    return found


@pytest.fixture
def programs(artifacts, monkeypatch) -> Iterator[dict[str, Program]]:
    found = {}
    for name, (path, driver) in artifacts.items():
        monkeypatch.setattr(cuda, "LIBRARY", str(driver))
        found[name] = tilewright.load(path)
    return found


def greedy(prompt: list[int], count: int) -> list[int]:
    """By the interpreter, without a cache."""
    module, tokens = model(), list(prompt)
    for _ in range(count):
        (logits,) = interpret(module, "forward", [np.array([tokens])])
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def run(batch: Batch, made: dict[int, list[int]], steps: int = 100) -> None:
    while (batch.pending or batch.running) and steps:
        steps -= 1
        for identity, event in batch.step().items():
            assert event.error is None
            made.setdefault(identity, []).append(event.token)


def test_pages_of_floats_give_the_tokens_of_the_interpreter(programs) -> None:
    with programs["floats"].session(batch=3) as session:
        assert session.generate(PROMPTS, NEW) == [greedy(prompt, NEW) for prompt in PROMPTS]
        assert session.pages.reused == 16, "a page that two prompts begin with"


def test_pages_of_codes_are_shared_forked_and_left(programs) -> None:
    """Each sequence gets what it gets alone in one piece of memory: prompts in chunks, a copy on write, pages reused."""
    with programs["codes"].session(batch=1) as session:
        alone = [session.generate([prompt], NEW)[0] for prompt in PROMPTS]
    with programs["paged"].session(batch=4, pages=8) as session, Batch(session, chunk=7) as batch:
        copied, copy = [], session.copy
        session.copy = lambda index, to, paged: copied.append((index, to, paged)) or copy(index, to, paged)
        made: dict[int, list[int]] = {}
        first, second, third = (batch.add(prompt, NEW) for prompt in PROMPTS)
        while len(made.get(first, ())) < 2:
            run(batch, made, 1)
        twin = batch.fork(first)
        made[twin] = list(made[first])
        batch.remove(third)
        run(batch, made)
        last = batch.add(PROMPTS[2], NEW)
        run(batch, made)
        assert session.pages.reused >= 16
    assert [made[i] for i in (first, twin, second, last)] == [alone[0], alone[0], alone[1], alone[2]]
    assert [paged for _, _, paged in copied] == [True], "the page that the fork and its parent wrote to"


def test_a_page_is_copied_whole_in_every_layer(programs) -> None:
    with programs["paged"].session(batch=2, pages=4) as session:
        session.generate(PROMPTS[:1], 2)
        before = pages(session)
        session.copy(1, 4, paged=True)
        session.work.wait()
        assert all(part[1].any() for part in before)
        for old, new in zip(before, pages(session)):
            assert np.array_equal(new[4], old[1])
            assert np.array_equal(new[:4], old[:4])


def pages(session: Any) -> list[np.ndarray]:
    """The memory of K and V of each layer, ``[pages, bytes]``."""
    states, found = session._states, []
    for memory, part in zip(states._memory, states.parts):
        out = np.empty((part.count, part.size), np.uint8)
        found.append(session.device.read(memory.address, out))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_are_as_announced_and_given_back(programs, layout: str) -> None:
    """Of codes of four bits a row of 8 takes 16 bytes, and a scale and a zero of two bytes each."""
    program, slot = programs[layout], 8 * 4 if layout == "floats" else 16 + 2 * 2
    slot *= 2 * 2 * 2  # layers, heads, K and V
    need = program.cache_bytes(64, 2)
    assert need == slot * (2 * 64 if layout == "codes" else (2 * 4 + 1) * 16)
    with program.session(batch=2) as session:
        want = session.generate(PROMPTS[:2], NEW)
        assert session.memory["states"] == need
        session.reset()
        assert session.memory == {"arena": 0, "states": 0}
        assert session.pages is None or session.pages.available == 8
        assert session.generate(PROMPTS[:2], NEW) == want


def test_pages_that_the_gpu_has_no_room_for(programs) -> None:
    with programs["paged"].session(pages=1 << 24) as session, pytest.raises(MemoryError, match="16777217 pages of cache"):
        session.generate(PROMPTS[:1], 1)
