"""A trained model past the length that it was trained for, in the memory of a small ring."""

from __future__ import annotations

import numpy as np
import pytest

import tilewright
from tests.models import small_lm
from tilewright import Compiled

WINDOW, SINKS, CHUNK = 40, 4, 24  # 64 slots and the sinks


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    options = f"kind=ring window={WINDOW} sinks={SINKS} chunk={CHUNK}"
    passes = f"clean,fusions,kv-layout{{{options}}},canonicalize,cse,dce,kernels"
    return tilewright.compile(small_lm.traced(), passes=passes)


def test_sinks_and_a_window_go_on(compiled: Compiled) -> None:
    """2,000 tokens, four times the trained length: every step has finite logits, and memory is what it was."""
    text = small_lm.held_out()
    with compiled.session() as session:
        steps = [tokens[0] for _, tokens in session.stream([text[:30]], 2000)]
        after = session("decode", ids=np.array([[steps[-1]]]), start=np.array([2029]))["logits"]
        held = session.memory["states"]
    assert len(steps) == 2000
    assert np.isfinite(after.astype(np.float32)).all()
    states = compiled.program.manifest.states
    kept = 64 + 64  # slots of the ring, and of the sinks' first vectors
    size = 2 * kept * 32 * 2  # two heads of 32 numbers of two bytes
    assert {(s.k_bytes, s.v_bytes, s.chunk, s.page) for s in states} == {(size, size, CHUNK, 0)}
    assert held == sum(s.k_bytes + s.v_bytes for s in states)
