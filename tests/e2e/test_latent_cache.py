"""A whole model over a cache of its latent: sequences share, fork and copy pages as over any other."""

from __future__ import annotations

import numpy as np

import tilewright
from tests.models.latent_decoder import RANK, LatentDecoder
from tilewright.runtime import Batch, Program

LENGTH, NEW, PAGE = 64, 10, 16
LAYERS, FLOAT = 2, 4
HOT = {"temperature": 1.0, "seed": [1, 2, 3]}  # draws tell logits apart that differ in their last bits


def program(options: str) -> Program:
    passes = f"latent-cache,canonicalize,cse,dce,kv-layout{{length={LENGTH} {options}}},canonicalize,cse,dce,kernels"
    return tilewright.compile(LatentDecoder(layers=LAYERS).build(), passes=passes).program


def test_pages_are_shared_forked_and_copied() -> None:
    tokens = np.random.default_rng(0).integers(0, 40, 60).tolist()
    prompts = [tokens[:40], [*tokens[:36], 5, 6, 7], tokens[20:51]]
    paged, whole = program(f"kind=paged page={PAGE}"), program("")
    assert whole.cache_bytes(LENGTH, 3) == 3 * LENGTH * LAYERS * RANK * FLOAT
    assert paged.cache_bytes(LENGTH) == (LENGTH // PAGE + 1) * PAGE * LAYERS * RANK * FLOAT
    with whole.session(batch=3) as session:
        want = session.generate(prompts, NEW, **HOT)
        samples = session.generate([prompts[0]] * 3, NEW, **HOT)
    with paged.session(batch=3) as session:
        assert session.generate(prompts, NEW, share=False, **HOT) == want
        assert session.generate(prompts, NEW, **HOT) == want
        assert session.pages is not None
        assert session.pages.reused >= 2 * PAGE
        assert session.generate([prompts[0]], NEW, n=3, **HOT) == samples
        [alone] = session.generate([prompts[0]], NEW)
        with Batch(session) as batch:
            first, made = batch.add(prompts[0], NEW), {}
            for step in range(NEW):
                for identity, event in batch.step().items():
                    made.setdefault(identity, []).append(event.token)
                if step == 3:
                    twin = batch.fork(first)
                    made[twin] = list(made[first])
        assert made == {first: alone, twin: alone}
