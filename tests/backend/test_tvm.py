"""TVM kernels against the interpreter, over ragged sizes, for both vector widths."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from tilewright.codegen.target import parse_target
from tilewright.codegen.tvm.compute import TABLE
from tilewright.codegen.tvm.cuda import CudaTvmEmitter
from tilewright.codegen.tvm.emitter import TvmEmitter
from tilewright.ir import DType, TensorType, ops, sym

spec = importlib.util.spec_from_file_location("backend_harness", Path(__file__).parent / "harness.py")
harness = sys.modules.setdefault("backend_harness", importlib.util.module_from_spec(spec))
spec.loader.exec_module(harness)

B, S = sym("B"), sym("S")
SIZES = ((2, 7), (1, 16), (3, 13), (1, 127))


def f32(*shape):
    return TensorType(shape, DType.f32)


def i64(*shape):
    return TensorType(shape, DType.i64)


def bf16(*shape):
    return TensorType(shape, DType.bf16)


IMAGE = f32(B, 4, 9, S)
CASES = {
    "matmul": ([f32(B, 3, S, 8), f32(3, 8, 5)], ops.Matmul),
    "matmul broadcast": ([f32(B, 1, S, 17), f32(3, 17, S)], ops.Matmul),
    "conv": ([IMAGE, f32(6, 4, 3, 3)], lambda x, w: ops.Conv(x, w, None, (1, 1), (0, 0), (1, 1))),
    "conv grouped": ([IMAGE, f32(6, 2, 3, 3), f32(6)], lambda x, w, b: ops.Conv(x, w, b, (2, 1), (1, 1), (1, 2), 2)),
    "conv bf16": ([bf16(B, 4, 9, S), bf16(6, 4, 3, 3)], lambda x, w: ops.Conv(x, w, None, (2, 1), (1, 1), (1, 2))),
    "conv 1d": ([f32(B, 4, S), f32(6, 4, 3)], lambda x, w: ops.Conv(x, w, None, (1,), (1,), (1,))),
    "conv transposed": (
        [IMAGE, f32(4, 3, 3, 3)],
        lambda x, w: ops.Conv(x, w, None, (2, 2), (1, 1), (1, 1), 1, True, (1, 1)),
    ),
    "max pool": ([IMAGE], lambda x: ops.MaxPool(x, (3, 3), (2, 2), (1, 1), (1, 1))),
    "avg pool": ([IMAGE], lambda x: ops.AvgPool(x, (3, 3), (2, 2), (1, 1), False, False)),
    "avg pool with pads": ([IMAGE], lambda x: ops.AvgPool(x, (3, 3), (2, 2), (1, 1), False, True)),
    "adaptive pool": ([IMAGE], lambda x: ops.AdaptiveAvgPool(x, (4, 3))),
    "global pool": ([IMAGE], lambda x: ops.AdaptiveAvgPool(x, (1, 1))),
    "bilinear": ([IMAGE], lambda x: ops.Resize(x, (13, 5), "bilinear")),
    "bilinear corners": ([IMAGE], lambda x: ops.Resize(x, (13, 5), "bilinear", True)),
    "nearest": ([IMAGE], lambda x: ops.Resize(x, (13, 5))),
    "cumsum": ([i64(B, S)], lambda x: ops.CumSum(x, 1)),
    "cumsum f32": ([f32(S, B)], lambda x: ops.CumSum(x, 0)),
    "sort": ([f32(B, S, 7)], lambda x: ops.Sort(x, 2, True)),
    "sort ties": ([i64(B, S, 17)], lambda x: ops.Sort(x, 2)),
    "top-k": ([f32(B * S, 8)], lambda x: ops.TopK(x, 2, 1)),
    "top-k smallest": ([i64(B, 8, S)], lambda x: ops.TopK(x, 3, 1, False)),
    "scatter": ([f32(B, 3, S), i64(1)], lambda x, i: ops.ScatterND(x, (i,), x)),
    "experts": (
        [f32(B * S, 8), i64(B * S, 2), f32(B * S, 2), f32(3, 12, 8), f32(3, 8, 6)],
        lambda x, i, w, up, down: ops.Experts(x, i, w, up, down),
    ),
    "experts with biases": (
        [f32(S, 8), i64(S, 2), f32(S, 2), f32(3, 6, 8), f32(3, 8, 6), f32(3, 6), f32(3, 8)],
        lambda *v: ops.Experts(*v, act="gelu", gated=False),
    ),
}
CASES["scatter"] = ([f32(4, 3, S), i64(2), f32(2, 3, S)], lambda x, i, u: ops.ScatterND(x, (i,), u))
CASES["scatter add"] = (CASES["scatter"][0], lambda x, i, u: ops.ScatterND(x, (i,), u, True))
CASES["scatter along"] = ([f32(4, S), i64(2, S), f32(2, S)], lambda x, i, s: ops.ScatterAlong(x, i, s, 0))


@pytest.mark.parametrize("target", [*harness.TARGETS, harness.CUDA])
@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_interpreter(name, target):
    types, make = CASES[name]
    emitter = CudaTvmEmitter() if target == harness.CUDA else TvmEmitter()
    kernel = harness.Compiled(harness.one_op(types, make), emitter, target)
    narrow = any(t.dtype is DType.bf16 for t in types)
    for b, s in SIZES:
        dims, rng = {"B": b, "S": s}, np.random.default_rng(b * 1000 + s)
        inputs = [harness.sample(t, dims, rng) for t in types]
        if name == "scatter along":
            inputs[1] = np.stack([rng.permutation(4)[:2] for _ in range(s)], 1).astype(np.int64)
        for got, want in zip(kernel(inputs, dims), kernel.expected(inputs)):
            harness.assert_close(got, want, 8e-3 if narrow else 2e-6)


def test_every_tensor_expression_is_tested():
    tested = {type(harness.one_op(types, make).body[0]) for types, make in CASES.values()}
    assert set(TABLE) <= tested


def test_long_sort_is_refused():
    function = harness.one_op([f32(2, 100_000)], lambda x: ops.Sort(x, 1))
    reason = TvmEmitter().match(function, parse_target("x86-64-v3"))
    assert reason is not None
    assert "100000" in reason
