"""One row: the model is traced, compressed and scored, compiled where kernels exist and else in the interpreter."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.rescaling import rescale
from benchmarks.quality.rows import OUTLIERS, Row
from tilewright.calibration_data import Calibration
from tilewright.codegen.target import parse_target
from tilewright.compiler import lower, trace
from tilewright.eval_subjects import CompiledRun, InterpretedRun, Run
from tilewright.evaluation import batches, cosines, figures, padded, scores
from tilewright.ir import CodegenError, DType, Module, Weight, ops
from tilewright.passes.base import PassContext
from tilewright.passes.pipeline import Pipeline
from tilewright.runtime import Tokenizer
from tilewright.texts import token_ids, windows

Array = np.ndarray[Any, Any]
Figures = dict[str, Any]
Count = Callable[[Weight], int]
"""Bytes of a weight."""


def digest(folder: Path) -> str:
    """Of a model's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Settings:
    """What all rows share; figures with other settings do not belong into one table."""

    model: Path
    tokens: int = 32768
    window: int = 256
    stride: int = 128
    calibration_tokens: int = 8192

    @property
    def digest(self) -> str:
        """Of the weights."""
        return digest(self.model)

    @property
    def scripts(self) -> dict[Path, str]:
        """What makes which folder."""
        return {self.model: "examples/train_eval_lm.py"}

    def json(self) -> Figures:
        return {"weights": self.digest, "tokens": self.tokens, "window": self.window, "stride": self.stride,
                "calibration_tokens": self.calibration_tokens}  # fmt: skip


def prepared(row: Row, folder: Path, calibration: Calibration | None, count: Count | None = None) -> tuple[Run, Figures]:
    """What runs a row, and its size as ``count`` says. ``kernels`` says whether compiled code runs it."""
    module, _ = trace(folder, (), None, None, row.dtype)
    total = sum(int(w.tensor.elements) for w in module.weights.values() if w.dtype.is_float)
    options = {} if calibration is None else {"calibration": calibration.inputs(module)}
    Pipeline.parse(row.pipeline).run(module, ctx=PassContext(options))
    size = sum((count or stored)(w) for w in module.weights.values() if w.users)
    Pipeline.parse("kernels").run(module)
    run, kernels = started(module)
    return run, {"bytes": size, "bits": round(8 * size / total, 3), "kernels": kernels}


def stored(weight: Weight) -> int:
    """Bytes of a weight: parts of a format as they are, floats that are not quantized as bf16 (f32 is how rows compute)."""
    is_part = any(isinstance(op, (ops.Dequantize, ops.Lookup, ops.Expand)) for op in weight.users)
    narrowed = weight.dtype is DType.f32 and not is_part
    return int(weight.tensor.bytes) // (2 if narrowed else 1)


def started(module: Module) -> tuple[Run, str]:
    """Compiled if there are kernels for all of it."""
    try:
        done = lower(module, Pipeline(()), parse_target("native"))
    except CodegenError as error:
        reasons = [line.strip() for line in error.message.splitlines() if "mlir.l" in line]
        return InterpretedRun(module), f"interpreter: {'; '.join(reasons) or error.message.splitlines()[0]}"
    return CompiledRun(done.program, keep=done), "compiled"


# ---- the language model ------------------------------------------------------------------------------------------


class Reference:
    """The uncompressed model's logits of all scored tokens, kept in a file: [n, stride, V] f32."""

    def __init__(self, settings: Settings, row: Row, cache: Path, rows: Array) -> None:
        self.path = cache / f"reference-{hashlib.sha256(json.dumps(settings.json()).encode()).hexdigest()[:16]}.npy"
        if not self.path.is_file():
            self.make(settings, row, rows)
        self.logits = np.load(self.path, mmap_mode="r", allow_pickle=False)

    def make(self, settings: Settings, row: Row, rows: Array) -> None:
        run, _ = prepared(row, settings.model, None)
        partial, first = self.path.with_name(self.path.name + ".partial"), settings.window - settings.stride
        size = json.loads((settings.model / "config.json").read_text())["vocab_size"]
        shape = (len(rows), settings.stride, size)
        kept = np.lib.format.open_memmap(partial, "w+", np.float32, shape)
        with closing(run):
            for done, batch in batches(rows, size, settings.stride):
                kept[done - len(batch) : done] = run.logits(batch, first)
        kept.flush()
        partial.rename(self.path)


class LanguageModel:
    """Scores rows on the held-out text of the evaluation model."""

    def __init__(self, settings: Settings, reference: Row, cache: Path, count: Count | None = None) -> None:
        self.settings, self.cache, self.count = settings, cache, count
        ids = token_ids(settings.model / "validation.txt", settings.model)
        self.rows = windows(ids, settings.window, settings.stride, settings.tokens)
        self.calibration = Calibration(settings.model / "calibration.txt", settings.model, settings.calibration_tokens)
        self.reference = Reference(settings, reference, cache, self.rows)

    def folder(self, row: Row) -> Path:
        """The model's folder; the rescaled one is made when it is first asked for."""
        if row.model != OUTLIERS:
            return self.settings.model
        folder = self.cache / f"outliers-{self.settings.digest}"
        if not folder.is_dir():
            rescale(self.settings.model, folder)
        return folder

    def measure(self, row: Row) -> Figures:
        """Size, perplexity, KL and top-1 agreement of a row."""
        begun = time.perf_counter()
        run, about = prepared(row, self.folder(row), self.calibration, self.count)
        made, parts = time.perf_counter(), []
        first = self.settings.window - self.settings.stride
        with closing(run):
            for done, batch in batches(self.rows, self.reference.logits.shape[-1], self.settings.stride):
                want = np.asarray(self.reference.logits[done - len(batch) : done])
                parts.append(scores(run.logits(batch, first), want, batch[:, first:]))
        found = figures(row.name, "f32", parts, self.settings.window, self.settings.stride)
        ended = time.perf_counter()
        return {
            **about, "tokens": found.tokens, "perplexity": found.perplexity, "kl_mean": found.kl_mean,
            "kl_p99": found.kl_p99, "top1": found.top1, "seconds": [round(made - begun, 1), round(ended - made, 1)],
        }  # fmt: skip


# ---- the encoder -------------------------------------------------------------------------------------------------


class Encoder:
    """Scores rows by the vectors of sentences, against f32."""

    def __init__(self, folder: Path, lines: list[str], calibration: Path) -> None:
        self.folder, self.calibration = folder, Calibration(calibration, folder)
        tokenizer = Tokenizer(folder)
        self.ids = [tokenizer.encode(line) for line in lines]
        run, _ = prepared(Row("f32"), folder, None)
        with closing(run):
            self.want = self.vectors(run)

    def vectors(self, run: Run) -> Array:
        parts = [run.embeddings(*padded(self.ids[i : i + 20])) for i in range(0, len(self.ids), 20)]
        return np.concatenate(parts)

    def measure(self, row: Row) -> Figures:
        """Size, mean and least cosine of a row."""
        run, about = prepared(row, self.folder, self.calibration)
        with closing(run):
            found = cosines(self.vectors(run), self.want)
        return {**about, "sentences": len(found), "cosine_mean": float(found.mean()), "cosine_min": float(found.min())}
