"""Sparse weights through an artifact on disk: identity inputs bring all numbers back, and zeros exactly where they were."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tilewright
from tilewright.compiler import compile
from tilewright.ir import Builder, DType, Function, Module, Return, TensorType, interpret, ops, sym
from tilewright.passes.pipeline import Pipeline

Array = np.ndarray[Any, Any]
N, K = 80, 128
PRUNED = {"half": "prune{sparsity=0.5}", "most": "prune{sparsity=0.8}", "pattern": "prune{pattern=2:4}",
          "words": "prune{group=8}"}  # fmt: skip
CODES = {"plain": "", "w8": "quantize{scheme=w8a16}", "w4": "quantize{scheme=w4a16 group=32}"}


def layers(dtype: str) -> Module:
    """A layer for each way to prune; the first row of each weight is all zeros, the second has none to spare."""
    rng = np.random.default_rng(0)
    module = Module("m", dims={"B": (1, K)})
    function = module.add(Function("forward"))
    x, b = function.arg("x", TensorType((sym("B"), K), DType(dtype))), Builder(function)
    results = []
    for name in PRUNED:
        numbers = rng.standard_normal((N, K))
        numbers[0] = 0
        results.append(b(ops.Linear, x, module.constant(numbers.astype(DType(dtype).np), name)))
    b.insert(Return(tuple(results)))
    return module


@pytest.mark.parametrize(("dtype", "codes"), [("f32", "plain"), ("bf16", "plain"), ("f32", "w8"), ("f32", "w4")])
def test_numbers_come_back(tmp_path: Path, dtype: str, codes: str) -> None:
    prune = ",".join(f"{text[:-1]} layers=all only=[{name}]}}" for name, text in PRUNED.items())
    passes = ",".join(filter(None, (prune, CODES[codes])))
    compile(layers(dtype), passes=f"{passes},sparse-store{{singles=true}},cse,dce,kernels", out=tmp_path / "layers.tw")
    masks = re.findall(r"weight @(\w+)\.pruned\S*\.mask ", (tmp_path / "layers.tw" / "ir.twir").read_text())
    assert sorted(masks) == sorted(PRUNED)
    eye, module = np.eye(K).astype(ml_dtypes.bfloat16 if dtype == "bf16" else np.float32), layers(dtype)
    Pipeline.parse(passes).run(module)
    with tilewright.load(tmp_path / "layers.tw").session() as session:
        got = [array.copy() for array in session("forward", x=eye).values()]
        one = [array.copy() for array in session("forward", x=eye[5:6]).values()]
    for name, want, all_rows, row in zip(PRUNED, interpret(module, "forward", [eye]), got, one, strict=True):
        share = (want == 0).mean()
        assert share >= 0.48, name
        assert not want[:, 0].any()
        np.testing.assert_array_equal(all_rows, want, name)
        np.testing.assert_array_equal(row, want[5:6], name)
