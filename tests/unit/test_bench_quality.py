"""The benchmark of quality: rows that parse, goals, the page, the rescaled model. Nothing long is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.quality.cli import measure, missing, read, write
from benchmarks.quality.goals import ENCODER_GOALS, GOALS, better, within
from benchmarks.quality.rescaling import CHANNELS, FACTOR, rescale
from benchmarks.quality.rows import BASE, ENCODER, REFERENCE, ROWS, Row
from benchmarks.quality.running import Settings
from benchmarks.quality.sentences import sentences
from benchmarks.quality.sparsity import SECTIONS, SPARSE_ROWS, counted
from benchmarks.quality.sparsity import page as sparse_page
from benchmarks.quality.table import page
from tilewright.ir import ArraySource, DType, PassError, parse_module
from tilewright.passes.pipeline import Pipeline

ROOT = Path(__file__).parents[2]
SMALL_LM = ROOT / "tests" / "models" / "small-lm"
EXACT = {"bytes": 100, "bits": 16.0, "kernels": "compiled", "perplexity": 20.0, "kl_mean": 0.0, "kl_p99": 0.0, "top1": 1.0}
WORSE = EXACT | {"perplexity": 20.3, "kl_mean": 0.01, "kernels": "interpreter: no kernel"}


@pytest.mark.parametrize("row", [*ROWS, *ENCODER, *SPARSE_ROWS], ids=lambda r: r.name)
def test_pipelines_parse(row: Row) -> None:
    names = [p.name for p in Pipeline.parse(row.pipeline).passes]
    assert "kv-layout" not in names
    assert "fuse" not in names


def test_names_are_unique_and_goals_are_about_rows() -> None:
    names = [r.name for r in ROWS]
    assert len(set(names)) == len(names)
    assert (REFERENCE, BASE) == ("f32", "bf16")
    assert {n for g in GOALS for n in g.needs} <= set(names)
    assert {n for g in ENCODER_GOALS for n in g.needs} <= {r.name for r in ENCODER}
    sparse = [r.name for r in SPARSE_ROWS]
    assert len(set(sparse)) == len(sparse)
    assert {n for s in SECTIONS for g in s.goals for n in g.needs} <= set(sparse)


def test_verdicts() -> None:
    rows = {"new": EXACT, "old": WORSE, BASE: EXACT, "failed": {"error": "no"}}
    assert better("", "new", "old").verdict(rows).startswith("**hit**: new perplexity 20.000, KL 0.00000; old")
    assert better("", "old", "new").verdict(rows).startswith("**missed**")
    assert within("", "old", 0.02).verdict(rows) == "**hit**: +1.50%"
    assert within("", "old", 0.01).verdict(rows) == "**missed**: +1.50%"
    assert better("", "absent", "failed").verdict(rows) == "not measured (absent, failed)"


def test_rows_are_measured_once_and_written_as_they_come(tmp_path: Path) -> None:
    settings, out = Settings(SMALL_LM), tmp_path / "quality.json"
    results = read(out, settings)
    assert (results["rows"], results["parameters"]) == ({}, 5278976)
    rows = [Row("f32"), Row("bf16", dtype="bf16"), Row("w8a8", "quantize{scheme=w8a8}")]

    def one(row: Row) -> dict[str, Any]:
        if row.name == "w8a8":
            raise PassError("cannot")
        return EXACT

    measure(rows, one, results["rows"], lambda: write(out, results, page))
    again = read(out, settings)
    assert again["rows"].keys() == {"f32", "bf16", "w8a8"}
    assert [r.name for r in missing(rows, again["rows"], False)] == ["w8a8"], "what failed is tried again"
    assert [r.name for r in missing([Row("f32", "cse")], again["rows"], False)] == ["f32"], "another pipeline"
    assert len(missing(rows, again["rows"], True)) == 3
    assert read(out, Settings(SMALL_LM, tokens=128))["rows"] == {}, "other settings: another table"
    text = (tmp_path / "quality.md").read_text()
    assert "| bf16 | 100 | 16.00 | 20.000 | +0.00% |" in text
    assert "| w8a8 | not run: PassError: cannot |" in text
    write(out, again, page)
    assert (tmp_path / "quality.md").read_text() == text


def test_what_the_interpreter_ran_is_marked() -> None:
    how = {"weights": "x", "tokens": 1, "window": 2, "stride": 1, "calibration_tokens": 1}
    results = {"settings": how, "parameters": 1, "rows": {"f32": EXACT, "bf16": WORSE}, "encoder": {}}
    assert "| bf16 * |" in page(results)


@pytest.mark.parametrize(("name", "made"), [("quality", page), ("sparsity", sparse_page)])
def test_the_committed_table_is_that_of_its_figures(name: str, made: Any) -> None:
    file = ROOT / "benchmarks" / "results" / f"{name}.json"
    assert made(json.loads(file.read_text())) == file.with_suffix(".md").read_text()


CODED = """module @m {
  weight @w : tensor<40x64x%s>
  weight @s : tensor<40x1xf32>
  func @forward(%%x: tensor<3x64xf32>) {
    %%0 = quant.dequantize(@w, @s) : tensor<40x64xf32>
    %%1 = nn.linear(%%x, %%0) : tensor<3x40xf32>
    return([%%1])
  }
}"""
DENSE = """module @m {
  weight @w : tensor<40x64x%s>
  func @forward(%%x: tensor<3x64x%s>) {
    %%1 = nn.linear(%%x, @w) : tensor<3x40x%s>
    return([%%1])
  }
}"""


@pytest.mark.parametrize(("dtype", "bits"), [(DType.i4, 4), (DType.i8, 8), (DType.bf16, 16), (DType.f32, 16)])
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_bytes_without_zeros_are_counted(dtype: DType, bits: int, group: int) -> None:
    kept = np.random.default_rng(0).uniform(size=(40, 64 // group)) < 0.5
    keep = np.repeat(kept, group, axis=1)
    module = parse_module(DENSE % ((dtype.value,) * 3) if dtype.is_float else CODED % dtype.value)
    module.weights["w"].source = ArraySource(np.where(keep, 3, 0).astype(dtype.np))
    word = 32 // bits
    words = keep.reshape(40, -1, word).any(-1)
    alone = int(keep.sum()) * bits // 8 + 40 * 64 // 8
    together = int(words.sum()) * word * bits // 8 + words.size // 8
    assert counted(module.weights["w"]) == min(40 * 64 * bits // 8, alone + 12, together + 12)


def test_a_rescaled_model_is_the_same_bit_by_bit(tmp_path: Path) -> None:
    rescale(SMALL_LM, tmp_path / "out")
    ids = torch.arange(5, 40)[None]
    want, got = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (SMALL_LM, tmp_path / "out"))
    assert torch.equal(want(ids).logits, got(ids).logits)
    for layer in range(6):
        ratio = (got.model.layers[layer].input_layernorm.weight / want.model.layers[layer].input_layernorm.weight).tolist()
        assert sorted(ratio) == [1.0] * (256 - CHANNELS) + [FACTOR] * CHANNELS


def test_sentences_are_english_and_do_not_overlap() -> None:
    first, second = sentences(200), sentences(200, skip=200)
    assert len(first) == len(second) == 200
    assert not set(first) & set(second)
    assert all(s[0].isupper() and s.endswith(".") and len(s.split()) >= 7 for s in first)
