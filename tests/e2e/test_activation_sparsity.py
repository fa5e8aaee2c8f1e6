"""A trained language model with sparse activations, through the whole compiler: the tokens that the interpreter gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tilewright
from tilewright import Tokenizer
from tilewright.bisect import copy_of
from tilewright.frontend import trace_folder
from tilewright.ir import Module, interpret, ops
from tilewright.passes.base import PassContext
from tilewright.passes.pipeline import Pipeline

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "models" / "small-lm"
CALIBRATION, HELD_OUT = ROOT / "passes" / "pipeline.py", ROOT / "tests" / "zoo.py"  # it was trained on neither
NEW, LENGTH = 24, 64
Array = np.ndarray[Any, Any]


def windows(path: Path, count: int, length: int) -> Array:
    ids = Tokenizer(FOLDER).encode(path.read_text())
    return np.array(ids[: count * length]).reshape(count, length)


@pytest.fixture(scope="module")
def traced() -> Module:
    return trace_folder(FOLDER, dtype="f32")


@pytest.mark.parametrize(
    ("options", "after"),
    [("method=wina sparsity=0.4", ""), ("method=chess sparsity=0.5", "quantize{scheme=w8a16},")],
)
def test_tokens_are_those_of_the_interpreter(options: str, after: str, traced: Module) -> None:
    passes = f"clean,fusions,sparsify-activations{{{options}}},{after}"
    calibration = windows(CALIBRATION, 4, 64)
    compiled = tilewright.compile(
        copy_of(traced), passes=f"{passes}cache,kernels", calibration=calibration, max_length=LENGTH
    )
    prompts = windows(HELD_OUT, 3, 17)
    made = np.array(compiled.generate(prompts, NEW))
    module = copy_of(traced)
    Pipeline.parse(f"{passes}dce").run(module, ctx=PassContext({"calibration": [{"input_ids": calibration}]}))
    assert any(isinstance(op, ops.Threshold) for op in module.functions["forward"].body)
    ids = np.concatenate([prompts, made], axis=1)
    logits = interpret(module, "forward", [ids[:, :-1]])[0][:, 16:]
    np.testing.assert_array_equal(logits.argmax(-1), made)
