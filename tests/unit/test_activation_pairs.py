"""Thresholds in front of weights of every scheme: the zeros stay, and quantizing harms no more than it does alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.unit.test_calibration import given
from tests.unit.test_prune_pairs import X, mlp
from tilewright.ir import Module, interpret, ops
from tilewright.passes.formats import SCHEMES
from tilewright.passes.pipeline import Pipeline

METHODS = ("wina", "cats", "r-sparse rank=32")
RESULT = interpret(mlp(), "forward", [X])[0]


def ran(passes: str) -> tuple[Module, list[str]]:
    module, ctx = mlp(), given([{"x": X}])
    Pipeline.parse(f"{passes},dce").run(module, ctx=ctx)
    return module, [line for _, line in ctx.notes]


def harm(module: Module, want: Any = RESULT) -> float:
    return float(np.linalg.norm(interpret(module, "forward", [X])[0] - want) / np.linalg.norm(want))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_goes_behind(scheme: str, method: str) -> None:
    quantize = f"quantize{{scheme={scheme} layers=body only=[gate,up,down]}}"
    zeros = f"sparsify-activations{{method={method} sparsity=0.3}}"
    module, notes = ran(f"{zeros},{quantize}")
    sparse, _ = ran(zeros)
    thresholds = [op for op in module.functions["forward"].body if isinstance(op, ops.Threshold)]
    assert len(thresholds) == (1 if method == "cats" else 2)
    rounded = SCHEMES[scheme].activations is not None
    assert any("no kernel leaves out" in line for line in notes) == rounded
    alone = harm(ran(quantize)[0])
    assert harm(module, interpret(sparse, "forward", [X])[0]) < 2 * alone


@pytest.mark.parametrize("before", ["smooth", "awq{steps=2}", "prune{method=magnitude}", "outlier-columns{inputs=false}"])
def test_passes_in_front(before: str) -> None:
    zeros = "sparsify-activations{sparsity=0.3}"
    alone = ran(before)[0]
    module, _ = ran(f"{before},{zeros}")
    assert harm(module, interpret(alone, "forward", [X])[0]) < 2 * harm(ran(zeros)[0])
