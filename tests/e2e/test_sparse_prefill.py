"""A whole model whose prompts attend to chosen blocks of keys, fed in chunks, then decoded from the same cache."""

from __future__ import annotations

import numpy as np
import pytest

import tilewright
from tests.models import small_lm
from tilewright import Compiled
from tilewright.ir import PassError

TOKENS = small_lm.held_out()
PROMPTS = [TOKENS[:300], TOKENS[300:430], TOKENS[500:510]]


def made(sparse: str, layout: str = "", calibration: np.ndarray | None = None) -> Compiled:
    passes = f"clean,fusions,kv-layout{layout},{sparse}canonicalize,cse,dce,kernels"
    return tilewright.compile(small_lm.traced("f32"), passes=passes, max_length=512, calibration=calibration)


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    return made("").generate(PROMPTS, 8)


def test_all_blocks_give_the_same_tokens(plain: list[list[int]]) -> None:
    found = made("sparse-prefill{pattern=block-sparse share=1.0 dense=0 block=32},", "{kind=paged page=32}")
    assert found.generate(PROMPTS, 8) == plain


def test_some_blocks_of_long_prompts(plain: list[list[int]]) -> None:
    """A local window of 32 tokens changes what long prompts give, and nothing of one shorter than ``dense``."""
    found = made("sparse-prefill{pattern=a-shape local=32 dense=128 block=32 queries=32},").generate(PROMPTS, 8)
    assert found[2] == plain[2]
    assert found != plain


def test_heads_that_differ(plain: list[list[int]]) -> None:
    """Each head of keys has the pattern that suits it; the report says which."""
    options = "pattern=auto tokens=128 block=32 queries=32 dense=160"
    found = made(f"sparse-prefill{{{options}}},", calibration=np.array(TOKENS[:450])[None])
    last = next(note for note in reversed(found.report.notes) if "all heads of keys" in note)
    assert "a-shape" in last
    assert "block-sparse" in last
    results = found.generate(PROMPTS, 8)
    assert results[2] == plain[2]
    assert results != plain


def test_codes_are_refused_by_name() -> None:
    with pytest.raises(PassError, match="its cache keeps recent tokens apart"):
        made("sparse-prefill,", "{dtype=i4 keys=channel}")
