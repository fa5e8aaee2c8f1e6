"""What cannot be compiled is refused by name, through the whole of ``tilewright.compile``, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tilewright
from tests.zoo import ZOO
from tilewright import frontend
from tilewright.codegen import link
from tilewright.codegen.target import TargetError
from tilewright.ir import CheckpointError, CodegenError, ParseError, PassError, TraceError, UnsupportedError
from tilewright.runtime.errors import ArtifactError, InputError

SMALL_LM = Path(__file__).parents[2] / "tests" / "models" / "small-lm"
HERE = Path(__file__).name


def line_of(mark: str) -> str:
    """``FILE:LINE`` of the line of this file that ends with ``# mark``."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if line.endswith(f"# {mark}"))
    return f"{HERE}:{number}"


class Outer(nn.Module):
    """Has the module that is refused two levels down."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), inner])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # branch
            return x.relu()
        return x


class Loop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().max().item())):  # loop
            x = x / 2
        return x


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x).real  # unknown


class Selection(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]  # selection


class Attribute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.cache = x  # attribute
        return x * 2


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)  # noise


class Numpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.from_numpy(np.tanh(x.detach().numpy()))  # numpy


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(4, 8)  # fixed


MODULES: list[tuple[type[nn.Module], type[Exception], str, list[str]]] = [
    (Branch, TraceError, "branch", ["branch depends on tensor values: if x.sum() > 0:", "torch.where"]),
    (Loop, TraceError, "loop", ["reads tensor values", "torch.where"]),
    (Unknown, UnsupportedError, "unknown", ["fft"]),
    (Selection, UnsupportedError, "selection", ["shape depends on data", "mask"]),
    (Attribute, TraceError, "attribute", ["cache"]),
    (Noise, UnsupportedError, "noise", ["rand"]),
    (Numpy, TraceError, "numpy", ["numpy inside forward", "torch function"]),
    (Fixed, TraceError, "fixed", ["B"]),
]


@pytest.mark.parametrize(("kind", "error", "mark", "parts"), MODULES, ids=[row[2] for row in MODULES])
def test_modules(kind: type[nn.Module], error: type[Exception], mark: str, parts: list[str], tmp_path: Path) -> None:
    model = Outer(kind()).eval()
    with pytest.raises(error) as caught:
        tilewright.compile(model, (torch.randn(4, 8),), dynamic={"x": {0: "B"}}, out=tmp_path / "out")
    message = str(caught.value)
    assert "layers.1" in message
    assert line_of(mark) in message
    for part in parts:
        assert part in message
    assert len(message) < 1000, "a message is for reading"
    assert list(tmp_path.iterdir()) == []


class Net(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "target": ({"target": "pentium"}, TargetError, r"unknown CPU architecture 'pentium'; known: native, x86-64-v3"),
    "feature": ({"target": "cpu{arch=x86-64-v3 features=+mmx9}"}, TargetError, r"unknown feature 'mmx9'.*known: .*avx"),
    "key": ({"target": "cpu{core=1}"}, TargetError, r"unknown key 'core'.*cpu takes arch and features"),
    "pass": ({"passes": "clean,inline"}, PassError, r"column 7: .* named 'inline'; there are .*canonicalize.*O2"),
    "option": ({"passes": "kv-layout{size=3}"}, ParseError, r"kv-layout has no option 'size'; it has .*length"),
    "value": ({"passes": "quantize{layers=tail}"}, ParseError, r"option layers of quantize: expected one of all, head"),
    "scheme": ({"passes": "quantize{scheme=w5a16}"}, PassError, r"no scheme .w5a16. .did you mean.*there are w8a16"),
    "text": ({"passes": "quantize{scheme=w8a16"}, ParseError, r"line 1, column \d+"),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_arguments(what: str) -> None:
    options, error, message = ARGUMENTS[what]
    with pytest.raises(error, match=message):
        tilewright.compile(Net(), (torch.ones(2, 3),), **options)


def test_example_inputs_are_needed() -> None:
    with pytest.raises(TraceError, match=r"Net needs example inputs"):
        tilewright.compile(Net())


def test_dynamic_axes_must_exist() -> None:
    with pytest.raises(TraceError, match=r"y.*x|x.*y"):
        tilewright.compile(Net(), (torch.ones(2, 3),), dynamic={"y": {0: "B"}})


def test_capacity_must_be_positive(tmp_path: Path) -> None:
    for length in (0, -1):
        with pytest.raises(PassError, match=f"max_length: length must be positive, got {length}"):
            tilewright.compile(SMALL_LM, max_length=length, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- folders -----------------------------------------------------------------------------------------------------


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def not_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x80\x04\x95 a pickle by another name")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def unknown_family(folder: Path) -> None:
    change_config(folder, model_type="quantum", architectures=["QuantumForCausalLM"])


def code_of_its_own(folder: Path) -> None:
    change_config(folder, model_type="own", auto_map={"AutoModelForCausalLM": "modeling.Own"})
    (folder / "modeling.py").write_text("raise SystemExit('the code of the folder was run')\n")


def wider(folder: Path) -> None:
    change_config(folder, hidden_size=320)


def deeper(folder: Path) -> None:
    change_config(folder, num_hidden_layers=7)


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


FOLDERS: dict[Callable[[Path], None], list[str]] = {
    only_pickle: ["pytorch_model.bin", "can run code", "save_pretrained"],
    truncated: ["model.safetensors", "truncated"],
    not_safetensors: ["model.safetensors", "not a safetensors file"],
    no_weights: ["has no safetensors file", "config.json"],
    no_config: ["config.json"],
    unknown_family: ["quantum"],
    code_of_its_own: ["own"],
    wider: ["model.embed_tokens.weight", "320", "256"],
    deeper: ["lacks", "model.layers.6."],
}


@pytest.mark.parametrize("damage", FOLDERS, ids=lambda f: f.__name__)
def test_folders(damage: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(SMALL_LM, folder)
    damage(folder)
    with pytest.raises((CheckpointError, UnsupportedError)) as caught:
        tilewright.compile(folder, out=tmp_path / "out")
    for part in FOLDERS[damage]:
        assert part in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere is not a folder"):
        tilewright.compile(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"nowhere: not a folder that can be opened"):
        tilewright.load(tmp_path / "nowhere")


# ---- where it may be written, and with what ----------------------------------------------------------------------


def test_what_is_not_an_artifact_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for name in ("thesis", "file"):
        with pytest.raises(ArtifactError, match=f"{name}: exists and is not an artifact.*another path"):
            tilewright.compile(Net(), (torch.ones(2, 3),), out=tmp_path / name)
    compiled = tilewright.compile(Net(), (torch.ones(2, 3),))
    with pytest.raises(ArtifactError, match="thesis: exists and is not an artifact"):
        compiled.save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "a file"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_missing_c_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(link.shutil, "which", lambda name: None)
    with pytest.raises(CodegenError, match=r"no C compiler was found; install gcc or clang"):
        tilewright.compile(Net(), (torch.ones(2, 3),), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_temporary_folders_go_when_a_compilation_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(link.shutil, "which", lambda name: None)
    with pytest.raises(CodegenError):
        tilewright.compile(Net(), (torch.ones(2, 3),))
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    compiled = tilewright.compile(Net(), (torch.ones(2, 3),))
    assert len(list(tmp_path.iterdir())) == 1
    del compiled
    assert list(tmp_path.iterdir()) == []


# ---- calls -------------------------------------------------------------------------------------------------------


def test_calls_are_checked_before_anything_runs() -> None:
    compiled = tilewright.compile(Net(), (torch.ones(2, 3),), dynamic={"x": {0: ("B", 1, 5)}})
    np.testing.assert_array_equal(compiled(np.ones((5, 3), np.float32)), 2)
    with pytest.raises(InputError, match=r"x\): expected .*got"):
        compiled(np.ones((2, 4), np.float32))
    with pytest.raises(InputError, match=r"dim B: expected a size from 1 to 5, got 6"):
        compiled(np.ones((6, 3), np.float32))
    with pytest.raises(InputError, match=r"x\): expected dtype float32, got dtype float64"):
        compiled(np.ones((2, 3)))
    with pytest.raises((InputError, tilewright.TilewrightError), match=r"takes 1 inputs, got 2"):
        compiled(np.ones((2, 3), np.float32), np.ones(1))
    with pytest.raises(InputError, match=r"'y'|y\b"):
        compiled(y=np.ones((2, 3), np.float32))
    with pytest.raises(InputError, match=r"prefill.*kv-layout"):
        compiled.generate([[1]], 1)


def test_a_language_model_without_a_cache_says_so() -> None:
    compiled = tilewright.compile(frontend.trace(ZOO["llama"].model()), passes="clean,fusions,kernels")
    assert compiled.program.entries == ["forward"]
    with pytest.raises(InputError, match=r"prefill.*compile the model with a kv-layout pass"):
        compiled.generate([[1, 2]], 2)
