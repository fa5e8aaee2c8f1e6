"""Zeros that ``prune`` made, and every scheme, method and pass of quantization behind it: they stay zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.unit.test_calibration import given
from tilewright.ir import ArraySource, Module, Op, Value, Weight, interpret, ops, parse_module
from tilewright.ir.core import Env
from tilewright.passes.formats import SCHEMES
from tilewright.passes.pipeline import Pipeline

Array = np.ndarray[Any, Any]
K = 128
TEXT = f"""module @mlp {{
  dim B : 1..999
  weight @norm : tensor<{K}xf32>
  weight @gate : tensor<{K}x{K}xf32>
  weight @up : tensor<{K}x{K}xf32>
  weight @down : tensor<{K}x{K}xf32>
  weight @head : tensor<32x{K}xf32>
  func @forward(%x: tensor<Bx{K}xf32>) {{
    %0 = nn.rms_norm(%x, @norm) : tensor<Bx{K}xf32>
    %1 = nn.gated_linear(%0, @gate, @up) : tensor<Bx{K}xf32>
    %2 = nn.linear(%1, @down) : tensor<Bx{K}xf32>
    %3 = nn.rms_norm(%2, @norm) : tensor<Bx{K}xf32>
    %4 = nn.linear(%3, @head) : tensor<Bx32xf32>
    return([%4])
  }}
}}"""
BODY = ("gate", "up", "down")
X = np.random.default_rng(5).standard_normal((192, K)).astype(np.float32) * np.linspace(0.2, 3, K, dtype=np.float32)


def mlp() -> Module:
    module, rng = parse_module(TEXT), np.random.default_rng(0)
    for weight in module.weights.values():
        shape = [int(d) for d in weight.shape]
        weight.source = ArraySource((rng.standard_normal(shape) / K**0.25 + (len(shape) == 1)).astype(np.float32))
    return module


def ran(passes: str, module: Module | None = None) -> Module:
    module = module or mlp()
    Pipeline.parse(passes).run(module, ctx=given([{"x": X}]))
    return module


def numbers(value: Value) -> Array:
    """What the operations in front of a layer make of stored weights."""
    if isinstance(value, Weight):
        return value.load()
    assert isinstance(value.owner, Op)
    parts = [None if v is None else numbers(v) for v in value.owner.operand_slots()]
    return value.owner.evaluate(Env({}), *parts)


def matrices(module: Module) -> dict[str, Array]:
    """The numbers of the layers' weights, by the first part of their names."""
    found: dict[str, Array] = {}
    for op in module.ops(ops.Linear, ops.GatedLinear):
        for value in op.operands[1:]:
            first = value
            while not isinstance(first, Weight):
                first = first.owner.operands[0]
            found[first.name.split(".")[0]] = numbers(value)
    return found


def test_the_reference_reads_what_is_there() -> None:
    module = mlp()
    assert matrices(module).keys() == {*BODY, "head"}
    np.testing.assert_array_equal(matrices(module)["up"], module.weights["up"].load())


def expect_zeros(before: Module, after: Module) -> None:
    """What was 0 is exactly 0, and not all else is."""
    old, new = matrices(before), matrices(after)
    for name in BODY:
        zeros = old[name] == 0
        assert zeros.mean() == pytest.approx(0.5, abs=0.01)
        assert not new[name][zeros].any(), name
        assert (new[name][~zeros] != 0).mean() > 0.2, name
    assert np.isfinite(interpret(after, "forward", [X[:4]])[0]).all()


@pytest.mark.parametrize("method", ["rtn", "clip", "gptq", "gptq order=false clip=true"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_keeps_zeros(scheme: str, method: str) -> None:
    prune = "prune{method=wanda sparsity=0.5}"
    expect_zeros(ran(prune), ran(f"{prune},quantize{{scheme={scheme} method={method}}},dce"))


@pytest.mark.parametrize("options", ["w4a16 group=32 zero=true", "w8a16 zero=true", "w3a16 group=32", "fp8 group=32"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("prune", ["prune", "prune{method=sparsegpt group=8}", "prune{method=alps pattern=2:4}"])
def test_options_of_schemes_keep_zeros(options: str, method: str, prune: str) -> None:
    expect_zeros(ran(prune), ran(f"{prune},quantize{{scheme={options} layers=body method={method}}},dce"))


@pytest.mark.parametrize("middle", ["awq{scheme=w4a16 group=32}", "smooth", "awq,smooth"])
def test_scales_of_channels_keep_zeros(middle: str) -> None:
    prune = "prune{method=wanda}"
    expect_zeros(ran(prune), ran(f"{prune},{middle},quantize{{scheme=w4a16 group=32}},dce"))
    expect_zeros(ran(f"{middle},{prune}"), ran(f"{middle},{prune},quantize{{scheme=w4a16 group=32}},dce"))


@pytest.mark.parametrize("outliers", ["outlier-columns{inputs=false}", "outlier-columns", "outlier-weights"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_what_is_left_of_outliers_keeps_zeros(outliers: str, method: str) -> None:
    prune = "prune{method=wanda}"
    quantize = f"quantize{{scheme=w4a16 group=32 layers=body method={method}}}"
    before, after = ran(prune), ran(f"{prune},{outliers},{quantize},dce")
    rests = {n.split(".")[0]: op for op in after.ops(ops.Dequantize) if ".rest." in (n := op.codes.name)}
    assert rests.keys() >= set(BODY)
    for name in BODY:
        zeros = matrices(before)[name] == 0
        assert not numbers(rests[name].result)[zeros].any()
    want, got = (interpret(m, "forward", [X[:8]])[0] for m in (before, after))
    assert np.linalg.norm(got - want) < 0.3 * np.linalg.norm(want)


def test_mixed_schemes_keep_zeros() -> None:
    prune = "prune{method=wanda}"
    mixed = 'quantize-mixed{bits=5 candidates=[w8a16,"w4a16 group=32"] method=gptq tokens=64}'
    expect_zeros(ran(prune), ran(f"{prune},{mixed},dce"))


def test_a_quantized_weight_is_not_pruned() -> None:
    module, ctx = mlp(), given([{"x": X}])
    Pipeline.parse("quantize{scheme=w8a16},prune").run(module, ctx=ctx)
    assert {skip.reason for skip in ctx.skips} >= {"its weight is computed"}
    assert not any(".pruned" in name for name in module.weights)
