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
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import typer

import tilewright
from benchmarks.peers.environment import commit
from benchmarks.peers.shapes import SHAPES, Shape
from benchmarks.peers.workplace import ROOT, Workplace, default_cache
from benchmarks.tuning.worth import turn
from tilewright.runtime.host import default_threads
from tilewright.workloads import host_name

CAPACITY = 1024
_HEAD = "clean,fusions,quantize{scheme=w8a8 layers=head},"
_BODY = "quantize{scheme=w4a8 group=32 layers=body}"
_TAIL = ",cache,kernels"
_FEWER = "clean,fusions,prune-structured{method=magnitude ratio=0.25 multiple=128}"
PASSES = {
    "bf16": "O2",
    "compressed": "compressed",
    "w8a8": "w8a8",
    "w4a8": "w4a8",
    "two-level": f"{_HEAD}quantize{{scheme=two-level layers=body}}{_TAIL}",
    "w4a16": "w4a16",
    "nf4": f"{_HEAD}quantize{{scheme=nf4 layers=body}}{_TAIL}",
    "codebook4": f"{_HEAD}quantize{{scheme=codebook4 layers=body}}{_TAIL}",
    "w3a8": f"{_HEAD}quantize{{scheme=w3a8 layers=body}}{_TAIL}",
    "w2a8": f"{_HEAD}quantize{{scheme=w2a8 layers=body}}{_TAIL}",
    "ternary": f"{_HEAD}quantize{{scheme=ternary layers=body}}{_TAIL}",
    "w4a8 and outlier weights": f"{_HEAD}outlier-weights,{_BODY}{_TAIL}",
    "w4a8 and outlier columns": f"{_HEAD}outlier-columns,{_BODY}{_TAIL}",
    "bf16 structured": f"{_FEWER}{_TAIL}",
    "w8a8 structured": f"{_FEWER},quantize{{scheme=w8a8}}{_TAIL}",
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
    Goal("bf16 structured", "bf16", 1.25),
    Goal("w8a8 structured", "w8a8", 1.25),
)


def main(
    models: Annotated[str, typer.Option("--models", "-m", help="Some of S,M,L.")] = "L",
    only: Annotated[str, typer.Option(help="Formats, separated by commas; all when empty.")] = "",
    rounds: Annotated[int, typer.Option(help="Turns of each format.")] = 9,
    out: Path = ROOT / "benchmarks" / "results" / "formats.json",
) -> None:
    """Compile models in all formats, and compare them."""
    results = json.loads(out.read_text()) if out.exists() else {}
    for name in models.split(","):
        results[name] = one(SHAPES[name], only.split(",") if only else list(PASSES), rounds)
        out.write_text(json.dumps(results, indent=1) + "\n")
        out.with_suffix(".md").write_text(page(results))
        typer.echo(page({name: results[name]}))


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
                rows[name] = compiled(folder, Path(work, name), PASSES[name])
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


def compiled(folder: Path, out: Path, passes: str) -> dict[str, Any]:
    """Compile in a process of its own; gives what its report says of bytes."""
    command = [sys.executable, "-c", "from tilewright.cli import main; main()", "compile", str(folder), "-o", str(out),
               "--passes", passes, "--dtype", "bf16", "--max-length", str(CAPACITY)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    report = json.loads((out / "report.json").read_text())
    return {"passes": passes, "bytes": (out / "weights.safetensors").stat().st_size, "peak": report["peak_bytes"],
            "fallbacks": report["fallbacks"]}  # fmt: skip


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
    return (f"- {goal.name} decodes {speed:.2f} times as fast as {goal.beside}{bytes_too}; goal {goal.least:.2f}: "
            f"{'hit' if met else 'missed'}")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
