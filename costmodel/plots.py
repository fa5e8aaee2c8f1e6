"""Pages that show a tuning run and a model: HTML files that hold all they need and open without a network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tilewright.costmodel.scores import Point
from tilewright.costmodel.sealed import write_beside
from tilewright.costmodel.workload import Measurement

Figure = dict[str, Any]
"""A figure of plotly."""
_STYLE = "body{font:15px sans-serif;margin:2em} table{border-collapse:collapse} td,th{padding:.2em .8em;text-align:left}"


def write_page(path: str | Path, title: str, parts: Sequence[Figure | str]) -> None:
    """A page of figures and of HTML, in order. Raises OSError when ``path`` cannot be written."""
    import plotly.io

    body = [f"<h1>{escape(title)}</h1>"]
    for i, part in enumerate(parts):
        if not isinstance(part, str):
            needed = not any(isinstance(before, dict) for before in parts[:i])  # the first brings the library
            part = plotly.io.to_html(part, include_plotlyjs=needed, full_html=False, div_id=f"plot{i}", validate=True)
        body.append(part)
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    write_beside(path, f"<!doctype html><html><head>{head}</head><body>{''.join(body)}</body></html>\n".encode())


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts."""
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<table><tr>{top}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def tuning_curve(trials: Sequence[tuple[str, Measurement]], weights: Mapping[str, float] | None = None) -> Figure:
    """The best ratio to the baseline so far, by trial, of each kernel and overall.

    ``trials``: name of the task and measurement, in the order measured. Overall is the weighted time of all tasks relative
    to that of their baselines, ``weights`` being 1 where not given.
    """
    curves = best_so_far(trials)
    series = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "line": {"shape": "hv"},
            "name": name,
            "x": [trial for trial, _ in points],
            "y": [ratio for _, ratio in points],
            "hovertext": [trials[trial - 1][1].schedule for trial, _ in points],
        }
        for name, points in curves.items()
    ]
    overall = list(_overall(trials, weights or {}))
    whole = {
        "type": "scatter",
        "mode": "lines",
        "name": "overall",
        "line": {"shape": "hv", "width": 4, "color": "black"},
        "x": list(range(1, len(trials) + 1)),
        "y": overall,
    }
    layout = {
        "title": {"text": "Tuning"},
        "xaxis": {"title": {"text": "trial"}},
        "yaxis": {"title": {"text": "best time relative to the baseline"}, "type": "log"},
    }
    return _figure([whole, *series], layout)


def predicted_against_measured(points: Sequence[Point]) -> Figure:
    """What a model predicted against what was measured, both relative to the workload's mean, a colour a family."""
    families = sorted({point.family for point in points})
    series: list[dict[str, Any]] = [
        {
            "type": "scattergl",
            "mode": "markers",
            "marker": {"size": 4, "opacity": 0.5},
            "name": family,
            "x": [math.exp(p.measured) for p in points if p.family == family],
            "y": [math.exp(p.predicted) for p in points if p.family == family],
        }
        for family in families
    ]
    if points:
        ends = [math.exp(end([p.measured for p in points])) for end in (min, max)]
        line = {"color": "grey", "dash": "dot"}
        series.append({"type": "scatter", "mode": "lines", "line": line, "name": "exact", "x": ends, "y": ends})
    layout = {
        "title": {"text": "Predicted against measured"},
        "xaxis": {"title": {"text": "measured time relative to the workload's mean"}, "type": "log"},
        "yaxis": {"title": {"text": "predicted"}, "type": "log"},
    }
    return _figure(series, layout)


def best_so_far(trials: Sequence[tuple[str, Measurement]]) -> dict[str, list[tuple[int, float]]]:
    """For each task the trials, from 1, that had a time, each with the best ratio until then."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for trial, (name, measurement) in enumerate(trials, 1):
        if measurement.status != "ok" or measurement.ratio is None:
            continue
        points = curves.setdefault(name, [])
        points.append((trial, min(measurement.ratio, points[-1][1] if points else math.inf)))
    return curves


def _overall(trials: Sequence[tuple[str, Measurement]], weights: Mapping[str, float]) -> Iterator[float | None]:
    """After each trial: weighted time over that of the baselines; a task counts as its baseline until it has a time."""
    base = {name: m.baseline * weights.get(name, 1.0) for name, m in reversed(trials) if m.baseline}
    best = dict.fromkeys(base, 1.0)
    total = sum(base.values())
    for name, measurement in trials:
        if measurement.status == "ok" and measurement.ratio is not None:
            best[name] = min(best[name], measurement.ratio)
        yield sum(base[task] * best[task] for task in base) / total if total else None


def _figure(series: Sequence[Mapping[str, Any]], layout: Mapping[str, Any]) -> Figure:
    return {"data": list(series), "layout": {"template": "plotly_white", "hovermode": "closest", **layout}}
