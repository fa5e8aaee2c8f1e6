"""The comparison of formats: its page, and that its pipelines exist. Nothing is measured."""

from __future__ import annotations

from typing import Any

from benchmarks.formats import FORMATS, GOALS, page
from tilewright.passes.pipeline import Pipeline


def row(decode: list[float], size: int) -> dict[str, Any]:
    return {"decode": decode, "prefill": [100.0, 100.0], "bytes": size, "peak": 120, "fallbacks": []}


def result(**rows: dict[str, Any]) -> dict[str, Any]:
    about = {"host": "a CPU", "threads": 2, "date": "2026-01-01", "commit": "abc", "checkpoint": 100}
    return {"rows": rows, "refused": {"w3a8": "groups of 128"}, **about}


def test_pipelines_parse_and_goals_name_formats() -> None:
    assert all(Pipeline.parse(fmt.passes).passes for fmt in FORMATS.values())
    assert {name for goal in GOALS for name in (goal.name, goal.beside)} <= FORMATS.keys()


def test_formats_are_compared_round_by_round() -> None:
    text = page({"L": result(w4a8=row([10, 20], 50), w2a8=row([15, 30], 30), bf16=row([5, 5], 100))})
    assert "| w2a8 | 0 | 1.20 | 22.5 | 4.50 (3.75-5.25) | 1.50 (1.50-1.50) | 100 | 1.00 (1.00-1.00) | 0 |" in text
    assert "- w2a8 decodes 1.50 times as fast as w4a8; goal 1.40: hit" in text
    assert "ternary" not in text
    assert "w3a8 is refused: groups of 128" in text


def test_a_format_may_be_fast_and_still_too_large() -> None:
    rows = {"bf16": row([10, 10], 100), "compressed": row([10, 10], 80)}
    assert "compressed decodes 1.00 times as fast as bf16 in 0.800 of the bytes (goal 0.7); goal 0.67: missed" in page(
        {"L": result(**rows)})
