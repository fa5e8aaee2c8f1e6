"""The texts that the model which looks back is trained on: what comes again in them was there before."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
SMALL_LM = ROOT / "tests" / "models" / "small-lm"
LENGTH = 512


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``examples/train_recall_lm.py``, imported as it imports its siblings."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import train_recall_lm

    return train_recall_lm


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(SMALL_LM)


def texts_of(script: ModuleType, tokenizer: PreTrainedTokenizerFast, length: int = LENGTH) -> Any:
    """Over tokens each of which stands there once, so that what comes again was written there."""
    return script.Texts(np.arange(10, 4000), tokenizer, length)


@pytest.mark.parametrize("length", [64, LENGTH])
@pytest.mark.parametrize("kind", ["plain", "again", "strings", "keys", "novel"])
def test_texts_begin_with_end_and_follow_from_the_generator(
    script: ModuleType, tokenizer: PreTrainedTokenizerFast, kind: str, length: int
) -> None:
    make = getattr(texts_of(script, tokenizer, length), kind)
    for seed in range(20):
        (ids, labels), (same, _) = (make(np.random.default_rng(seed)) for _ in range(2))
        assert ids.shape == labels.shape == (length,)
        assert ids[0] == tokenizer.eos_token_id
        assert (ids == same).all()
        assert ((labels == ids) | (labels == script.UNLEARNED)).all()


def test_spans_come_again(script: ModuleType, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = texts_of(script, tokenizer)
    assert len(np.unique(texts.plain(np.random.default_rng(0))[0])) == LENGTH
    for seed in range(20):
        ids, _ = texts.again(np.random.default_rng(seed))
        _, first = np.unique(ids, return_index=True)
        again = np.setdiff1d(np.arange(LENGTH), first)
        assert 12 <= len(again) <= LENGTH // 2 + 200


def test_strings_are_learned_from_their_second_time_on(script: ModuleType, tokenizer: PreTrainedTokenizerFast) -> None:
    for seed in range(20):
        ids, labels = texts_of(script, tokenizer).strings(np.random.default_rng(seed))
        [unlearned] = np.flatnonzero(np.diff(labels == script.UNLEARNED)) + 1
        period = unlearned - 1
        assert 8 <= period <= LENGTH // 2
        assert (ids[1:-period] == ids[1 + period :]).all()


def test_keys_that_are_told_are_said_again(script: ModuleType, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = texts_of(script, tokenizer)
    for told, again in script.FORMS:
        one, two = (texts.said(form.replace("N", "name"), "a1b2c3d4") for form in (told, again))
        assert tokenizer.decode(one) == told.replace("N", "name").replace("@", "a1b2c3d4")
        assert tokenizer.decode(two) == again.replace("N", "name").replace("@", "a1b2c3d4")
    for seed in range(20):
        ids, _ = texts.keys(np.random.default_rng(seed))
        assert len(np.unique(ids)) < LENGTH - 5, "names and keys come twice"


def test_batches_follow_from_the_step(script: ModuleType, tokenizer: PreTrainedTokenizerFast) -> None:
    batches = script.mixed(texts_of(script, tokenizer), script.Recipe())
    ids, labels = batches(3)
    assert ids.shape == labels.shape == (4, LENGTH)
    assert torch.equal(ids, batches(3)[0])
    assert not torch.equal(ids, batches(4)[0])
    later = 1001
    assert [batches(step)[0].shape for step in (later, later + 1)] == [(32, 64), (4, LENGTH)]


def test_the_record_is_of_such_a_model(script: ModuleType) -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "recall_lm.json").read_text())
    assert record["recipe"].items() >= json.loads(json.dumps(asdict(script.Recipe()))).items()
    assert record["parameters"] == 5_278_976
    assert record["tokens_seen"] == record["steps"] * record["recipe"]["batch_tokens"]
    assert (record["validation"]["window"], record["validation"]["stride"]) == (LENGTH, LENGTH // 2)
