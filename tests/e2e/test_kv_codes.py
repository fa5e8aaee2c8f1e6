"""A whole model over caches of codes: the same greedy tokens as over floats, and as good at a held-out text."""

from __future__ import annotations

from pathlib import Path

import pytest

import tilewright
from tilewright import Compiled
from tilewright.runtime import Batch
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


@pytest.fixture(scope="module")
def factors() -> Compiled:
    return made("{dtype=i2 keys=channel group=16 recent=16 rank=2}")


def test_factors_of_errors(factors: Compiled, plain: Compiled) -> None:
    """Perplexity within 1.5 % of the float cache's, with few recent tokens."""
    done = tilewright.evaluate(factors, HELD_OUT, reference=plain, window=200, max_tokens=400)
    assert done.perplexity == pytest.approx(done.reference_perplexity, rel=0.015)


def test_forks_have_the_factors_of_their_parents(factors: Compiled) -> None:
    """A sequence that forks and others beside it each go on as if alone."""
    tokens = Tokenizer(FOLDER).encode(HELD_OUT.read_text())
    prompts = [tokens[:70], tokens[200:231]]
    alone = [factors.generate([prompt], 40, chunk=24)[0] for prompt in prompts]
    with factors.session(batch=3) as session, Batch(session, chunk=24) as batch:
        first, second = (batch.add(prompt, 40) for prompt in prompts)
        said: dict[int, list[int]] = {first: [], second: []}
        while batch.pending or batch.running:
            if len(said[first]) == 10 and len(said) == 2:
                said[batch.fork(first)] = list(said[first])
            for identity, token in batch.step().items():
                assert token.token is not None
                said[identity].append(token.token)
    assert list(said.values()) == [alone[0], alone[1], alone[0]]
