"""Weights that passes make: their values, and that nothing is loaded before it is asked for."""

from __future__ import annotations

import numpy as np
import pytest

from tilewright.ir import DType, Module, TensorType, interpret, parse_module
from tilewright.passes import Pipeline
from tilewright.passes.weights import derive, free_name, joined_name


class Source:
    """Numbers that count how often they were loaded."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.loads = array, 0

    def load(self) -> np.ndarray:
        self.loads += 1
        return self.array


def module(text: str) -> tuple[Module, dict[str, Source]]:
    """The module of a body that uses ``%x [B, 4]``, with random weights as listed."""
    found = parse_module(text)
    rng, sources = np.random.default_rng(0), {}
    for w in found.weights.values():
        sources[w.name] = w.source = Source(rng.normal(size=[int(d) for d in w.shape]).astype(w.dtype.np))
    return found, sources


QKV = """
module @m {
  dim B : 1..8
  weight @q : tensor<600x4xf32>
  weight @k : tensor<300x4xf32>
  weight @bias : tensor<300xf32>
  func @forward(%x: tensor<Bx4xf32>) {
    %0 = nn.linear(%x, @q) : tensor<Bx600xf32> loc("attn.q")
    %1 = nn.linear(%x, @k, @bias) : tensor<Bx300xf32> loc("attn.k")
    return([%0, %1])
  }
}
"""
GATE_UP = """
module @m {
  dim B : 1..8
  weight @w : tensor<600x4xf32>
  func @forward(%x: tensor<Bx4xf32>) {
    %0 = nn.linear(%x, @w) : tensor<Bx600xf32>
    %1 = core.slice(%0) {starts=[0, 0] stops=[B, 300] steps=[1, 1]} : tensor<Bx300xf32>
    %2 = core.slice(%0) {starts=[0, 300] stops=[B, 600] steps=[1, 1]} : tensor<Bx300xf32>
    %3 = core.silu(%1) : tensor<Bx300xf32>
    %4 = core.mul(%3, %2) : tensor<Bx300xf32>
    return([%4])
  }
}
"""
BATCH_NORM = """
module @m {
  dim B : 1..8
  weight @w : tensor<600x4xf32>
  weight @b : tensor<600xf32>
  weight @s : tensor<600xf32>
  func @forward(%x: tensor<Bx4xf32>) {
    %0 = nn.linear(%x, @w, @b) : tensor<Bx600xf32>
    %1 = core.mul(%0, @s) : tensor<Bx600xf32>
    return([%1])
  }
}
"""


@pytest.mark.parametrize(
    ("text", "pipeline"),
    [(QKV, "fuse-qkv"), (GATE_UP, "fuse-gate-up"), (BATCH_NORM, "fuse-batch-norm"), (QKV, "fold{max_bytes=0},fuse-qkv")],
)
def test_results_stay_and_nothing_is_loaded(text: str, pipeline: str) -> None:
    m, sources = module(text)
    x = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    want = interpret(m, "forward", [x])
    for s in sources.values():
        s.loads = 0
    Pipeline.parse(f"{pipeline},canonicalize,dce").run(m)
    assert [s.loads for s in sources.values()] == [0] * len(sources)
    for a, b in zip(want, interpret(m, "forward", [x]), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)


def test_quantized_weights_are_close_and_looked_through_once() -> None:
    m, sources = module(QKV)
    x = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    want = interpret(m, "forward", [x])
    for s in sources.values():
        s.loads = 0
    report = Pipeline.parse("quantize,dce").run(m)
    assert sources["q"].loads == sources["k"].loads == 1  # to see that all numbers are finite
    assert report.ctx.notes == [("quantize", "2 weights of 14400 bytes became 7200 bytes")]
    assert {w.name: w.dtype.value for w in m.weights.values()} == {
        "bias": "f32",
        "q.i8": "i8",
        "q.scale": "f32",
        "k.i8": "i8",
        "k.scale": "f32",
    }
    for a, b in zip(want, interpret(m, "forward", [x]), strict=True):
        assert np.abs(a - b).max() < 0.02 * np.abs(a).max()


def test_weights_without_data_stay_without() -> None:
    m = parse_module(QKV)
    made = derive(m, "q", TensorType((4,), DType.f32), [m.weights["k"]], lambda a: a)
    assert made.name == "q.1"
    assert made.source is None
    assert free_name(m, "q") == "q.2"


def test_names() -> None:
    assert joined_name(["l.0.q.weight", "l.0.k.weight", "l.0.v.weight"]) == "l.0.q_k_v.weight"
    assert joined_name(["a", "b"]) == "a_b"
    assert joined_name(["l.wq", "l.wk"]) == "l.wq_wk"
    assert joined_name(["x.a.w", "y.w"]) == "x.a_y.w"
