"""The committed language model is complete and has learned; the script that makes it repeats itself."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.train_small_lm import Recipe, make_model, train

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "models" / "small-lm"


def test_folder_is_complete_and_small() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "training.json",
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 12 * 2**20


def test_record_agrees_with_the_model() -> None:
    record = json.loads((FOLDER / "training.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == record["parameters"]
    assert record["tokens_seen"] == record["recipe"]["steps"] * record["recipe"]["batch_tokens"]


def test_greedy_output_is_python() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    prompt = "class Node:\n    def __repr__(self):\n        return"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    written = tokenizer.decode(model.generate(ids, max_new_tokens=40)[0]).rsplit("\n", 1)[0]  # whole lines
    ast.parse(written)
    assert "self." in written.removeprefix(prompt)


def test_code_is_likelier_than_the_same_tokens_shuffled() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    text = "def total(items):\n    result = 0\n    for item in items:\n        result += item\n    return result\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    ordered_loss, shuffled_loss = (model(input_ids=row, labels=row).loss.item() for row in (ids, shuffled))
    assert ordered_loss < 4 < shuffled_loss - 2


def test_tokenizer_round_trips_any_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = "def f(x):\n\treturn 'naïve 東京 🙂'  # 1_000\r\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_training_depends_on_the_seed_alone() -> None:
    ids = np.random.default_rng(0).integers(0, 4096, 5000)

    def weights(seed: int) -> list[torch.Tensor]:
        recipe = Recipe(seed=seed, steps=4, batch_tokens=512)
        model = make_model(recipe, end=0, pad=1)
        train(model, ids, recipe, minutes=None)
        return list(model.parameters())

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.slow
def test_the_command_writes_the_folder_and_the_same_tokenizer(tmp_path: Path) -> None:
    out = tmp_path / "lm"
    subprocess.run([sys.executable, ROOT / "examples" / "train_small_lm.py", "--steps", "2", "--out", out], check=True)
    assert {path.name for path in out.iterdir()} == {path.name for path in FOLDER.iterdir()}
    assert list(tmp_path.iterdir()) == [out]
    new, committed = (json.loads((folder / "training.json").read_text()) for folder in (out, FOLDER))
    if new["data"] != committed["data"]:
        pytest.skip("another Python version: another text")
    assert (out / "tokenizer.json").read_bytes() == (FOLDER / "tokenizer.json").read_bytes()
