"""Elementary functions against numpy in double precision."""

import math

import numpy as np
import pytest

from tests.backend.mlir_helpers import TARGETS, target
from tilewright.codegen.mlir import math as kernels
from tilewright.codegen.mlir.builder import Kernel
from tilewright.codegen.mlir.native import NativeKernel, aligned

erf = np.vectorize(math.erf)
COUNT = 1 << 16

# name: (exact, low, high, allowed relative error, allowed absolute error); either is enough.
FUNCTIONS = {
    "exp": (np.exp, -86.9, 88.7, 3e-7, 0),
    "log": (np.log, 1e-37, 1e5, 2e-7, 0),
    "log1p": (np.log1p, -0.999, 100, 3e-7, 0),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 1e-30, 1e4, 2e-7, 0),
    "sin": (np.sin, -1e5, 1e5, 0, 1.5e-7),
    "cos": (np.cos, -1e5, 1e5, 0, 1.5e-7),
    "tanh": (np.tanh, -10, 10, 3.5e-7, 0),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), -80, 80, 3e-7, 0),
    "erf": (erf, -5, 5, 4e-7, 0),
    "silu": (lambda x: x / (1 + np.exp(-x)), -80, 80, 3e-7, 0),
    "softplus": (lambda x: np.logaddexp(0, x), -30, 30, 4e-7, 0),
}


def evaluate(name: str, function, *inputs: np.ndarray) -> np.ndarray:
    """``function`` compiled for the target ``name``, on whole vectors."""
    where = target(name)
    with Kernel("k", where, buffers=[(f"x{i}", "f32") for i in range(len(inputs))] + [("y", "f32")]) as kernel:
        *sources, y = kernel.buffers
        with kernel.loop(kernel.begin, kernel.end, kernel.lanes) as loop:
            y.store(function(*(x.load(loop.index, kernel.lanes) for x in sources)), loop.index)
    arrays = []
    for values in inputs:
        arrays.append(aligned(len(values), "f32", fill=None))
        arrays[-1][:] = values
    result = aligned(len(inputs[0]), "f32")
    NativeKernel(kernel)(0, len(result), (), (*arrays, result))
    return result


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_accuracy(name: str, function: str) -> None:
    exact, low, high, relative, absolute = FUNCTIONS[function]
    rng = np.random.default_rng(0)
    x = rng.uniform(low, high, COUNT).astype(np.float32)
    x[:COUNT // 4] = 10 ** rng.uniform(-6, 0, COUNT // 4)
    y, expected = evaluate(name, kernels.FUNCTIONS[function], x), exact(x.astype(np.float64))
    error = np.abs(y - expected)
    allowed = np.maximum(relative * np.abs(expected), absolute)
    worst = int((error - allowed).argmax())
    assert error[worst] <= allowed[worst], f"{function}({x[worst]!r}) = {y[worst]!r}, exact {expected[worst]!r}"


SHARES = {
    "gelu": lambda x: (1 + erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("function", SHARES)
def test_gelu_over_a_dense_grid(name: str, function: str) -> None:
    """gelu(x) is x times a share between 0 and 1, and the share is right to two units in its last place."""
    x = np.concatenate([np.linspace(-10, 10, 1 << 17), np.geomspace(1e-30, 10, 1 << 14)]).astype(np.float32)
    x = x[x != 0][: len(x) // 16 * 16 - 16]
    share = evaluate(name, kernels.FUNCTIONS[function], x) / x.astype(np.float64)
    np.testing.assert_allclose(share, SHARES[function](x.astype(np.float64)), rtol=0, atol=2.5e-7)
    far = np.array([6, -6, 20, -20, 1e9, -1e9, 1e30, -1e30] * 2, np.float32)
    np.testing.assert_array_equal(evaluate(name, kernels.FUNCTIONS[function], far), np.maximum(far, 0))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("function", "exact"), [("erf", erf), ("tanh", np.tanh)])
def test_odd_functions_over_a_dense_grid(name: str, function: str, exact) -> None:
    x = np.linspace(-10, 10, 1 << 17).astype(np.float32)
    y = evaluate(name, kernels.FUNCTIONS[function], x)
    np.testing.assert_allclose(y, exact(x.astype(np.float64)), rtol=3.6e-7)
    assert np.abs(y).max() == 1
    np.testing.assert_array_equal(y, -evaluate(name, kernels.FUNCTIONS[function], -x))


@pytest.mark.parametrize("name", TARGETS)
def test_edges(name: str) -> None:
    inf, nan = math.inf, math.nan
    x = np.array([inf, -inf, nan, 0, -1000, 1000, -1, 1] * 2, np.float32)
    expected = {
        "exp": [inf, 0, nan, 1, 0, inf, math.exp(-1), math.e],
        "log": [inf, nan, nan, -inf, nan, math.log(1000), nan, 0],
        "tanh": [1, -1, nan, 0, -1, 1, math.tanh(-1), math.tanh(1)],
        "erf": [1, -1, nan, 0, -1, 1, math.erf(-1), math.erf(1)],
        "sigmoid": [1, 0, nan, 0.5, 0, 1, 1 / (1 + math.e), 1 / (1 + math.exp(-1))],
    }
    for function, values in expected.items():
        actual = evaluate(name, kernels.FUNCTIONS[function], x)[:8]
        np.testing.assert_allclose(actual, values, rtol=4e-7, err_msg=function)


@pytest.mark.parametrize("name", TARGETS)
def test_power(name: str) -> None:
    rng = np.random.default_rng(0)
    x, y = np.exp(rng.uniform(-5, 5, COUNT)).astype(np.float32), rng.uniform(-8, 8, COUNT).astype(np.float32)
    x[:8], y[:8] = [-2, -3, 0, 0, 5, -1, 1, -2], [3, 2, 2, -1, 0, 0.5, 77, -1]
    with np.errstate(all="ignore"):
        expected = np.power(x.astype(np.float64), y.astype(np.float64))
    np.testing.assert_allclose(evaluate(name, kernels.power, x, y), expected, rtol=2e-7)
