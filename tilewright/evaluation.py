"""How good a model is on a text: perplexity, and how far it is from a reference.

A text is cut into windows of ``window`` tokens, each ``stride`` tokens after the one before. The last ``stride`` tokens of
a window are scored, so each token is scored once with at least ``window - stride`` tokens before it; the text's first
``window - stride`` tokens and a rest that fills no window are left out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.bisect import copy_of
from tilewright.eval_subjects import Run, Subject, Traced, artifact, described, without_cache
from tilewright.ir import Module
from tilewright.texts import Text, TextError, check_vocabulary, read_text, sentences, token_ids, tokenizer_of, windows

Array = np.ndarray[Any, Any]
Progress = Callable[[str, int, int], None]
_BATCH_BYTES = 1 << 26
"""Of logits that are had at a time."""
_BATCH = 16
_SENTENCE_BATCH = 16


@dataclass(frozen=True)
class Evaluation:
    """Figures of a model on a text. None is what was not asked for, or does not exist for such a model.

    ``tokens`` is how many were scored, ``kl_mean`` and ``kl_p99`` are KL(reference || model) in nats a token (mean and 99th
    percentile), ``top1`` the share of tokens at which both expect the same one most. ``cosine_mean`` and ``cosine_min`` are
    those of an encoder's sentence vectors (means over tokens) to the reference's.
    """

    model: str
    task: str
    tokens: int
    window: int
    stride: int | None = None
    perplexity: float | None = None
    reference: str | None = None
    reference_perplexity: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1: float | None = None
    sentences: int | None = None
    cosine_mean: float | None = None
    cosine_min: float | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    def summary(self) -> str:
        """A few lines for people."""
        if self.cosine_mean is not None:
            how = f"{self.sentences} sentences, {self.tokens} tokens, at most {self.window} a sentence"
            return (f"{self.model}: {how}\n  against {self.reference}: cosine {self.cosine_mean:.6f} in the mean, "
                    f"{self.cosine_min:.6f} at the least")  # fmt: skip
        lines = [f"{self.model}: {self.tokens} tokens scored, window {self.window}, stride {self.stride}",
                 f"  perplexity     {self.perplexity:.4f}"]  # fmt: skip
        if self.reference is not None:
            assert self.perplexity is not None
            assert self.reference_perplexity is not None
            change = self.perplexity / self.reference_perplexity - 1
            lines += [
                f"  reference      {self.reference_perplexity:.4f} ({self.reference}): {change:+.2%}",
                f"  KL(ref||model) {self.kl_mean:.6f} nats in the mean, {self.kl_p99:.6f} at the 99th percentile",
                f"  same top token {self.top1:.2%}",
            ]
        return "\n".join(lines)


def evaluate(
    model: Any,
    text: Text,
    *,
    reference: Any = None,
    window: int = 256,
    stride: int | None = None,
    max_tokens: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    passes: str = "O2",
    reference_passes: str = "O2",
    target: str = "native",
    dtype: str | None = None,
    calibration: Any = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of ``model`` on ``text``, and its distance to ``reference``.

    ``model`` and ``reference`` are artifacts (folders, or loaded), ``Compiled``, or what can be compiled: Hugging Face
    folders, models of transformers, modules of the IR, with ``passes`` (``calibration`` as :func:`tilewright.compile` takes
    it) and ``reference_passes``. ``text`` is the path of a file, or token ids; ``tokenizer`` a folder with a tokenizer if
    the model has none. ``stride`` is half of the window unless given, ``max_tokens`` the most tokens to score. An encoder
    is compared with its reference on the lines of ``text``, cut to ``window`` tokens.

    Raises TextError, before any long work, for a text that is empty or too short, and for models that do not take the same
    tokens; ArtifactError where there is no tokenizer.
    """
    show: Progress = progress or (lambda stage, done, total: None)
    if isinstance(text, (str, os.PathLike)):
        read_text(text)
    subject = subject_of(model, passes, target, dtype, calibration, threads, show)
    other = None if reference is None else subject_of(reference, reference_passes, target, dtype, None, threads, show)
    folder = tokenizer or subject.folder
    check_same(subject, other, folder if isinstance(text, (str, os.PathLike)) else None)
    for each in (subject, *([] if other is None else [other])):
        if each.longest is not None and window > each.longest:
            raise TextError(f"{each.name} takes at most {each.longest} tokens; give a window of at most that")
    if subject.task == "causal-lm":
        ids, step = token_ids(text, folder), max(1, window // 2) if stride is None else stride
        rows = windows(ids, window, step, max_tokens)
        for each in (subject, *([] if other is None else [other])):
            check_vocabulary(ids, each.vocabulary, each.name)
        return evaluate_windows(subject, other, rows, step, show)
    if other is None:
        raise TextError(f"{subject.name} is a model of the task {subject.task}: it has no perplexity; give a reference")
    if not isinstance(text, (str, os.PathLike)):
        raise TextError(f"{subject.name} is evaluated on sentences; give a text file with one a line")
    return evaluate_sentences(subject, other, sentences(read_text(text), tokenizer_of(folder), window), window, show)


def subject_of(model: Any, passes: str, target: str, dtype: str | None, calibration: Any, threads: int | None,
               show: Progress) -> Subject:  # fmt: skip
    """What ``model`` is; a folder is traced, not yet compiled. Raises CheckpointError for a folder that is no model."""
    from tilewright.compiler import Compiled, trace
    from tilewright.passes.pipeline import Pipeline
    from tilewright.runtime import Program, load

    if isinstance(model, Compiled):
        return artifact(model.program, threads)
    if isinstance(model, Program):
        return artifact(model, threads)
    if isinstance(model, (str, os.PathLike)) and any((Path(model) / n).is_file() for n in ("manifest.json", "kernels.so")):
        return artifact(load(model), threads)
    pipeline = without_cache(Pipeline.parse(passes))
    source = Path(model) if isinstance(model, (str, os.PathLike)) else None
    make = compiler(pipeline, target, source, calibration, show)
    show("trace", 0, 1)
    module, _ = trace(copy_of(model) if isinstance(model, Module) else model, (), None, None, dtype)
    show("trace", 1, 1)
    return Traced(*described(module, source), module, make)


def compiler(pipeline: Any, target: str, source: Path | None, calibration: Any, show: Progress) -> Callable[[Module], Any]:
    """Compiles a traced module with ``pipeline``, when it is called."""
    from tilewright.codegen.target import parse_target
    from tilewright.compiler import calibration_of, lower
    from tilewright.stages import Stages

    cpu, given = parse_target(target), calibration_of(calibration, source)
    return lambda module: lower(module, pipeline, cpu, source=source, stages=Stages(show), calibration=given)


def check_same(subject: Subject, other: Subject | None, folder: str | os.PathLike[str] | None) -> None:
    """Raise TextError for a model and a reference whose tokens or tasks are not the same."""
    if other is None:
        return
    if subject.task != other.task:
        raise TextError(f"{subject.name} is a model of the task {subject.task}, {other.name} of {other.task}")
    if None not in (subject.vocabulary, other.vocabulary) and subject.vocabulary != other.vocabulary:
        raise TextError(f"{subject.name} has {subject.vocabulary} tokens, the reference {other.name} has "
                        f"{other.vocabulary}: their expectations cannot be compared")  # fmt: skip
    mine, theirs = (Path(f) / "tokenizer.json" if f is not None else None for f in (folder, other.folder))
    if mine is None or theirs is None or not mine.is_file() or not theirs.is_file():
        return
    sample = "def naïve(x):\n\treturn [1234.5, 'The quick brown fox']  # 東京"
    if tokenizer_of(mine).encode(sample) != tokenizer_of(theirs).encode(sample):
        raise TextError(f"{subject.name} and the reference {other.name} have different tokenizers: the same number is not "
                        "the same token")  # fmt: skip


# ---- language models ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Of each scored token: negative log-likelihood in nats; with a reference its own, KL, and whether the top agrees."""

    loss: Array
    reference: Array | None = None
    kl: Array | None = None
    same: Array | None = None


def evaluate_windows(subject: Subject, other: Subject | None, rows: Array, stride: int, show: Progress) -> Evaluation:
    """Perplexity and distances over windows ``[n, W]``, whose last ``stride`` tokens are scored."""
    with ExitStack() as stack:
        run = stack.enter_context(closing(subject.start()))
        against = None if other is None else stack.enter_context(closing(other.start()))
        parts = []
        for done, batch in batches(rows, subject.vocabulary or 1, stride):
            parts.append(score(run, against, batch, stride))
            show("evaluate", done, len(rows))
    return figures(subject.name, None if other is None else other.name, parts, rows.shape[1], stride)


def batches(rows: Array, vocabulary: int, stride: int) -> Iterator[tuple[int, Array]]:
    """Windows that are run side by side, and how many are done after them; the logits of a batch stay small."""
    size = max(1, min(_BATCH, _BATCH_BYTES // (4 * vocabulary * stride)))
    for first in range(0, len(rows), size):
        yield min(first + size, len(rows)), rows[first : first + size]


def score(run: Run, against: Run | None, rows: Array, stride: int) -> Scores:
    """The last ``stride`` tokens of windows ``[B, W]``."""
    first = rows.shape[1] - stride
    return scores(run.logits(rows, first), None if against is None else against.logits(rows, first), rows[:, first:])


def scores(logits: Array, reference: Array | None, targets: Array) -> Scores:
    """Logits f32 ``[B, T, V]`` of a model, and of its reference, against the tokens ``[B, T]`` that came."""
    mine, at = log_softmax(logits), targets[..., None]
    loss = -np.take_along_axis(mine, at, -1).ravel().astype(np.float64)
    if reference is None:
        return Scores(loss)
    theirs = log_softmax(reference)
    kl = (np.exp(theirs) * (theirs - mine)).sum(-1, dtype=np.float64).ravel()
    same = (mine.argmax(-1) == theirs.argmax(-1)).ravel()
    return Scores(loss, -np.take_along_axis(theirs, at, -1).ravel().astype(np.float64), kl, same)


def log_softmax(logits: Array) -> Array:
    """Along the last axis; f32."""
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float32)))


def figures(model: str, reference: str | None, parts: Sequence[Scores], window: int, stride: int) -> Evaluation:
    """The figures of all scored tokens."""
    loss = np.concatenate([p.loss for p in parts])
    common = {"task": "causal-lm", "tokens": len(loss), "window": window, "stride": stride}
    perplexity = math.exp(loss.mean())
    if reference is None:
        return Evaluation(model, **common, perplexity=perplexity)  # type: ignore[arg-type]
    theirs, kl, same = (np.concatenate([getattr(p, n) for p in parts]) for n in ("reference", "kl", "same"))
    return Evaluation(
        model, **common, perplexity=perplexity, reference=reference,  # type: ignore[arg-type]
        reference_perplexity=math.exp(theirs.mean()), kl_mean=float(kl.mean()), kl_p99=float(np.percentile(kl, 99)),
        top1=float(same.mean()),
    )  # fmt: skip


# ---- encoders ----------------------------------------------------------------------------------------------------


def evaluate_sentences(subject: Subject, other: Subject, lines: Sequence[Sequence[int]], window: int, show: Progress
                       ) -> Evaluation:  # fmt: skip
    """Cosines of the vectors of sentences, given as token ids, to the reference's."""
    found = []
    with closing(subject.start()) as run, closing(other.start()) as against:
        for first in range(0, len(lines), _SENTENCE_BATCH):
            ids, mask = padded(lines[first : first + _SENTENCE_BATCH])
            found.append(cosines(run.embeddings(ids, mask), against.embeddings(ids, mask)))
            show("evaluate", first + len(ids), len(lines))
    all_of_them = np.concatenate(found)
    return Evaluation(
        subject.name, subject.task, sum(map(len, lines)), window, reference=other.name, sentences=len(lines),
        cosine_mean=float(all_of_them.mean()), cosine_min=float(all_of_them.min()),
    )  # fmt: skip


def padded(lines: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """Token ids and mask, i64 ``[B, S]``, padded with zeros on the right."""
    lengths = np.array([len(line) for line in lines])
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    ids = np.zeros_like(mask)
    ids[mask == 1] = np.concatenate([np.asarray(line) for line in lines])
    return ids, mask


def cosines(a: Array, b: Array) -> Array:
    """Of each row of ``a`` to the same row of ``b``."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.asarray((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)))
