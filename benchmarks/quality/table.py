"""The committed page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.quality.goals import ENCODER_GOALS, GOALS
from benchmarks.quality.rows import BASE, ENCODER, ROWS

Results = Mapping[str, Any]
HEADER = (
    "| | bytes | bits | perplexity | change | KL, mean | KL, 99 % | same top token |",
    "|---|---|---|---|---|---|---|---|",
)


def page(results: Results) -> str:
    """``quality.json`` for people."""
    how, rows, encoder = results["settings"], results["rows"], results["encoder"]
    lines = [
        "# Formats and methods of quantization",
        "",
        f"The evaluation model (`eval_lm.json`: {results['parameters']:,} parameters; weights {how['weights']}) on",
        f"{how['tokens']:,} held-out tokens, windows of {how['window']}, stride {how['stride']}; calibration on",
        f"{how['calibration_tokens']:,} others. Change is that of perplexity against {BASE}; KL and agreement against f32",
        "arithmetic on the same weights. Bytes are all weights of the model as stored, bits those a parameter; what is not",
        "quantized counts two bytes. Head and token embeddings keep eight bits in rows below eight. Rows are in f32",
        "arithmetic but for bf16; those that the interpreter runs, for want of kernels, are marked *.",
        "",
        *HEADER,
        *(line(row.name, rows[row.name], rows) for row in ROWS if row.name in rows),
        "",
        "## Goals",
        "",
        *(f"- {goal.text}: {goal.verdict(rows)}" for goal in GOALS),
        "",
        "## MiniLM",
        "",
        "Vectors of 200 English sentences (documentation of Python's library) beside those of f32.",
        "",
        "| | bytes | bits | cosine, mean | least |",
        "|---|---|---|---|---|",
        *(encoder_line(row.name, encoder[row.name]) for row in ENCODER if row.name in encoder),
        "",
        *(f"- {goal.text}: {goal.verdict(encoder)}" for goal in ENCODER_GOALS),
    ]
    return "\n".join(lines) + "\n"


def line(name: str, row: Mapping[str, Any], rows: Results) -> str:
    if "error" in row:
        return f"| {name} | not run: {row['error']} | | | | | | |"
    base = rows.get(BASE, {}).get("perplexity")
    change = "" if base is None else f"{row['perplexity'] / base - 1:+.2%}"
    mark = "" if row["kernels"] == "compiled" else " *"
    return (f"| {name}{mark} | {row['bytes']:,} | {row['bits']:.2f} | {row['perplexity']:.3f} | {change} | "
            f"{row['kl_mean']:.5f} | {row['kl_p99']:.4f} | {row['top1']:.2%} |")  # fmt: skip


def encoder_line(name: str, row: Mapping[str, Any]) -> str:
    if "error" in row:
        return f"| {name} | not run: {row['error']} | | | |"
    mark = "" if row["kernels"] == "compiled" else " *"
    return f"| {name}{mark} | {row['bytes']:,} | {row['bits']:.2f} | {row['cosine_mean']:.5f} | {row['cosine_min']:.5f} |"
