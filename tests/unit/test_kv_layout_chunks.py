"""However a ragged batch is cut into calls, each sequence's logits are those of the stateless model."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.tiny_decoder import Decoder, V
from tests.unit.test_kv_layout import MODELS, Run, cached, forward
from tilewright.ir import Module

CAPACITY = 16


@cache
def pair(name: str) -> tuple[Module, Module]:
    return Decoder(**MODELS[name]).build(), cached(Decoder(**MODELS[name]).build(), length=CAPACITY)


@pytest.mark.parametrize("name", ["rope", "window", "chunk-mask", "learned-from-two", "alibi-key", "relative-window"])
@settings(max_examples=15)
@given(data=st.data())
def test_any_cut(name: str, data: st.DataObject) -> None:
    stateless, module = pair(name)
    lengths = data.draw(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=3))
    rows = [np.random.default_rng(n).integers(0, V, n) for n in lengths]
    run, done = Run(module, len(rows)), np.zeros(len(rows), np.int64)
    while (done < lengths).any():
        room = int(min(CAPACITY - done))  # every row of a call is padded to the same length
        most = min(max(n - d for n, d in zip(lengths, done)), room)
        width = data.draw(st.integers(1, most))
        taken = np.array([min(width, n - d) for n, d in zip(lengths, done)])
        ids = np.zeros((len(rows), width), np.int64)
        for i, row in enumerate(rows):
            ids[i, : taken[i]] = row[done[i] : done[i] + taken[i]]
        logits = run.prefill(ids, done, np.maximum(taken - 1, 0))
        done += taken
        for i, row in enumerate(rows):
            if taken[i]:
                want = forward(stateless, row[None, : done[i]])[0, -1]
                np.testing.assert_allclose(logits[i], want, rtol=1e-4, atol=1e-4)
