"""Whole models compiled for a GPU, run on the emulated device: the small model token by token, and the zoo (slow)."""

from __future__ import annotations

from pathlib import Path

import pytest

import tilewright
import tilewright.runtime.cuda as cuda
from tests.cuda.driver import fake_driver
from tests.differential.test_compiled_zoo import check
from tests.zoo import ZOO

TARGET = "cuda{arch=sm_90a}"
SMALL_LM = Path(__file__).parents[1] / "models" / "small-lm"
PROMPTS = ("def read_config(path):", "import os\n")


@pytest.mark.parametrize(("passes", "dtype"), [("O2", "f32"), ("w4a8", "bf16")])
def test_the_small_models_tokens_are_those_of_the_cpu(passes: str, dtype: str, tmp_path: Path, monkeypatch) -> None:
    how = {"passes": passes, "dtype": dtype, "max_length": 96}
    run = tilewright.compile(SMALL_LM, **how, target=TARGET, out=tmp_path / "gpu")
    assert run.report.fallbacks == []
    assert {k["backend"] for k in run.report.kernels} == {"cuda.linear", "cuda.attention", "cuda.loops"}
    assert all(used["registers"] > 0 for k in run.report.kernels for used in k["resources"].values())
    monkeypatch.setattr(cuda, "LIBRARY", str(fake_driver(run.path, tmp_path)))
    tokenizer = tilewright.Tokenizer(SMALL_LM)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    want = tilewright.compile(SMALL_LM, **how).generate(prompts, 12)
    with tilewright.load(run.path).session(batch=2) as session:
        assert session.generate(prompts, 12) == want
        assert session.generate(prompts[:1], 12, chunk=3) == want[:1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(name: str, tmp_path: Path, monkeypatch) -> None:
    """As ``tests/differential`` asks of a CPU: results within 1e-4 of eager PyTorch's, and its greedy tokens."""

    def load(path: Path) -> tilewright.Program:
        monkeypatch.setattr(cuda, "LIBRARY", str(fake_driver(path, tmp_path)))
        return tilewright.load(path)

    monkeypatch.setattr("tilewright.compiler.load", load)
    check(ZOO[name], TARGET)
