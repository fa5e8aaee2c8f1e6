"""A whole model over caches of codes: the same greedy tokens as over floats, and as good at a held-out text."""

from __future__ import annotations

from pathlib import Path

import pytest

import tilewright
from tilewright import Compiled
from tilewright.runtime.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
FOLDER, HELD_OUT = ROOT / "tests" / "models" / "small-lm", ROOT / "tests" / "zoo.py"


def made(layout: str) -> Compiled:
    passes = f"clean,fusions,kv-layout{layout},canonicalize,cse,dce,kernels"
    return tilewright.compile(FOLDER, passes=passes, max_length=256, dtype="f32")


@pytest.fixture(scope="module")
def plain() -> Compiled:
    return made("")


def test_greedy_tokens_of_i8(plain: Compiled) -> None:
    tokens = Tokenizer(FOLDER).encode(HELD_OUT.read_text())
    prompts = [tokens[150 * i:150 * i + count] for i, count in enumerate((8, 40, 100))]
    assert made("{dtype=i8}").generate(prompts, 32) == plain.generate(prompts, 32)


def test_recent_tokens_beside_pages() -> None:
    """What contiguous caches give, to the last token: prompts side by side, and sequences that part in the middle of a page
    and of a group, and whose tokens become codes later, in pages that they share."""
    codes = "dtype=i2 keys=channel group=16 recent=40"
    plain, paged = made(f"{{{codes}}}"), made(f"{{kind=paged page=32 {codes}}}")
    tokens = Tokenizer(FOLDER).encode(HELD_OUT.read_text())
    prompts = [tokens[150 * i:150 * i + count] for i, count in enumerate((8, 41, 100))]
    assert paged.generate(prompts, 60) == plain.generate(prompts, 60)
    draws = {"n": 3, "temperature": 1.0, "seed": 1}
    assert paged.generate(prompts[2:], 70, **draws) == plain.generate(prompts[2:], 70, **draws)


def test_two_bits_of_channels_and_recent_tokens(plain: Compiled) -> None:
    """Perplexity within 2 % of the float cache's, where codes of tokens alone are 20 % off."""
    codes = made("{dtype=i2 keys=channel recent=32}")
    done = tilewright.evaluate(codes, HELD_OUT, reference=plain, window=200, max_tokens=400)
    assert done.perplexity == pytest.approx(done.reference_perplexity, rel=0.02)
