"""Formats of weights on one model: bytes, memory while compiling, and speed, all in one run.

    python -m benchmarks.formats --models L

Every format is compiled in a process of its own. Then all of them take turns, round by round: what is compared was measured
within seconds. Models are made by `python -m benchmarks.peers models`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import numpy as np
import typer

import tilewright
from benchmarks.peers.environment import commit
from benchmarks.peers.shapes import SHAPES, Shape
from benchmarks.peers.workplace import ROOT, Workplace, default_cache
from benchmarks.tuning.worth import turn
from tilewright.runtime.host import default_threads
from tilewright.workloads import host_name

CAPACITY = 1024
_CALIBRATION = (2, 256)
"""Sequences and tokens of random ids, where a format needs data: what is measured is time."""


@dataclass(frozen=True)
class Format:
    """How weights come in, and what passes make of them."""

    passes: str
    dtype: str = "bf16"
    calibrated: bool = False


_HEAD = "clean,fusions,quantize{scheme=w8a8 layers=head},"
_BODY = "quantize{scheme=w4a8 group=32 layers=body}"
_TAIL = ",cache,kernels"
_W4 = "quantize{scheme=w4a8 group=128 layers=body}"
_ACTIVATIONS = "sparsify-activations{method=teal sparsity=0.5}"


def sparse(prune: str, rest: str) -> Format:
    """Pruned by magnitude, quantized, and stored without zeros."""
    return Format(f"clean,fusions,prune{{{prune}}},{rest},sparse-store{_TAIL}")


FORMATS = {
    "f32": Format("O2", "f32"),
    "bf16": Format("O2"),
    "compressed": Format("compressed"),
    "w8a8": Format("w8a8"),
    "w8a16": Format("w8a16"),
    "w4a8": Format("w4a8"),
    "w4a8 g128": Format(f"{_HEAD}{_W4}{_TAIL}"),
    "two-level": Format(f"{_HEAD}quantize{{scheme=two-level layers=body}}{_TAIL}"),
    "w4a16": Format("w4a16"),
    "nf4": Format(f"{_HEAD}quantize{{scheme=nf4 layers=body}}{_TAIL}"),
    "codebook4": Format(f"{_HEAD}quantize{{scheme=codebook4 layers=body}}{_TAIL}"),
    "w3a8": Format(f"{_HEAD}quantize{{scheme=w3a8 layers=body}}{_TAIL}"),
    "w2a8": Format(f"{_HEAD}quantize{{scheme=w2a8 layers=body}}{_TAIL}"),
    "ternary": Format(f"{_HEAD}quantize{{scheme=ternary layers=body}}{_TAIL}"),
    "w4a8 and outlier weights": Format(f"{_HEAD}outlier-weights,{_BODY}{_TAIL}"),
    "w4a8 and outlier columns": Format(f"{_HEAD}outlier-columns,{_BODY}{_TAIL}"),
    "w8a8 50 % zeros": sparse("sparsity=0.5", "quantize{scheme=w8a8}"),
    "w8a8 70 % zeros": sparse("sparsity=0.7", "quantize{scheme=w8a8}"),
    "w8a8 2:4": sparse("pattern=2:4", "quantize{scheme=w8a8}"),
    "w4a8 g128 50 % of groups of 8": sparse("sparsity=0.5 group=8", f"quantize{{scheme=w8a8 layers=head}},{_W4}"),
    "f32 50 % of inputs": Format(f"clean,fusions,{_ACTIVATIONS}{_TAIL}", "f32", calibrated=True),
    "bf16 50 % of inputs": Format(f"clean,fusions,{_ACTIVATIONS}{_TAIL}", calibrated=True),
    "w8a16 50 % of inputs": Format(f"clean,fusions,{_ACTIVATIONS},quantize{{scheme=w8a16}}{_TAIL}", calibrated=True),
    "bf16 25 % less": Format(
        f"clean,fusions,prune-structured{{method=magnitude ratio=0.25}},canonicalize,cse,dce{_TAIL}"
    ),
}


@dataclass(frozen=True)
class Goal:
    """``name`` decodes at least ``least`` times as fast as ``beside``, in at most ``most`` of its bytes."""

    name: str
    beside: str
    least: float
    most: float | None = None


GOALS = (
    Goal("w2a8", "w4a8", 1.4),
    Goal("ternary", "w4a8", 1.4),
    Goal("w4a8 and outlier weights", "w4a8", 1 / 1.25),
    Goal("w4a8 and outlier columns", "w4a8", 1 / 1.25),
    Goal("compressed", "bf16", 1 / 1.5, 0.7),
    Goal("w8a8 50 % zeros", "w8a8", 1.4),
    Goal("w8a8 70 % zeros", "w8a8", 1.9),
    Goal("w8a8 2:4", "w8a8", 1.4),
    Goal("w4a8 g128 50 % of groups of 8", "w4a8 g128", 1.25),
    Goal("f32 50 % of inputs", "f32", 1.3),
    Goal("bf16 50 % of inputs", "bf16", 1.3),
    Goal("w8a16 50 % of inputs", "w8a16", 1.3),
    Goal("bf16 25 % less", "bf16", 1.25),
)


def main(
    models: Annotated[str, typer.Option("--models", "-m", help="Some of S,M,L.")] = "L",
    only: Annotated[str, typer.Option(help="Formats, separated by commas; all when empty.")] = "",
    rounds: Annotated[int, typer.Option(help="Turns of each format.")] = 9,
    out: Path = ROOT / "benchmarks" / "results" / "formats.json",
) -> None:
    """Compile models in all formats, and compare them. What was chosen by ``only`` has its own part of the page."""
    results = json.loads(out.read_text()) if out.exists() else {}
    for name in models.split(","):
        part = f"{name} ({only})" if only else name
        results[part] = one(SHAPES[name], only.split(",") if only else list(FORMATS), rounds)
        out.write_text(json.dumps(results, indent=1) + "\n")
        out.with_suffix(".md").write_text(page(results))
        typer.echo(page({part: results[part]}))


def one(shape: Shape, formats: Sequence[str], rounds: int) -> dict[str, Any]:
    """Bytes and speeds of one model."""
    folder = Workplace(default_cache()).model(shape.name) / "hf"
    checkpoint = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    rows: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=default_cache()) as work, ExitStack() as stack:
        sessions = {}
        for name in formats:
            try:
                rows[name] = compiled(folder, Path(work, name), FORMATS[name])
            except subprocess.CalledProcessError as error:  # groups that do not divide this model's layers
                refused[name] = error.stderr.strip()
                continue
            sessions[name] = stack.enter_context(tilewright.load(Path(work, name)).session())
        for i in range(rounds + 1):
            for name, session in sessions.items():
                for kind, speed in turn(session, shape, i).items():
                    rows[name].setdefault(kind, []).extend([speed] if i else [])
    when = datetime.now(UTC).date().isoformat()
    return {"checkpoint": checkpoint, "rows": rows, "host": host_name(), "threads": default_threads(), "date": when,
            "commit": commit(), "refused": refused}  # fmt: skip


def compiled(folder: Path, out: Path, fmt: Format) -> dict[str, Any]:
    """Compile in a process of its own; gives what its report says of bytes."""
    code = "import sys; from benchmarks.formats import write; write(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(folder), str(out), json.dumps(asdict(fmt))]
    subprocess.run(command, check=True, capture_output=True, text=True)
    report = json.loads((out / "report.json").read_text())
    return {"passes": fmt.passes, "bytes": (out / "weights.safetensors").stat().st_size, "peak": report["peak_bytes"],
            "fallbacks": report["fallbacks"]}  # fmt: skip


def write(folder: str, out: str, fmt: str) -> None:
    """Compile ``folder`` to ``out``; ``fmt`` is a format in JSON."""
    given = Format(**json.loads(fmt))
    size = json.loads(Path(folder, "config.json").read_text())["vocab_size"]
    ids = np.random.default_rng(0).integers(0, size, _CALIBRATION) if given.calibrated else None
    tilewright.compile(folder, passes=given.passes, dtype=given.dtype, max_length=CAPACITY, calibration=ids, out=out)


def beside(rows: Mapping[str, Mapping[str, Any]], name: str, other: str, kind: str) -> list[float]:
    """Speeds of a format relative to another's in the same round."""
    return [a / b for a, b in zip(rows[name][kind], rows[other][kind])]


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    parts = [
        "# Formats of weights",
        "Medians over rounds in which all formats take turns; decode is after a prompt of 128 tokens, prefill of 512. "
        "`peak` is the most memory that compiling took, relative to the checkpoint. `decode` and `prefill` are tokens a "
        "second, and relative to bf16 and w4a8 in the same round: median (quartiles). Rows that are not of bf16 keep "
        "eight bits for the head and the token embeddings.",
    ]
    for name, result in results.items():
        rows = result["rows"]
        parts.append(f"## {name}, {result['host']}, {result['threads']} threads, {result['date']}, {result['commit']}")
        head = "| format | MB | peak | decode | to bf16 | to w4a8 | prefill | to w4a8 | fallbacks |\n| --- |" + " --- |" * 8
        parts.append("\n".join([head, *(line(result, fmt) for fmt in rows)]))
        parts += [f"{fmt} is refused: {reason}" for fmt, reason in result["refused"].items()]
        parts.append("\n".join(verdict(rows, goal) for goal in GOALS if {goal.name, goal.beside} <= rows.keys()))
    return "\n\n".join(parts) + "\n"


def line(result: Mapping[str, Any], name: str) -> str:
    rows = result["rows"]
    row = rows[name]
    cells = [name, f"{row['bytes'] / 1e6:.0f}", f"{row['peak'] / result['checkpoint']:.2f}", f"{median(row['decode']):.1f}"]
    for kind, other in (("decode", "bf16"), ("decode", "w4a8")):
        cells.append(spread(beside(rows, name, other, kind)) if other in rows else "-")
    cells += [f"{median(row['prefill']):.0f}", spread(beside(rows, name, "w4a8", "prefill")) if "w4a8" in rows else "-"]
    return f"| {' | '.join([*cells, str(len(row['fallbacks']))])} |"


def spread(values: Sequence[float]) -> str:
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def verdict(rows: Mapping[str, Mapping[str, Any]], goal: Goal) -> str:
    """Whether a goal is met."""
    speed = median(beside(rows, goal.name, goal.beside, "decode"))
    size = rows[goal.name]["bytes"] / rows[goal.beside]["bytes"]
    met = speed >= goal.least and (goal.most is None or size <= goal.most)
    bytes_too = "" if goal.most is None else f" in {size:.3f} of the bytes (goal {goal.most})"
    prefill = spread(beside(rows, goal.name, goal.beside, "prefill"))
    return (f"- {goal.name} decodes {speed:.2f} times as fast as {goal.beside}{bytes_too}; goal {goal.least:.2f}: "
            f"{'hit' if met else 'missed'}. Prefill: {prefill} times.")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
