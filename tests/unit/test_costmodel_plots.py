"""Plots: the curves by hand, the pages complete in themselves."""

from pathlib import Path

import pytest

from tilewright.costmodel.plots import _overall, best_so_far, predicted_against_measured, tuning_curve
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


def test_pages_need_nothing_else(tmp_path: Path) -> None:
    tuning_curve(TRIALS, tmp_path / "curve.html")
    points = [Point("linear", 0.1, 0.2), Point("linear", -0.4, -0.3), Point("loops", 0.0, 0.5)]
    predicted_against_measured(points, tmp_path / "points.html")
    for name, words in (("curve.html", ("overall", "a2", "trial")), ("points.html", ("linear", "loops", "measured"))):
        page = (tmp_path / name).read_text()
        assert all(f'"{word}"' in page or word in page for word in words)
        assert "<script src=" not in page
    before = (tmp_path / "curve.html").read_bytes()
    tuning_curve(TRIALS, tmp_path / "curve.html")
    assert (tmp_path / "curve.html").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curve.html", "points.html"]


def test_nothing_measured_yet_is_a_page_too(tmp_path: Path) -> None:
    tuning_curve([], tmp_path / "curve.html")
    predicted_against_measured([], tmp_path / "points.html")
    assert (tmp_path / "points.html").stat().st_size > 1000
