"""Columns taken out of layers: which ones, that the sum is the layer, and what quantization gains."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from tilewright.ir import ArraySource, Module, PassError, interpret, ops, parse_module
from tilewright.passes.base import PassContext
from tilewright.passes.outlier_columns import by_norm, largest, outliers, squares, without
from tilewright.passes.pipeline import Pipeline

TEXT = """
module @m {
  dim B : 1..512
  weight @a : tensor<48x64xf32>
  weight @b : tensor<40x64xf32>
  func @forward(%x: tensor<Bx64xf32>) {
    %0 = nn.linear(%x, @a) : tensor<Bx48xf32>
    %1 = nn.linear(%x, @b) : tensor<Bx40xf32>
    return([%0, %1])
  }
}
"""
LOUD = [5, 17, 63]


def model() -> Module:
    module, rng = parse_module(TEXT), np.random.default_rng(0)
    for w in module.weights.values():
        w.source = ArraySource(rng.standard_normal(tuple(map(int, w.shape))).astype(np.float32))
    return module


def inputs(rows: int = 200) -> np.ndarray:
    """Rows with three channels of large magnitude."""
    x = np.random.default_rng(1).standard_normal((rows, 64)).astype(np.float32)
    x[:, LOUD] *= 60
    return x


def run(pipeline: str, **options: object) -> tuple[Module, np.ndarray]:
    """The module, and the relative error of its first result."""
    module = model()
    want = interpret(module, "forward", [inputs()])[0]
    Pipeline.parse(pipeline).run(module, ctx=PassContext(options))
    got = interpret(module, "forward", [inputs()])[0]
    return module, np.linalg.norm(got - want) / np.linalg.norm(want)


def magnitudes() -> np.ndarray:
    return np.abs(inputs()).max(0)


def test_the_sum_is_the_layer() -> None:
    _, error = run("outlier-columns{fraction=0.1}")
    assert error < 1e-6


def test_calibrated_outliers_are_taken_and_shared() -> None:
    given = {"a": magnitudes(), "b": magnitudes()}
    module, _ = run("outlier-columns{fraction=0.05},dce", statistics=given)
    np.testing.assert_array_equal(module.weights["a.columns"].load(), LOUD)
    np.testing.assert_array_equal(np.flatnonzero(module.weights["a.keep"].load() == 0), LOUD)
    assert not module.weights["b.rest"].load()[:, LOUD].any()
    assert module.weights["b.outliers"].shape == (40, 3)
    assert len(list(module.functions["forward"].walk(ops.Gather))) == 1
    assert "b.columns" not in module.weights


def test_calibration_data_give_the_magnitudes() -> None:
    module, _ = run("outlier-columns{fraction=0.05}", calibration=[{"x": inputs()[:150]}, {"x": inputs()[150:]}])
    np.testing.assert_array_equal(module.weights["a.columns"].load(), LOUD)


def test_a_threshold_leaves_layers_without_outliers() -> None:
    given = {"a": magnitudes(), "b": np.ones(64)}
    module, _ = run("outlier-columns{fraction=0.2 threshold=6},dce", statistics=given)
    assert {name for name in module.weights if name[0] == "b"} == {"b"}
    assert int(module.weights["a.outliers"].shape[1]) == 3


@pytest.mark.parametrize(("scheme", "gain"), [("w8a8", 5), ("w4a8", 1.5), ("w3a16 group=32", 2)])
def test_quantization_loses_less(scheme: str, gain: float) -> None:
    given = {"a": magnitudes(), "b": magnitudes()}
    _, plain = run(f"quantize{{scheme={scheme}}}")
    module, split = run(f"outlier-columns{{fraction=0.05}},quantize{{scheme={scheme}}},dce", statistics=given)
    assert split * gain < plain
    assert {"a.outliers", "a.columns", "a.keep"} < set(module.weights)


def test_without_data_the_largest_columns_are_taken() -> None:
    weight = np.random.default_rng(2).standard_normal((30, 20)).astype(np.float32)
    weight[:, [3, 11]] *= 4
    choose = partial(by_norm, count=2)
    small, columns, keep = outliers(weight, choose)
    assert columns.tolist() == [3, 11]
    np.testing.assert_array_equal(small, weight[:, [3, 11]])
    np.testing.assert_array_equal(without(weight, choose), weight * keep)
    np.testing.assert_allclose(squares(weight), np.square(weight).sum(0), rtol=1e-5)
    assert largest(np.array([1.0, 5.0, 5.0, 5.0]), 2).tolist() == [1, 2]


def test_what_counts_for_weights_alone_is_magnitude_times_norm() -> None:
    given = {"a": np.where(np.arange(64) < 32, 3, 1)}
    weight = model().weights["a"].load()
    sizes = np.linalg.norm(weight, axis=0) * given["a"]
    module, _ = run("outlier-columns{fraction=0.1 inputs=false only=a}", statistics=given)
    assert set(module.weights["a.columns"].load()) == set(np.argsort(sizes)[-6:])


@pytest.mark.parametrize(("text", "message"), [
    ("outlier-columns{fraction=0}", "a fraction of a layer's inputs, above 0, at most 0.5; got 0.0"),
    ("outlier-columns{threshold=-1}", "threshold of outlier-columns is a magnitude, 0 or more; got -1.0"),
])  # fmt: skip
def test_options_are_checked(text: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        Pipeline.parse(text)


def test_statistics_are_checked() -> None:
    with pytest.raises(PassError, match=r"the statistics of @a are not 64 finite numbers, but \(3,\)"):
        run("outlier-columns", statistics={"a": np.ones(3)})
