"""Errors per layer in the compile report."""

from __future__ import annotations

import numpy as np
import pytest

from tilewright.compiler import compile
from tilewright.inspection import layer_table
from tilewright.ir import Builder, DType, Function, Loc, Module, Return, TensorType, ops, sym
from tilewright.layer_errors import parts, sample_of
from tilewright.report import worst


def two_layers() -> Module:
    rng = np.random.default_rng(0)
    module = Module("m", dims={"B": (1, 64)})
    function = module.add(Function("forward"))
    x = function.arg("x", TensorType((sym("B"), 32), DType.f32))
    b = Builder(function)
    for name in ("first", "second"):
        weight = module.constant(rng.standard_normal((32, 32)).astype("f4"), name)
        with b.at(Loc(f"model.{name}")):
            x = b(ops.Tanh, b(ops.Linear, x, weight))
    b.insert(Return((x,)))
    return module


@pytest.mark.parametrize(("passes", "low", "high"), [("O2", 0.0, 1e-6), ("w8a16", 1e-4, 1e-1)])
def test_report_has_the_error_of_each_layer(passes, low, high):
    rows = compile(two_layers(), passes=passes, errors=True).report.layers
    assert [r["layer"] for r in rows] == ["model.first", "model.second"]
    assert all(low <= r["error"] <= high for r in rows), rows
    assert all(r["kernel_error"] <= 1e-6 for r in rows), rows


def test_no_errors_unless_asked():
    report = compile(two_layers()).report
    assert report.layers == []
    assert "--errors" in layer_table(report)


def test_parts_are_runs_of_tokens():
    old = np.arange(24.0).reshape(2, 4, 3)
    assert [p.tolist() for p in parts(old, old[:, 1:3])] == [old[:, i : i + 2].tolist() for i in range(3)]
    assert parts(old, old) == [old]
    assert parts(old, old[:1]) == []
    assert parts(old, old.astype("f4")) == []


def test_the_summary_names_the_worst_layers_first():
    report = compile(two_layers(), passes="w8a16", errors=True).report
    report.layers += [{"layer": "exact", "error": 0.0}, {"layer": "unmatched", "error": None}]
    names = [row["layer"] for row in worst(report.layers)]
    errors = {row["layer"]: row["error"] for row in report.layers}
    assert sorted(names) == ["model.first", "model.second"]
    assert errors[names[0]] >= errors[names[1]]
    assert [line.split()[1] for line in report.offenders()] == [f"{name}:" for name in names]
    assert worst(report.layers, 1)[0]["layer"] == names[0]


def test_errors_are_measured_on_calibration_data():
    data = {"x": np.random.default_rng(1).standard_normal((5, 32)).astype("f4")}
    rows = [compile(two_layers(), passes="w8a16", errors=True, calibration=[x]).report.layers
            for x in (data, {"x": 0 * data["x"]})]  # fmt: skip
    assert all(0 < row["error"] < 0.5 for row in rows[0])
    assert not any(row["error"] for row in rows[1])


def test_a_sample_is_the_first_two_rows_and_some_tokens():
    assert sample_of(None) is None
    batch = {"ids": np.zeros((4, 100), np.int64), "x": np.zeros((4, 100))}
    assert {n: a.shape for n, a in (sample_of([batch]) or {}).items()} == {"ids": (2, 32), "x": (2, 100)}
