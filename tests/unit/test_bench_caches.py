"""The table of KV caches: rows that parse, questions, stretches, goals, the page. Nothing long is measured."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.quality import caching, passkey, prompts
from benchmarks.quality.caches import CACHE_ROWS, MODELS, WINDOW, CacheRow
from benchmarks.quality.caching import EVERY, STRETCH, Caches, along, loss, sampled, streamed
from benchmarks.quality.kv import SECTIONS, far_better, page, parks, stable
from benchmarks.quality.passkey import KEYS, LENGTH, SAID, exact, found, keyed, questions
from benchmarks.quality.sinks import first_token
from tilewright import Tokenizer, compile
from tilewright.compiler import trace
from tilewright.passes.pipeline import Pipeline
from tilewright.runtime.following import follow

ROOT = Path(__file__).parents[2]
SMALL_LM = ROOT / "tests" / "models" / "small-lm"
TEXT = {"bytes": 1000, "tokens": 8, "perplexity": 20.0, "kl_mean": 0.0, "kl_p99": 0.0, "top1": 1.0, "said": 0.0,
        "right": 0.5, "gain": 0.1}  # fmt: skip
LONG = {"bytes": [70, 70], "nll": 3.0, "perplexity": 20.1, "thousands": [3.1, 2.9], "sampled": [3.0, 3.0], "tokens": 2000}


@pytest.mark.parametrize("row", CACHE_ROWS, ids=lambda r: r.name)
def test_pipelines_parse(row: CacheRow) -> None:
    names = [p.name for p in Pipeline.parse(row.pipeline).passes]
    assert ("kv-layout" in names) == (row.task in ("text", "stream", "prompt"))
    assert "fuse" not in names


def test_names_are_unique_and_goals_are_about_rows() -> None:
    names = [r.name for r in CACHE_ROWS]
    assert len(set(names)) == len(names)
    assert {n for s in SECTIONS for g in s.goals for n in g.needs} <= set(names)
    shown = {n for s in SECTIONS for n in (*(r.name for r in s.rows), *(n for g in s.goals for n in g.needs))}
    assert shown == set(names), "every row is on the page"
    for name, model in MODELS.items():
        if model.prefix:
            assert all(r.name.startswith(model.prefix) == (r.model == name) for r in CACHE_ROWS)


def test_goals_of_streams() -> None:
    worse, exact = LONG | {"perplexity": 41.0, "nll": 3.7}, LONG | {"sampled": [2.9, 2.8]}
    rows: dict[str, Any] = {"new": LONG, "old": worse, "exact": exact}
    assert far_better("", "new", "old").verdict(rows) == "**hit**: new: NLL 3.000; old: NLL 3.700"
    assert far_better("", "old", "new").verdict(rows).startswith("**missed**")
    assert stable("", "new", "old").verdict(rows).startswith("**hit**: 70 bytes; +0.000 nats")
    assert stable("", "new", "exact").verdict(rows).startswith("**missed**"), "0.1 nats away, later 0.2"
    grown = rows | {"new": LONG | {"bytes": [70, 80]}}
    assert stable("", "new", "old").verdict(grown).startswith("**missed**")


def test_attention_on_the_first_token() -> None:
    rows = np.tile(np.arange(5, 69), (2, 1))
    figures = first_token(SMALL_LM, rows)
    assert figures["even"] == pytest.approx(np.mean([1 / n for n in range(33, 65)]), abs=1e-6)
    assert 0 < figures["first"] <= figures["most"] < 1
    assert parks("", "a").verdict({"a": figures | {"first": 0.2}}).startswith("**hit**: 20.00% in the mean")


def test_questions_differ_in_their_keys_alone() -> None:
    tokenizer = Tokenizer(SMALL_LM)
    filler = np.array(tokenizer.encode((ROOT / "tests" / "zoo.py").read_text()))
    asked = list(questions(tokenizer, filler, 4096))
    assert len(asked) == len(passkey.FORMS)
    for question, (told, ending, _) in zip(asked, passkey.FORMS):
        texts = question.texts
        assert texts.shape == (KEYS, LENGTH + 1)
        assert len(set(question.keys)) == KEYS
        [at] = np.flatnonzero((texts[:, :-1] != texts[0, :-1]).any(0))
        assert (texts[:, at] == question.keys).all()
        assert tokenizer.decode(list(texts[0, LENGTH - question.asked : LENGTH])) == ending
        assert told.replace("@", tokenizer.decode([int(texts[3, at])])) in tokenizer.decode(list(texts[3, :LENGTH]))
    again = list(questions(tokenizer, filler, 4096))
    assert all((a.texts == b.texts).all() for a, b in zip(asked, again))


def test_keys_are_told_and_asked_for() -> None:
    tokenizer = Tokenizer(SMALL_LM)
    filler = np.array(tokenizer.encode((ROOT / "tests" / "zoo.py").read_text()))
    forms = passkey.TAUGHT + passkey.OTHER
    for question, (told, ending) in zip(keyed(tokenizer, filler, forms), forms, strict=True):
        assert question.texts.shape == (KEYS, LENGTH + SAID)
        for text in question.texts:
            key = tokenizer.decode(list(text[-SAID:])).strip()
            assert re.fullmatch("[a-z0-9]{8}", key)
            assert told.replace("@", key) in tokenizer.decode(list(text[:LENGTH]))
            assert tokenizer.decode(list(text[LENGTH - question.asked : LENGTH])) == ending
        assert len({tuple(text[-SAID:]) for text in question.texts}) == KEYS


def test_a_key_counts_when_all_of_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = np.zeros((KEYS, LENGTH + SAID), np.int64)
    texts[:, -SAID:] = np.arange(1, SAID + 1)
    said = np.eye(9, dtype=np.float32)[np.tile(texts[0, -SAID:, None], (1, KEYS))]
    said[-1, :4] = said[0, 2:6] = 0  # six texts with a token that is not the key's

    def follow(session: object, ids: Any, first: int) -> Any:
        assert first == LENGTH - 2
        yield from (np.zeros_like(said[0]), np.zeros_like(said[0]), *said)

    monkeypatch.setattr(passkey, "follow", follow)
    assert exact(None, [passkey.Question(texts, 2)]) == 1 - 6 / KEYS  # type: ignore[arg-type]


def test_texts_of_a_model_begin_with_the_end_token() -> None:
    caches = object.__new__(Caches)
    caches.ids = np.arange(7, 20)
    texts = np.arange(12).reshape(2, 6)
    for name, model in MODELS.items():
        begun = caches.begun(CacheRow("", "", model=name), texts)
        assert (begun[:, 0] == (7 if model.begins else texts[:, 0])).all()
        assert (begun[:, 1:] == texts[:, 1:]).all()


def test_keys_are_found_by_what_they_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """All names are unlikely, and some likelier than others wherever they stand; three quarters of them gain a nat."""
    texts = np.arange(KEYS)[:, None] + np.zeros((KEYS, LENGTH + 1), np.int64)
    logits = np.tile(np.linspace(0, 5, 64, dtype=np.float32), (KEYS, 1))
    logits[np.arange(12), np.arange(12)] += 1

    def follow(session: object, ids: Any, first: int) -> Any:
        assert first == LENGTH - 2
        yield from (np.zeros_like(logits), np.zeros_like(logits), logits)

    monkeypatch.setattr(passkey, "follow", follow)
    figures = found(None, [passkey.Question(texts, 2)])  # type: ignore[arg-type]
    assert figures["right"] == pytest.approx(0.75, abs=1 / KEYS)
    assert figures["gain"] == pytest.approx(0.75, abs=0.05)
    assert figures["said"] == 0


@dataclass
class Recorded:
    """Stands for a feeder of one sequence: what was fed, by which entry."""

    calls: list[tuple[str, int]]
    chunk: int = 48

    def run(self, entry: str, places: Any, takes: Any, among: Any) -> list[Any]:
        self.calls.append((entry, takes[0]))
        return [np.array([len(self.calls)])]


def test_the_last_of_four_stretches_is_fed_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    feeder = Recorded([])

    class Session:
        batch, pages = 1, None
        lease = staticmethod(nullcontext)

    monkeypatch.setattr(caching, "Feeder", lambda session, chunk: feeder)
    at = [i for i, _ in along(Session(), np.arange(600))]  # type: ignore[arg-type]
    assert at == [*range(192, 256), *range(448, 512)]
    assert sum(n for _, n in feeder.calls) == 600
    assert feeder.calls[:7] == [("prefill", n) for n in (48, 16, 48, 16, 48, 16)] + [("decode", 1)]
    assert set(sampled(2000)) <= {i for i in range(WINDOW, 2000) if i // STRETCH % EVERY == EVERY - 1}


def test_prompts_are_asked_after_some_of_their_tokens() -> None:
    """What a prompt says after a token is what one says that ends there, where attention sees all."""
    module, _ = trace(SMALL_LM, (), WINDOW, None, "f32")
    Pipeline.parse("clean,fusions,kv-layout,canonicalize,cse,dce").run(module)
    texts = np.random.default_rng(0).integers(5, 4000, (2, 100))
    assert prompts.walked(module, texts[0], 50) == 1.0
    program = compile(module, passes="kernels").program
    with program.session(1, 2) as session:
        said = {i: logits.copy() for i, logits in prompts.along(session, texts, 50)}
        assert list(said) == [50, 66, 82, 98]
        for i, logits in said.items():
            (want,) = [logits.copy() for logits in follow(session, texts[:, : i + 1], i)]
            np.testing.assert_allclose(logits, want, rtol=1e-3, atol=1e-3)


def test_walked_blocks_are_counted() -> None:
    module, _ = trace(SMALL_LM, (), WINDOW, None, "f32")
    options = "pattern=a-shape tokens=96 block=32 queries=32 dense=0"
    Pipeline.parse(f"clean,fusions,kv-layout,sparse-prefill{{{options}}}").run(module)
    text = np.random.default_rng(0).integers(5, 4000, 192)
    assert prompts.walked(module, text, 128) == pytest.approx((3 / 5 + 3 / 6) / 2)


def test_losses_of_a_stream() -> None:
    assert loss(np.log(np.array([0.25, 0.5, 0.25])), 1) == pytest.approx(np.log(2))
    losses = np.full(20_000, np.nan)
    losses[sampled(20_000)] = 2.0
    losses[:256] = losses[14_000:] = 4.0
    figures = streamed(losses)
    assert (figures["tokens"], len(figures["thousands"])) == (20_000, 20)
    assert figures["thousands"][1:14] == [2.0] * 13
    late = sampled(20_000)[sampled(20_000) >= 10_000]
    assert figures["sampled"] == [2.0, pytest.approx(2 + 2 * (late >= 14_000).mean(), abs=1e-4)]


def test_the_page() -> None:
    how = {"weights": "x", "small": "y", "recall": "z", "tokens": 1, "window": 2, "stride": 1}
    rows = {"bf16": TEXT, "i8": TEXT | {"perplexity": 20.01}, "small: i2": {"error": "no"}, "window 256": LONG}
    text = page({"settings": how, "parameters": 1, "rows": rows, "encoder": {}})
    assert "| i8 | 1,000 | 20.010 | +0.05% | 0.00000 | 0.0000 | 100.00% |" in text
    assert "i8 within 0.1 % of bf16: **hit**: +0.05%" in text
    assert "| i2 | not run: no | | | | | |" in text.replace("|  ", "| ")
    assert "| window 256 | 70 | 3.000 | 3.000 | 3.10 2.90 |" in text
    assert "| i8 | 0.0% | 50.0% | 0.1000 |  |  |" in text


def test_the_committed_table_is_that_of_its_figures() -> None:
    file = ROOT / "benchmarks" / "results" / "kv.json"
    assert page(json.loads(file.read_text())) == file.with_suffix(".md").read_text()
