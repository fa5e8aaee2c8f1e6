"""Bisection names the pass, the operation and its location; kernels are compared one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from tilewright.bisect import KernelRun, bisect, bisect_kernels, difference, kernel_runs, random_inputs
from tilewright.ir import ArraySource, Module, ops, parse_module, print_module
from tilewright.passes import Pass, PassContext, Pipeline

TEXT = """
module @m {
  dim B : 1..8
  dim S : 1..64
  weight @up : tensor<8x4xf32>
  weight @down : tensor<4x8xf32>
  func @forward(%x: tensor<BxSx4xf32>) {
    %0 = nn.linear(%x, @up) : tensor<BxSx8xf32> loc("mlp.up" "mlp.py":3)
    %1 = core.sigmoid(%0) : tensor<BxSx8xf32> loc("mlp.act" "mlp.py":4)
    %2 = core.mul(%0, %1) : tensor<BxSx8xf32> loc("mlp.act" "mlp.py":4)
    %3 = nn.linear(%2, @down) : tensor<BxSx4xf32> loc("mlp.down" "mlp.py":5)
    %4 = core.add(%x, %3) : tensor<BxSx4xf32> loc("block" "block.py":9)
    return([%4])
  }
}
"""


@dataclass(frozen=True)
class Halve(Pass):
    """Breaks the module: half of what the activation gives."""

    name: ClassVar[str] = "halve"

    def run(self, module: Module, ctx: PassContext) -> bool:
        for op in module.ops(ops.Silu):
            function = op.parent
            assert function is not None
            users = list(op.result.users)
            half = ops.Full((), 0.5, op.result.dtype, loc=op.loc)
            new = ops.Mul(op.result, half.result, loc=op.loc)
            at = function.body.index(op) + 1
            function.insert(at, half)
            function.insert(at + 1, new)
            for user in users:
                user.replace_operand(op.result, new.result)
        return True


def sample() -> Module:
    module, rng = parse_module(TEXT), np.random.default_rng(0)
    for w in module.weights.values():
        w.source = ArraySource(rng.normal(size=[int(d) for d in w.shape]).astype(np.float32))
    return module


def pipeline(*passes: Pass) -> Pipeline:
    return Pipeline((*Pipeline.parse("canonicalize,cse").passes, *passes, *Pipeline.parse("dce").passes))


def test_a_sound_pipeline_has_no_culprit() -> None:
    module = sample()
    before = print_module(module)
    assert bisect(module, "clean,fusions,fuse,plan-memory", random_inputs(module, 16)) is None
    assert print_module(module) == before


def test_the_pass_and_the_operation_are_named() -> None:
    module = sample()
    culprit = bisect(module, pipeline(Halve()), random_inputs(module, 16))
    assert culprit is not None
    assert (culprit.stage, culprit.name, culprit.before) == ("pass", "halve", ("canonicalize", "cse"))
    assert (culprit.op, culprit.loc and culprit.loc.line) == ("core.mul", 4)
    assert culprit.error > 0.01
    assert "pass halve (after canonicalize, cse): the result differs by" in str(culprit)
    assert "first at core.mul, module mlp.act, mlp.py:4: differs by 0.5" in str(culprit)


def test_the_tolerance_counts() -> None:
    module = sample()
    assert bisect(module, pipeline(Halve()), random_inputs(module, 16), tolerance=10.0) is None


def test_quantization_is_found_at_its_layer() -> None:
    module = sample()
    culprit = bisect(module, "canonicalize,quantize", random_inputs(module, 16), tolerance=1e-4)
    assert culprit is not None
    assert (culprit.name, culprit.op, culprit.loc and culprit.loc.module) == ("quantize", "nn.linear", "mlp.up")


def test_kernels() -> None:
    module = sample()
    inputs = random_inputs(module, 16)
    Pipeline.parse("clean,fuse").run(module)
    runs = kernel_runs(module, inputs)
    assert len(runs) == sum(1 for _ in module.functions["forward"].walk(ops.Call))
    assert all(run.dims == {"B": 2, "S": 16} for run in runs)

    def compiled(run: KernelRun) -> Sequence[Any]:
        return run.results

    def wrong(run: KernelRun) -> Sequence[Any]:
        return tuple(r + (run is not runs and r.shape[-1] == 4) for r in run.results)

    assert bisect_kernels(module, inputs, compiled) is None
    culprit = bisect_kernels(module, inputs, wrong)
    assert culprit is not None
    assert culprit.stage == "kernel"
    assert culprit.loc is not None
    assert culprit.loc.module in ("mlp.down", "block")


@pytest.mark.parametrize(
    ("a", "b", "want"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, -2.0], [1.0, -1.0], 0.5),
        ([0.0], [0.25], 0.25),
        ([np.nan, 1.0], [np.nan, 1.0], 0.0),
        ([np.nan, 1.0], [0.0, 1.0], np.inf),
        ([1.0], [np.inf], np.inf),
        ([-np.inf, 4.0], [-np.inf, 3.0], 0.25),
        ([1.0], [1.0, 1.0], np.inf),
        ([], [], 0.0),
    ],
)
def test_difference(a: list[float], b: list[float], want: float) -> None:
    assert difference(np.array(a), np.array(b)) == want


def test_integers_and_flags() -> None:
    assert difference(np.array([3, 4]), np.array([3, 2])) == 0.5
    assert difference(np.array([True, False]), np.array([True, False])) == 0.0
