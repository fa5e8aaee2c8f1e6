"""Weights that are taken out: which, what is left, and what that is worth to quantization."""

import numpy as np
import pytest

from tilewright.ir import ArraySource, Module, PassError, interpret, ops, parse_module
from tilewright.passes.outlier_weights import outliers, without
from tilewright.passes.pipeline import Pipeline

TEXT = """
module @m {
  dim B : 1..300
  weight @gate : tensor<96x64xf32>
  weight @up : tensor<96x64xf32>
  weight @down : tensor<64x96xf32>
  func @forward(%x: tensor<Bx64xf32>) {
    %0 = nn.gated_linear(%x, @gate, @up) : tensor<Bx96xf32>
    %1 = nn.linear(%0, @down) : tensor<Bx64xf32>
    return([%1])
  }
}
"""


def model() -> Module:
    """Weights a hundredth of which are ten times as large."""
    module, rng = parse_module(TEXT), np.random.default_rng(2)
    for w in module.weights.values():
        array = rng.standard_normal(tuple(map(int, w.shape))) * 0.1
        array[rng.random(array.shape) < 0.01] *= 10
        w.source = ArraySource(array.astype(np.float32))
    return module


def changed(pipeline: str) -> Module:
    module = model()
    Pipeline.parse(pipeline).run(module)
    return module


X = np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)


def error(pipeline: str) -> float:
    want = interpret(model(), "forward", [X])[0]
    got = interpret(changed(pipeline), "forward", [X])[0]
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def test_the_function_stays_what_it_is() -> None:
    assert error("outlier-weights{fraction=0.02}") < 1e-6
    assert len(list(changed("outlier-weights").functions["forward"].walk(ops.SparseLinear))) == 3


def test_three_bits_lose_less_without_outliers() -> None:
    plain = error("quantize{scheme=w3a16 group=32}")
    assert error("outlier-weights{fraction=0.02},quantize{scheme=w3a16 group=32}") < 0.6 * plain


def test_the_largest_of_each_row_are_taken() -> None:
    weight = np.random.default_rng(1).standard_normal((5, 40)).astype(np.float32)
    rest, (values, columns) = without(weight, 3), outliers(weight, 3)
    for row, left, taken, at in zip(weight, rest, values, columns):
        assert set(at) == set(np.argsort(np.abs(row))[-3:])
        assert (np.diff(at) > 0).all()
        assert np.array_equal(taken, row[at])
        assert np.array_equal(np.flatnonzero(left == 0), at)


def test_inputs_decide_with_them() -> None:
    weight, sizes = np.ones((2, 4), np.float32), np.array([1, 9, 2, 3], np.float32)
    assert outliers(weight, 2, sizes)[1].tolist() == [[1, 3]] * 2


def test_wrong_options_and_names() -> None:
    with pytest.raises(PassError, match="a fraction of a row"):
        Pipeline.parse("outlier-weights{fraction=0.9}")
    with pytest.raises(PassError, match="no weight is named"):
        changed("outlier-weights{skip=[*dawn]}")
