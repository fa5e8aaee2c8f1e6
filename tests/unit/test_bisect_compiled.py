"""Bisection of compiled code: a kernel with a planted fault is named, with its operation and module path."""

from __future__ import annotations

import numpy as np
import pytest

from tilewright.bisect import bisect_all
from tilewright.codegen.mlir import linear
from tilewright.ir import Builder, DType, Function, Loc, Module, Return, TensorType, ops, sym
from tilewright.passes.pipeline import Pipeline

INPUTS = {"x": np.random.default_rng(1).standard_normal((3, 16)).astype(np.float32)}


def two_blocks() -> Module:
    rng = np.random.default_rng(0)
    module = Module("m", dims={"B": (1, 64)})
    function = module.add(Function("forward"))
    x = function.arg("x", TensorType((sym("B"), 16), DType.f32))
    b = Builder(function)
    for name, act in (("first", "gelu"), ("second", "silu")):
        gate, up = (module.constant(rng.standard_normal((16, 16)).astype("f4"), f"{name}.{p}") for p in ("gate", "up"))
        with b.at(Loc(f"model.{name}", "model.py", 7)):
            x = b(ops.GatedLinear, x, gate, up, act=act)
    b.insert(Return((x,)))
    return module


@pytest.mark.parametrize("target", ["native", "x86-64-v3"])
def test_sound_kernels_have_no_culprit(target):
    assert bisect_all(two_blocks(), Pipeline.parse("O2"), target, INPUTS) is None


def test_kernel_with_a_planted_fault_is_named(monkeypatch):
    monkeypatch.setitem(linear.ACTIVATIONS, "silu", lambda x: x * 1.01)
    culprit = bisect_all(two_blocks(), Pipeline.parse("O2"), "native", INPUTS)
    assert culprit is not None
    assert culprit.stage == "kernel"
    assert culprit.op == "nn.gated_linear"
    assert culprit.loc == Loc("model.second", "model.py", 7)
    assert "model.second" in str(culprit)
    assert "model.py:7" in str(culprit)
