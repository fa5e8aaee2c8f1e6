"""The script that makes the evaluation model: growing keeps the function nearly, training goes on where it was stopped."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
SMALL_LM = ROOT / "tests" / "models" / "small-lm"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``examples/train_eval_lm.py``, imported as it imports its sibling."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import train_eval_lm

    return train_eval_lm


def losses(model: LlamaForCausalLM) -> float:
    text = (ROOT / "tests" / "zoo.py").read_text()[:1500]
    ids = AutoTokenizer.from_pretrained(SMALL_LM)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def test_a_grown_model_is_deeper_wider_and_nearly_the_same(script: ModuleType) -> None:
    small = LlamaForCausalLM.from_pretrained(SMALL_LM, dtype=torch.float32)
    grown = script.grow(small, script.Recipe())
    assert (grown.config.num_hidden_layers, grown.config.intermediate_size) == (18, 768)
    assert 14e6 < grown.num_parameters() < 16e6
    once = script.grow(small, script.Recipe(copies=1))
    assert losses(once) == pytest.approx(losses(small), rel=1e-5), "more neurons alone change nothing"
    assert losses(grown) < losses(small) + 2 < math.log(4096)


def test_training_goes_on_where_it_was_stopped(script: ModuleType, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 4096, 5000)
    recipe = script.Recipe(copies=1, batch_tokens=512)

    def weights(name: str, *stops: int) -> torch.Tensor:
        for steps in stops:
            model = script.grow(LlamaForCausalLM.from_pretrained(SMALL_LM, dtype=torch.float32), recipe)
            args = Namespace(steps=4, minutes=0, checkpoint_minutes=60)
            if steps < 4:  # as if killed: the last checkpoint is that of an earlier step
                args = Namespace(steps=4, minutes=0, checkpoint_minutes=-1)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(script, "share", lambda p, a, steps=steps: p.step / 4 if p.step < steps else 1)
                    progress = script.train(model, script.windows(ids, recipe), recipe, tmp_path / name, args)
            else:
                progress = script.train(model, script.windows(ids, recipe), recipe, tmp_path / name, args)
            assert progress.step == steps
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights("stopped", 2, 4), weights("whole", 4))


def test_texts_are_apart(script: ModuleType) -> None:
    text = script.read_text()
    parts = [set(getattr(text, name)) for name in ("training", "validation", "calibration")]
    assert all(parts)
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]


def test_the_record_is_of_such_a_model(script: ModuleType) -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "eval_lm.json").read_text())
    assert record["recipe"].items() >= {"copies": 3, "intermediate": 768}.items()
    assert record["parameters"] == 14_624_000
    assert record["tokens_seen"] == record["steps"] * record["recipe"]["batch_tokens"]
    assert {"perplexity", "window", "stride"} <= record["validation"].keys()
