"""What is compared of sparsity: rows in sections, each with a table of its own. One more row is one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.quality import structures
from benchmarks.quality.activations import ABOUT, ACTIVATION_GOALS, ACTIVATION_ROWS
from benchmarks.quality.goals import Goal, better
from benchmarks.quality.rows import BASE, HEAD16, ROWS, Row
from benchmarks.quality.running import stored
from benchmarks.quality.table import HEADER, line
from tilewright.ir import Weight, ops

TWO = "w2a16 g64"
TAKERS = (ops.Linear, ops.GatedLinear, ops.Dequantize)


@dataclass(frozen=True)
class Section:
    """Rows that belong together, and what they are to show."""

    title: str
    about: str
    rows: tuple[Row, ...]
    goals: tuple[Goal, ...] = ()


def shares() -> list[Row]:
    """Methods side by side, any weights of a row."""
    ways = {"magnitude": "", "wanda": "", "wanda, dsnot": " refine=dsnot", "sparsegpt": "", "alps": ""}
    return [
        Row(f"{p} % {name}", f"prune{{method={name.split(',')[0]} sparsity={p / 100}{more}}}")
        for p in (50, 60, 70)
        for name, more in ways.items()
    ]


def patterns() -> list[Row]:
    """Two of four neighbours stay."""
    ways = ("magnitude", "wanda", "sparsegpt", "alps")
    return [Row(f"2:4 {way}", f"prune{{method={way} pattern=2:4}}") for way in ways]


def budgets() -> list[Row]:
    """Layers give more or less of the same sum."""
    return [
        Row(f"{p} % {way}, {name}", f"prune{{method={way} sparsity={p / 100} allocation={name}}}")
        for p, way in ((60, "wanda"), (70, "wanda"), (70, "alps"))
        for name in ("global", "owl")
    ]


def eight_bits() -> list[Row]:
    quantize = "quantize{scheme=w8a8}"
    return [Row(f"{p} % sparsegpt, w8a8", f"prune{{method=sparsegpt sparsity={p / 100}}},{quantize}") for p in (50, 70)]


def four_bits() -> list[Row]:
    """Half of four bits beside two bits."""
    four = f"{HEAD16},quantize{{scheme=w4a16 group=128 layers=body method=gptq}}"
    two = f"{HEAD16},quantize{{scheme=w2a16 layers=body group="
    budget = "prune{method=alps group=8 allocation=global spread=0.2 damping=0.002}"
    return [
        Row(f"{TWO} rtn", f"{two}64}}"),
        Row(f"{TWO} gptq", f"{two}64 method=gptq}}"),
        Row("W4S50 groups of 8, sparsegpt", f"prune{{method=sparsegpt group=8}},{four}"),
        Row("W4S50 groups of 16, sparsegpt", f"prune{{method=sparsegpt group=16}},{four}"),
        Row("W4S50 groups of 8, alps", f"prune{{method=alps group=8}},{four}"),
        Row("W4S50 groups of 8, alps, global", f"{budget},{four}"),
        Row("w2a16 g16 gptq", f"{two}16 method=gptq}}"),
        Row("W4S50, alps", f"prune{{method=alps}},{four}"),
    ]


SECTIONS: tuple[Section, ...] = (
    Section(
        "Weights",
        "Zeros in the layers of the body, head and embeddings stay.",
        (*shares(), *patterns(), *budgets(), *eight_bits()),
        (
            better("Wanda better than magnitude at 50 %", "50 % wanda", "50 % magnitude"),
            better("SparseGPT better than magnitude at 50 %", "50 % sparsegpt", "50 % magnitude"),
            better("Wanda better than magnitude at 2:4", "2:4 wanda", "2:4 magnitude"),
            better("SparseGPT better than magnitude at 2:4", "2:4 sparsegpt", "2:4 magnitude"),
            *(
                better(f"unstructured better than 2:4, {way}", f"50 % {way}", f"2:4 {way}")
                for way in ("magnitude", "wanda", "sparsegpt", "alps")
            ),
        ),
    ),
    Section(
        "Half of four bits beside two bits",
        "W4S50 is 50 % zeros behind `w4a16 group=128` with GPTQ.",
        tuple(four_bits()),
        (
            better("W4S50 in groups of 8 better than w2, rounded (2.25 bits both)", "W4S50 groups of 8, alps, global",
                   f"{TWO} rtn"),
            better("W4S50 in groups of 8 better than w2, GPTQ (2.25 bits both)", "W4S50 groups of 8, alps, global",
                   f"{TWO} gptq"),
            better("W4S50 of any weights (3.125 bits) better than w2 in groups of 16, GPTQ (3 bits)", "W4S50, alps",
                   "w2a16 g16 gptq"),
        ),
    ),
    Section("Activations", ABOUT, ACTIVATION_ROWS, ACTIVATION_GOALS),
    Section("Structures", structures.ABOUT, structures.STRUCTURE_ROWS, structures.STRUCTURE_GOALS),
)  # fmt: skip
"""Tables of the page. Other kinds of sparsity are sections of their own."""
SPARSE_ROWS: tuple[Row, ...] = (*ROWS[:2], *(row for section in SECTIONS for row in section.rows))
"""The first two are the references, as in the table of formats."""


def counted(weight: Weight) -> int:
    """Bytes with zeros left out, where that is less: a bit says of each number (or 32 bits of neighbours) whether it is
    there, and each 16 rows say where theirs begin."""
    dense = stored(weight)
    if weight.tensor.rank != 2 or not any(isinstance(op, TAKERS) for op in weight.users):
        return dense
    numbers = weight.load() != 0
    rows, columns = numbers.shape
    bits = 16 if weight.dtype.is_float and weight.dtype.bits > 16 else weight.dtype.bits
    found = [dense]
    for unit in {1, max(1, 32 // bits)}:
        padded = np.pad(numbers, ((0, 0), (0, -columns % unit))).reshape(rows, -1, unit).any(-1)
        found.append(-(-int(padded.sum()) * unit * bits // 8) + -(-padded.size // 8) + 4 * -(-rows // 16))
    return min(found)


def page(results: Mapping[str, Any]) -> str:
    """``sparsity.json`` for people."""
    how, rows = results["settings"], results["rows"]
    lines = [
        "# Sparsity",
        "",
        f"The evaluation model (`eval_lm.json`: {results['parameters']:,} parameters; weights {how['weights']}) on",
        f"{how['tokens']:,} held-out tokens, windows of {how['window']}, stride {how['stride']}; calibration on",
        f"{how['calibration_tokens']:,} others. Change is that of perplexity against {BASE}; KL and agreement against f32",
        "arithmetic on the same weights. Bytes are arithmetic on zeros: numbers that are not 0, a bit each (or for 32 bits",
        "of neighbours) that says where they are, and a start for each 16 rows, where that is less than all numbers; what",
        "is not quantized counts two bytes. Rows that the interpreter runs, for want of kernels, are marked *.",
        "",
        *HEADER,
        *(line(row.name, rows[row.name], rows) for row in SPARSE_ROWS[:2] if row.name in rows),
    ]
    for section in SECTIONS:
        shown = [line(row.name, rows[row.name], rows) for row in section.rows if row.name in rows]
        goals = [f"- {goal.text}: {goal.verdict(rows)}" for goal in section.goals]
        lines += ["", f"## {section.title}", "", section.about, "", *HEADER, *shown, "", *goals]
    return "\n".join(lines) + "\n"
