"""One row of the table of KV caches: compiled, fed with a held-out text, and scored by what it says of each next token."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import tilewright
from benchmarks.peers.workplace import default_cache
from benchmarks.quality.caches import EVALUATION, MODELS, RECALL, SMALL, WINDOW, CacheRow
from benchmarks.quality.passkey import KEYS, LENGTH, OTHER, TAUGHT, Question, exact, keyed, questions
from benchmarks.quality.passkey import found as keys_found
from benchmarks.quality.prompts import EACH, walked
from benchmarks.quality.prompts import along as along_prompts
from benchmarks.quality.rows import Row
from benchmarks.quality.running import Reference, Settings, digest, prepared
from benchmarks.quality.sinks import first_token
from tilewright.calibration_data import Calibration
from tilewright.compiler import trace
from tilewright.evaluation import figures, scores
from tilewright.passes.base import PassContext
from tilewright.passes.pipeline import Pipeline
from tilewright.runtime import Session, Tokenizer
from tilewright.runtime.feeding import Feeder
from tilewright.runtime.following import follow
from tilewright.runtime.places import Places
from tilewright.texts import token_ids, windows

Array = np.ndarray[Any, Any]
Figures = dict[str, Any]
SMALL_LM = Path(__file__).parents[2] / "tests" / "models" / "small-lm"
RECALL_LM = default_cache() / "recall-lm"
ROWS_AT_A_TIME = KEYS
STRETCH, EVERY = 64, 4
"""A long text is fed in stretches, and every fourth one token by token."""
CHOOSING = 2048
"""Tokens of calibration text on which patterns of heads are compared."""
SAMPLE, HALF = 16, 10_000
"""Of what is fed so, every sixteenth token is compared with recomputation, before and after the middle of the text."""


@dataclass(frozen=True)
class CacheSettings(Settings):
    """The held-out text is that of the evaluation model; the others were not trained on it either."""

    tokens: int = 8192
    window: int = WINDOW
    stride: int = WINDOW // 2
    small: Path = SMALL_LM
    recall: Path = RECALL_LM

    def folder(self, name: str) -> Path:
        """Of one of MODELS."""
        return {EVALUATION: self.model, SMALL: self.small, RECALL: self.recall}[name]

    @property
    def scripts(self) -> dict[Path, str]:
        return super().scripts | {self.recall: "examples/train_recall_lm.py"}

    def json(self) -> Figures:
        others = {name: digest(self.folder(name)) for name in (SMALL, RECALL)}
        return {"weights": self.digest, **others, "tokens": self.tokens, "window": self.window,
                "stride": self.stride, "keys": KEYS, "key_text": LENGTH}  # fmt: skip


class Caches:
    """Scores rows. ``cache``: the folder for the logits of the references. The held-out text begins with the end token."""

    def __init__(self, settings: CacheSettings, cache: Path) -> None:
        self.settings, self.cache = settings, cache
        self.ids = token_ids(settings.model / "validation.txt", settings.model)
        tokenizer, vocabulary = Tokenizer(settings.small), int(self.ids.max()) + 1
        self.questions = list(questions(tokenizer, self.ids, vocabulary))
        self.taught, self.other = (list(keyed(tokenizer, self.ids, forms)) for forms in (TAUGHT, OTHER))
        self.references: dict[tuple[str, int], Reference] = {}

    def begun(self, row: CacheRow, texts: Array) -> Array:
        """Texts ``[n, size]``, with the end token as their first if the model expects that."""
        if not MODELS[row.model].begins:
            return texts
        return np.concatenate([np.full_like(texts[:, :1], self.ids[0]), texts[:, 1:]], 1)

    def asked(self, row: CacheRow, question: Question) -> Question:
        return replace(question, texts=self.begun(row, question.texts))

    def windows(self, row: CacheRow, size: int) -> Array:
        """Texts ``[n, size]``."""
        return self.begun(row, windows(self.ids, size, size // 2, self.settings.tokens))

    def reference(self, row: CacheRow, size: int) -> Array:
        """What the model without a cache says of texts of ``size`` tokens, in f32."""
        key = row.model, size
        if key not in self.references:
            plain = Settings(self.settings.folder(row.model), self.settings.tokens, size, size // 2, 0)
            self.references[key] = Reference(plain, Row("f32"), self.cache, self.windows(row, size))
        return self.references[key].logits

    def measure(self, row: CacheRow) -> Figures:
        """The figures of a row."""
        return {"text": self.text, "stream": self.stream, "recomputed": self.recomputed, "sinks": self.sinks,
                "prompt": self.prompt}[row.task](row)  # fmt: skip

    def sinks(self, row: CacheRow) -> Figures:
        """On the first windows."""
        size = row.window or WINDOW
        texts = self.windows(row, size)[: 8 * WINDOW // size]
        return dict(first_token(self.settings.folder(row.model), texts))

    def compiled(self, row: CacheRow) -> tilewright.Compiled:
        length = WINDOW if row.task == "text" else None
        folder = self.settings.folder(row.model)
        given = Calibration(self.settings.model / "calibration.txt", folder, self.settings.calibration_tokens)
        passes = f"{row.pipeline},kernels"
        return tilewright.compile(folder, passes=passes, max_length=length, dtype="f32", calibration=given)

    def text(self, row: CacheRow) -> Figures:
        """Windows side by side; the first half is fed in chunks, the second token by token."""
        size = row.window or self.settings.window
        want, texts, first = self.reference(row, size), self.windows(row, size), size - size // 2
        begun = time.perf_counter()
        done = self.compiled(row)
        made, parts = time.perf_counter(), []
        with done.program.session(1, ROWS_AT_A_TIME) as session:
            for at in range(0, len(texts), session.batch):
                batch = texts[at : at + session.batch]
                steps = zip(follow(session, batch, first), range(first, batch.shape[1]))
                parts += [scores(said, want[at : at + len(batch), i - first], batch[:, i]) for said, i in steps]
            asked, taught, other = ([self.asked(row, q) for q in of] for of in (self.questions, self.taught, self.other))
            retrieval = keys_found(session, asked) | {"exact": exact(session, taught), "exact_other": exact(session, other)}
        found = figures(row.name, "f32", parts, size, size // 2)
        return {
            "bytes": done.program.cache_bytes(self.settings.window), "tokens": found.tokens,
            "perplexity": found.perplexity, "kl_mean": found.kl_mean, "kl_p99": found.kl_p99, "top1": found.top1,
            **retrieval, "seconds": seconds(begun, made),
        }  # fmt: skip

    def prompt(self, row: CacheRow) -> Figures:
        """Windows side by side, in calls of a prompt; some tokens of the second half are scored."""
        size, begun = self.settings.window, time.perf_counter()
        want, texts, first = self.reference(row, size), self.windows(row, size), size - size // 2
        folder = self.settings.folder(row.model)
        module, _ = trace(folder, (), WINDOW, None, "f32")
        given = Calibration(self.settings.model / "calibration.txt", folder, CHOOSING, size)
        done = Pipeline.parse(row.pipeline).run(module, ctx=PassContext({"calibration": given.inputs(module)}))
        blocks = walked(module, texts[0], first)
        program = tilewright.compile(module, passes="kernels").program
        made, parts = time.perf_counter(), []
        with program.session(1, ROWS_AT_A_TIME) as session:
            for at in range(0, len(texts), session.batch):
                batch = texts[at : at + session.batch]
                parts += [scores(said, want[at : at + len(batch), i - first], batch[:, i])
                          for i, said in along_prompts(session, batch, first)]  # fmt: skip
        found = figures(row.name, "f32", parts, size, size // 2 // EACH)
        return {
            "blocks": round(blocks, 4), "tokens": found.tokens, "perplexity": found.perplexity, "kl_mean": found.kl_mean,
            "kl_p99": found.kl_p99, "top1": found.top1, "seconds": seconds(begun, made),
            "patterns": [line for _, line in done.ctx.notes if line.startswith("all heads of keys")],
        }  # fmt: skip

    def stream(self, row: CacheRow) -> Figures:
        """One text; most of it is fed in chunks, and stretches token by token, each of which is scored."""
        begun = time.perf_counter()
        done = self.compiled(row)
        made, found = time.perf_counter(), np.full(row.tokens, np.nan)
        with done.program.session(1) as session:
            held = []
            for at, said in along(session, self.ids[: row.tokens]):
                found[at] = loss(said, self.ids[at + 1])
                held.append(session.memory["states"])
        return {"bytes": [held[0], held[-1]], **streamed(found), "seconds": seconds(begun, made)}

    def recomputed(self, row: CacheRow) -> Figures:
        """The sampled tokens alone, each from the window before it as if there were nothing else."""
        begun = time.perf_counter()
        run, _ = prepared(Row("f32"), self.settings.folder(row.model), None)
        made, found = time.perf_counter(), np.full(row.tokens, np.nan)
        for at in chunks(sampled(row.tokens), ROWS_AT_A_TIME):
            texts = self.begun(row, np.stack([self.ids[i + 1 - row.window : i + 2] for i in at]))
            said = run.logits(texts, row.window)
            found[at] = [loss(logits, token) for logits, token in zip(said[:, 0], texts[:, -1])]
        run.close()
        return {**streamed(found), "seconds": seconds(begun, made)}


def along(session: Session, text: Array) -> Iterator[tuple[int, Array]]:
    """Logits [V] after the tokens of ``text`` at ``i``, for all ``i`` of the stretches."""
    feeder, places = Feeder(session, STRETCH), Places(session, share=False)
    with session.lease():
        place = places.open(text.astype(np.int64), places.take_row())
        while place.fed < len(text):
            at, single = place.fed, place.fed // STRETCH % EVERY == EVERY - 1
            count = 1 if single else min(STRETCH - at % STRETCH, len(text) - at, feeder.chunk)
            [said] = feeder.run("decode" if single else "prefill", [place], [count], places.rows)
            places.advance(place, count)
            if single:
                yield at, said
        places.close(place)


def seconds(begun: float, made: float) -> list[float]:
    """What compiling and what running took."""
    return [round(made - begun, 1), round(time.perf_counter() - made, 1)]


def loss(logits: Array, token: int) -> float:
    """Of ``token``, in nats, by logits [V]."""
    shifted = logits.astype(np.float64) - logits.max()
    return float(np.log(np.exp(shifted).sum()) - shifted[token])


def sampled(tokens: int) -> Array:
    """Which losses of a long text, i64 [n], are compared with recomputation."""
    every = np.arange(WINDOW, tokens)
    return every[(every // STRETCH % EVERY == EVERY - 1) & (every % SAMPLE == 0)]


def chunks(items: Array, size: int) -> Iterator[Array]:
    return (items[at : at + size] for at in range(0, len(items), size))


def streamed(losses: Array) -> Figures:
    """Means of losses [tokens] in nats, NaN where there are none: all, each thousand, and the sampled of either half."""
    chosen = sampled(len(losses))
    halves = chosen[chosen < HALF], chosen[chosen >= HALF]
    mean = float(np.nanmean(losses))
    return {
        "tokens": len(losses), "nll": round(mean, 5), "perplexity": math.exp(mean),
        "thousands": [round(float(np.nanmean(part)), 4) for part in chunks(losses, 1000)],
        "sampled": [round(float(losses[half].mean()), 5) if len(half) else None for half in halves],
    }  # fmt: skip
