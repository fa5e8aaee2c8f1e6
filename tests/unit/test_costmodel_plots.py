"""Plots: the curves by hand, the pages complete in themselves."""

from pathlib import Path

import pytest

from tilewright.costmodel.plots import (
    _overall,
    best_so_far,
    html_table,
    predicted_against_measured,
    tuning_curve,
    write_page,
)
from tilewright.costmodel.scores import Point
from tilewright.costmodel.workload import Measurement

TRIALS = [
    ("a", Measurement("a0", "ok", seconds=1.0, baseline=1.0)),
    ("b", Measurement("b0", "ok", seconds=3.0, baseline=3.0)),
    ("a", Measurement("a1", "wrong", seconds=0.1, baseline=1.0)),
    ("a", Measurement("a2", "ok", seconds=1.0, baseline=2.0)),
    ("b", Measurement("b1", "crashed")),
    ("a", Measurement("a3", "ok", seconds=0.9, baseline=1.0)),
]


def test_the_best_until_then() -> None:
    assert best_so_far(TRIALS) == {"a": [(1, 1.0), (4, 0.5), (6, 0.5)], "b": [(2, 1.0)]}


def test_overall_weighs_by_time() -> None:
    assert list(_overall(TRIALS, {})) == pytest.approx([1, 1, 1, 3.5 / 4, 3.5 / 4, 3.5 / 4])
    assert list(_overall(TRIALS, {"a": 3.0})) == pytest.approx([1, 1, 1, 4.5 / 6, 4.5 / 6, 4.5 / 6])


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    points = [Point("linear", 0.1, 0.2), Point("linear", -0.4, -0.3), Point("loops", 0.0, 0.5)]
    parts = [html_table(["kernel"], [["a<b"]]), tuning_curve(TRIALS), predicted_against_measured(points)]
    write_page(tmp_path / "page.html", "Tuning & more", parts)
    page = (tmp_path / "page.html").read_text()
    for word in ("Tuning &amp; more", "<td>a&lt;b</td>", '"overall"', '"a2"', '"loops"', '"plot1"', '"plot2"'):
        assert word in page
    assert "<script src=" not in page
    assert page.count("plotly.js v") == 1, "the library is there once"
    before = (tmp_path / "page.html").read_bytes()
    write_page(tmp_path / "page.html", "Tuning & more", parts)
    assert (tmp_path / "page.html").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html"]


def test_nothing_measured_yet_is_a_page_too(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", "Empty", [tuning_curve([]), predicted_against_measured([])])
    assert (tmp_path / "page.html").stat().st_size > 1000
