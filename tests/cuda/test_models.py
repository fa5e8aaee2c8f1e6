"""Whole models compiled for a GPU, run on the emulated device: the small model token by token, and the zoo (slow)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import tilewright
import tilewright.runtime.cuda as cuda
from tests.cuda.driver import fake_driver
from tests.cuda.emulator import quick_compiler
from tests.differential.test_compiled_zoo import check
from tests.zoo import ZOO
from tilewright.bisect import copy_of
from tilewright.frontend import trace_folder

TARGET = "cuda{arch=sm_90a}"
SMALL_LM = Path(__file__).parents[1] / "models" / "small-lm"
LAYERS, TOKENS, NEW = 2, 512, 5
PROMPTS = [[5, 200, 31, 77, 8, 9], [3, 400]]


@pytest.fixture(scope="module")
def cut(tmp_path_factory) -> Path:
    """The small model's first layers and most frequent tokens: an emulated device has less to do, and compiles no less."""
    folder = shutil.copytree(SMALL_LM, tmp_path_factory.mktemp("models") / "cut")
    config = json.loads((folder / "config.json").read_text())
    rows = config["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS, "vocab_size": TOKENS}))
    kept = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if layer is None or int(layer[1]) < LAYERS:
            kept[name] = weight[:TOKENS].clone() if len(weight) == rows else weight
    save_file(kept, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("passes", "dtype"), [("O2", "f32"), ("w4a8", "bf16")])
def test_the_small_models_tokens_are_those_of_the_cpu(passes, dtype, cut, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # kernels that are not optimized are not for others
    module, how = trace_folder(cut, dtype=dtype), {"passes": passes, "max_length": 32}
    with quick_compiler():
        run = tilewright.compile(copy_of(module), **how, target=TARGET, out=tmp_path / "gpu")
    assert run.report.fallbacks == []
    assert {k["backend"] for k in run.report.kernels} == {"cuda.linear", "cuda.attention", "cuda.loops"}
    assert all(used["registers"] > 0 for k in run.report.kernels for used in k["resources"].values())
    monkeypatch.setattr(cuda, "LIBRARY", str(fake_driver(run.path, tmp_path)))
    want = tilewright.compile(module, **how).generate(PROMPTS, NEW)
    with tilewright.load(run.path).session(batch=2) as session:
        assert session.generate(PROMPTS, NEW) == want
        assert session.generate(PROMPTS[:1], NEW, chunk=3) == want[:1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(name: str, tmp_path: Path, monkeypatch) -> None:
    """As ``tests/differential`` asks of a CPU: results within 1e-4 of eager PyTorch's, and its greedy tokens."""

    def load(path: Path) -> tilewright.Program:
        monkeypatch.setattr(cuda, "LIBRARY", str(fake_driver(path, tmp_path)))
        return tilewright.load(path)

    monkeypatch.setattr("tilewright.compiler.load", load)
    check(ZOO[name], TARGET)
