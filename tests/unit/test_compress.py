"""bf16 weights compressed without loss: every bit comes back, in about 0.7 of the bytes."""

import numpy as np
import pytest

from tilewright.ir import ArraySource, DType, Module, interpret, ops, parse_module
from tilewright.passes.compress import choose_base, compress, exponent_counts
from tilewright.passes.pipeline import Pipeline

TEXT = """
module @m {
  dim B : 1..8
  weight @up : tensor<96x64xbf16>
  weight @other : tensor<96x64xbf16>
  weight @gate : tensor<96x64xbf16>
  weight @mean : tensor<40x96xf32>
  weight @spread : tensor<64x96xbf16>
  func @forward(%x: tensor<Bx64xbf16>) {
    %0 = nn.gated_linear(%x, @gate, @up) : tensor<Bx96xbf16> loc("mlp")
    %1 = nn.linear(%x, @other) : tensor<Bx96xbf16>
    %2 = core.add(%0, %1) : tensor<Bx96xbf16>
    %3 = nn.linear(%2, @spread) : tensor<Bx64xbf16> loc("spread")
    return([%3])
  }
}
"""


def model() -> Module:
    module, rng = parse_module(TEXT), np.random.default_rng(2)
    for name, w in module.weights.items():
        shape = tuple(map(int, w.shape))
        wide = np.exp2(rng.integers(-100, 100, shape)) if name == "spread" else 0.05
        w.source = ArraySource((rng.standard_normal(shape) * wide).astype(w.dtype.np))
    return module


def test_layers_compute_the_same_bit_for_bit() -> None:
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(DType.bf16.np)
    want = interpret(model(), "forward", [x])[0]
    module = model()
    report = Pipeline.parse("compress,dce").run(module)
    assert len(list(module.functions["forward"].walk(ops.Decompress))) == 3
    assert np.array_equal(interpret(module, "forward", [x])[0].view(np.uint16), want.view(np.uint16))
    assert [(s.op, s.reason) for s in report.ctx.skips] == [("nn.linear", "@spread would come to 117% of its bytes")]


def test_weights_of_one_shape_share_their_types() -> None:
    module = model()
    Pipeline.parse("compress").run(module)
    found = list(module.functions["forward"].walk(ops.Decompress))
    assert len({tuple(str(v.type) for v in op.operands) for op in found}) == 1


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 2), (37, 65), (1030, 6)])
def test_every_kind_of_number_comes_back(rows: int, columns: int) -> None:
    rng = np.random.default_rng(rows)
    weight = (rng.standard_normal((rows, columns)) * 0.02).astype(DType.bf16.np)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -3e38], DType.bf16.np)
    weight.reshape(-1)[: len(special)] = special[: weight.size]
    base, escapes = choose_base(exponent_counts(weight))
    low, planes, left, starts, first = compress(weight, base, escapes + 3)
    op = ops.Decompress.evaluate
    like = type("op", (), {"rows": rows, "columns": columns})
    assert np.array_equal(op(like, None, low, planes, left, starts, first).view(np.uint16), weight.view(np.uint16))


def test_normal_weights_take_seven_tenths_of_their_bytes() -> None:
    weight = np.random.default_rng(0).standard_normal((512, 1024)).astype(DType.bf16.np)
    base, escapes = choose_base(exponent_counts(weight))
    assert sum(p.nbytes for p in compress(weight, base, escapes)) < 0.705 * weight.nbytes
