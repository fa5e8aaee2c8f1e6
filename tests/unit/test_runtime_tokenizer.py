"""Tokenizers of a model folder, and text from tokens as they come."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.runtime import ArtifactError, MissingExtraError, Tokenizer

tokenizers = pytest.importorskip("tokenizers")

TEXTS = ["hello world", "naïve café — déjà vu", "日本語のテキスト"]
TEXTS += ["👩‍👩‍👧 emoji 🎉🎉", "  two  spaces\n\nlines ", "", "\ufffd kept"]


def byte_level():
    """Bytes only, no merges: every character outside ASCII takes several tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def sentencepiece():
    """Words with a leading mark for the space, and bytes for the rest: the first word's space is dropped."""
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁hello", "▁world", "lo", "▁", "ca", "f"]
    vocab = {word: i for i, word in enumerate(words)}
    model = tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    d = tokenizers.decoders
    tokenizer.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level().save(str(folder / "tokenizer.json"))
    sentencepiece().save(str(folder / "sentencepiece.json"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder)


def streamed(tokenizer, tokens, **options):
    detokenizer = tokenizer.stream(**options)
    return [detokenizer.put(token) for token in tokens] + [detokenizer.end()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    pieces = streamed(tokenizer, tokens)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=30))
def test_any_text(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_characters_come_whole_and_at_once(tokenizer):
    assert streamed(tokenizer, tokenizer.encode("aé🎉")) == ["a", "", "é", "", "", "", "🎉", ""]


def test_incomplete_end_is_given_at_the_end(tokenizer):
    tokens = tokenizer.encode("ok🎉")[:-1]
    pieces = streamed(tokenizer, tokens)
    assert pieces[:2] == ["o", "k"]
    assert "".join(pieces) == tokenizer.decode(tokens)


def test_bytes_that_never_fit_are_not_held_back_for_ever(tokenizer):
    lone = tokenizer.encode("é")[1]
    pieces = streamed(tokenizer, [lone] * 40 + tokenizer.encode("fine"))
    assert any(pieces[:20])
    assert "".join(pieces).endswith("fine")


def test_leading_spaces_of_words(folder):
    tokenizer = Tokenizer(folder / "sentencepiece.json")
    size = {word: tokenizer._tokenizer.token_to_id(word) for word in ("▁hello", "▁world", "lo", "ca", "f")}
    tokens = [size["▁hello"], size["▁world"], size["lo"], size["ca"], size["f"], 1 + 0xC3, 1 + 0xA9, size["▁world"]]
    pieces = streamed(tokenizer, tokens)
    assert pieces == ["hello", " world", "lo", "ca", "f", "", "é", " world", ""]
    assert "".join(pieces) == tokenizer.decode(tokens)


def test_special_tokens(tokenizer):
    tokens = [*tokenizer.encode("a"), tokenizer.size - 1, *tokenizer.encode("b")]
    assert "".join(streamed(tokenizer, tokens)) == "ab"
    assert "".join(streamed(tokenizer, tokens, skip_special=False)) == "a<end>b"


def test_detokenizer_can_be_used_again(tokenizer):
    detokenizer = tokenizer.stream()
    for text in ("é!", "ü?"):
        assert "".join([*map(detokenizer.put, tokenizer.encode(text)), detokenizer.end()]) == text


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({}, ()),
        ({"config.json": {"eos_token_id": 2}}, (2,)),
        ({"config.json": {"eos_token_id": 2}, "generation_config.json": {"eos_token_id": [3, 4]}}, (3, 4)),
        ({"config.json": {"eos_token_id": 0}, "generation_config.json": {}}, (0,)),
        ({"config.json": {"eos_token_id": None}}, ()),
        ({"config.json": [1]}, ()),
    ],
)
def test_stop_tokens_come_from_the_configuration(tmp_path, files, want):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    for name, data in files.items():
        (tmp_path / name).write_text(json.dumps(data))
    assert Tokenizer(tmp_path).stop_tokens == want


def test_model_without_a_tokenizer(tmp_path):
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: no such file"):
        Tokenizer(tmp_path)


def test_missing_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"pip install tilewright\[text\]"):
        Tokenizer(folder)


def test_texts_are_neither_padded_nor_cut(tmp_path):
    """Encoders' files often ask for both, for batches of texts of one length."""
    made = byte_level()
    made.enable_padding(length=16, pad_id=0)
    made.enable_truncation(16)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert [len(tokenizer.encode(text)) for text in ("abc", "abc" * 20)] == [3, 60]
