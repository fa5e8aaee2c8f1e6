"""Kernels that no family lowers whole: the results are right, and the report says what was done."""

import numpy as np
import pytest

import tilewright
from tilewright.ir import ArraySource, interpret, parse_module

MODULE = """
module @m {
  dim B : 1..8
  weight @up.i4 : tensor<24x40xi4>
  weight @up.scale : tensor<24x10xf32>
  weight @gate.i4 : tensor<24x40xi4>
  weight @gate.scale : tensor<24x10xf32>
  func @forward(%x: tensor<Bx40xf32>) {
    %0 = quant.dequantize(@up.i4, @up.scale) : tensor<24x40xf32>
    %1 = nn.linear(X, %0) : tensor<Bx24xf32> loc("up")
    %2 = quant.dequantize(@gate.i4, @gate.scale) : tensor<24x40xf32>
    %3 = nn.gated_linear(X, %2, %0) : tensor<Bx24xf32> loc("gate")
    %4 = core.add(%1, %3) : tensor<Bx24xf32>
    return([%4])
  }
}
"""
SPARSE = """
module @m {
  dim B : 1..8
  weight @w : tensor<32x64xi8>
  weight @w.scale : tensor<32x1xf32>
  weight @least : tensor<1xf32>
  func @forward(%x: tensor<Bx64xf32>) {
    %0 = quant.dequantize(@w, @w.scale) : tensor<32x64xf32>
    %1 = sparse.threshold(%x, @least) : tensor<Bx64xf32>
    %2 = nn.linear(%1, %0) : tensor<Bx32xf32>
    return([%2])
  }
}
"""
ROUNDED = """{
    %8, %9 = quant.quantize(%x) : tensor<Bx40xi8>, tensor<Bx1xf32>
    %10 = quant.dequantize(%8, %9) : tensor<Bx40xf32>
    %0"""


def module(text: str):
    made, rng = parse_module(text), np.random.default_rng(0)
    for weight in made.weights.values():
        shape = tuple(map(int, weight.shape))
        codes = rng.integers(-8, 8, shape).astype(np.int8)
        array = codes if weight.dtype.is_int else rng.uniform(0.01, 0.1, shape)
        weight.source = ArraySource(array.astype(weight.dtype.np))
    return made


@pytest.mark.parametrize("rounded", [False, True])
def test_weights_that_no_kernel_decodes_are_stored_as_numbers(rounded: bool) -> None:
    text = MODULE.replace("X", "%10" if rounded else "%x")
    text = text.replace("{\n    %0", ROUNDED, 1) if rounded else text
    x = np.random.default_rng(1).standard_normal((3, 40)).astype(np.float32)
    want = interpret(module(text), "forward", [x])[0]
    done = tilewright.compile(module(text), passes="fuse,plan-memory")
    np.testing.assert_allclose(done(x), want, rtol=1e-4, atol=1e-4)
    decoded = [line for line in done.report.fallbacks if "take weights that are stored dequantized" in line]
    assert len(decoded) == 2
    assert all("groups of 4" in line for line in decoded)
    assert any("run one by one" in line for line in done.report.fallbacks) == rounded
    assert sum(done.report.weight_bytes.values()) < 3 * 32 * 40 * 4  # once each, though two layers take one of them


def test_sparse_weights_that_no_kernel_reads_are_stored_dense() -> None:
    """A layer that leaves out inputs wants columns, which a mask has not."""

    def sparse():
        made = module(SPARSE)
        codes = made.weights["w"].source.load()
        made.weights["w"].source = ArraySource(np.where(np.random.default_rng(2).random(codes.shape) < 0.3, codes, 0))
        return made

    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    want = interpret(sparse(), "forward", [x])[0]
    done = tilewright.compile(sparse(), passes="sparse-store,fuse,plan-memory")
    np.testing.assert_allclose(done(x), want, rtol=1e-4, atol=1e-4)
    (line,) = done.report.fallbacks
    assert "take sparse weights that are stored dense" in line
    assert sum(done.report.weight_bytes.values()) < 3 * 32 * 64  # codes, not numbers


THRESHOLD = """
module @m {
  dim B : 1..8
  weight @up : tensor<24x64xu4>
  weight @up.zero : tensor<24x1xu8>
  weight @scale : tensor<24x1xf32>
  weight @down.i8 : tensor<24x64xi8>
  weight @least : tensor<64xf32>
  func @forward(%x: tensor<Bx64xf32>) {
    %0 = quant.dequantize(@up, @scale, @up.zero) : tensor<24x64xf32>
    %1 = sparse.threshold(%x, @least) : tensor<Bx64xf32>
    %2 = nn.linear(%1, %0) : tensor<Bx24xf32> loc("up")
    %3 = quant.dequantize(@down.i8, @scale) : tensor<24x64xf32>
    %4 = nn.linear(%1, %3) : tensor<Bx24xf32> loc("down")
    %5 = core.add(%2, %4) : tensor<Bx24xf32>
    return([%5])
  }
}
"""


@pytest.mark.parametrize("rounded", [False, True])
def test_thresholds_of_layers_that_leave_nothing_out(rounded: bool) -> None:
    """Zero points are for kernels that read all of x, and so is x in codes: the report says so."""

    def made():
        text = THRESHOLD
        if rounded:
            text = text.replace("%2 = nn", "%8, %9 = quant.quantize(%1) : tensor<Bx64xi8>, tensor<Bx1xf32>\n"
                                "    %10 = quant.dequantize(%8, %9) : tensor<Bx64xf32>\n    %2 = nn")  # fmt: skip
            text = text.replace("linear(%1", "linear(%10")
        found, rng = parse_module(text), np.random.default_rng(0)
        for weight in found.weights.values():
            shape = tuple(map(int, weight.shape))
            array = rng.integers(0, 8, shape) if weight.dtype.is_int else rng.uniform(0.3, 0.9, shape)
            weight.source = ArraySource(array.astype(weight.dtype.np))
        return found

    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    want = interpret(made(), "forward", [x])[0]
    done = tilewright.compile(made(), passes="fuse,plan-memory")
    np.testing.assert_allclose(done(x), want, rtol=1e-4, atol=1e-4)
    lines = done.report.fallbacks
    assert any("no layer leaves out the zeros" in line for line in lines)
    assert any("no inputs are left out" in line and "coded so" in line for line in lines) != rounded
    assert not any("dequantized" in line or "one by one" in line for line in lines)
    assert ("mlir.columns" in {k["backend"] for k in done.report.kernels}) != rounded
