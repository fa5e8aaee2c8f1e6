"""Methods on a trained language model: on text that none of them saw they keep more of it than rounding does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tilewright import Tokenizer
from tilewright.bisect import copy_of
from tilewright.frontend import trace_folder
from tilewright.ir import Module, interpret
from tilewright.passes.base import PassContext
from tilewright.passes.pipeline import Pipeline

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "models" / "small-lm"
CALIBRATION, HELD_OUT = ROOT / "passes" / "pipeline.py", ROOT / "tests" / "zoo.py"  # it was trained on neither
Array = np.ndarray[Any, Any]


def windows(path: Path, count: int, length: int) -> Array:
    ids = Tokenizer(FOLDER).encode(path.read_text())
    return np.array(ids[: count * length]).reshape(count, length)


@pytest.fixture(scope="module")
def traced() -> Module:
    module = trace_folder(FOLDER, dtype="f32")
    Pipeline.parse("clean,fusions").run(module)
    return module


@pytest.fixture(scope="module")
def reference(traced: Module) -> Array:
    return log_probabilities(traced)


def log_probabilities(module: Module) -> Array:
    logits = interpret(module, "forward", [windows(HELD_OUT, 3, 96)])[0].astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def divergence(traced: Module, reference: Array) -> Any:
    """KL divergence from the model as it is, a token, of what a pipeline makes of it."""
    known: dict[str, float] = {}

    def measure(text: str) -> float:
        if text not in known:
            module = copy_of(traced)
            ctx = PassContext({"calibration": [{"input_ids": windows(CALIBRATION, 8, 96)}]})
            Pipeline.parse(f"{text},dce").run(module, ctx=ctx)
            got = log_probabilities(module)
            known[text] = float((np.exp(reference) * (reference - got)).sum(-1).mean())
        return known[text]

    return measure


@pytest.mark.parametrize(("options", "least"), [("scheme=w4a16 group=64", 0.6), ("scheme=w3a16 group=64", 0.6)])
def test_gptq_keeps_more_than_rounding(divergence: Any, options: str, least: float) -> None:
    plain = divergence(f"quantize{{{options} layers=body}}")
    assert divergence(f"quantize{{{options} layers=body method=gptq}}") < least * plain


@pytest.mark.parametrize("options", ["scheme=w4a16 group=64", "scheme=w3a16 group=64"])
def test_awq_keeps_more_than_rounding(divergence: Any, options: str) -> None:
    plain = divergence(f"quantize{{{options} layers=body}}")
    assert divergence(f"awq{{{options} steps=5 rows=128}},quantize{{{options} layers=body method=clip}}") < 0.95 * plain
