"""Evaluation beside transformers and torch on the same windows; texts, calibration data and sensitivity."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import tilewright
from tilewright.calibration_data import Calibration
from tilewright.compiler import prepare
from tilewright.evaluation import cosines, evaluate, padded, scores
from tilewright.frontend import trace_folder
from tilewright.inspection import sensitivity_table
from tilewright.ir import Builder, DType, Function, Loc, Module, PassError, Return, TensorType, ops, sym
from tilewright.passes.pipeline import Pipeline
from tilewright.runtime.errors import ArtifactError
from tilewright.sensitivity import few, sensitivity
from tilewright.texts import TextError, check_vocabulary, token_ids, windows

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "models" / "small-lm"
TEXT = ROOT / "tests" / "zoo.py"  # a text that the model was not trained on
WINDOW, STRIDE, TOKENS = 64, 24, 480
Array = np.ndarray[Any, Any]


# ---- texts -------------------------------------------------------------------------------------------------------


def test_each_token_is_scored_once_with_context() -> None:
    ids = np.arange(100)
    rows = windows(ids, 16, 4)
    assert rows[:, -4:].ravel().tolist() == list(range(12, 100))
    assert windows(ids, 16, 4, most=21).shape == (5, 16)
    assert windows(ids[:16], 16, 15).shape == (1, 16)


@pytest.mark.parametrize(
    ("count", "window", "stride", "most", "message"),
    [(15, 16, 8, None, "15 tokens, a window needs 16"), (64, 16, 16, None, "stride 16 must be between 1 and"),
     (64, 16, 0, None, "stride 0"), (64, 16, 8, 7, "at most 7 tokens")],
)  # fmt: skip
def test_windows_that_make_no_sense_are_refused(count: int, window: int, stride: int, most: int, message: str) -> None:
    with pytest.raises(TextError, match=message):
        windows(np.arange(count), window, stride, most)


def test_texts_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "text"
    with pytest.raises(TextError, match="cannot be read"):
        token_ids(file, FOLDER)
    file.write_text(" \n")
    with pytest.raises(TextError, match="the text is empty"):
        token_ids(file, FOLDER)
    file.write_bytes(b"ab\xff")
    with pytest.raises(TextError, match="byte 2 is not UTF-8"):
        token_ids(file, FOLDER)
    file.write_text("def f")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        token_ids(file, tmp_path)
    with pytest.raises(TextError, match="no tokenizer"):
        token_ids(file, None)
    for wrong in ([], [[1, 2]], [1.5]):
        with pytest.raises(TextError, match="token ids are a row of integers"):
            token_ids(wrong, None)
    with pytest.raises(TextError, match="token ids from 3 to 9, the model has 9 tokens"):
        check_vocabulary(np.array([3, 9]), 9, "m")


# ---- figures -----------------------------------------------------------------------------------------------------


def test_scores_are_those_of_torch() -> None:
    rng = np.random.default_rng(0)
    mine, theirs = (4 * rng.standard_normal((3, 5, 50)).astype("f4") for _ in range(2))
    targets = rng.integers(0, 50, (3, 5))
    got = scores(mine, theirs, targets)
    p, q = (torch.from_numpy(x).double().log_softmax(-1).flatten(0, 1) for x in (mine, theirs))
    at = torch.from_numpy(targets).flatten()
    np.testing.assert_allclose(got.loss, F.nll_loss(p, at, reduction="none"), rtol=1e-5)
    np.testing.assert_allclose(got.reference, F.nll_loss(q, at, reduction="none"), rtol=1e-5)
    np.testing.assert_allclose(got.kl, F.kl_div(p, q, reduction="none", log_target=True).sum(-1), rtol=1e-4)
    assert (got.same == (p.argmax(-1) == q.argmax(-1)).numpy()).all()


@pytest.fixture(scope="module")
def ids() -> Array:
    return np.array(AutoTokenizer.from_pretrained(FOLDER)(TEXT.read_text()).input_ids[: TOKENS + WINDOW])


@pytest.fixture(scope="module")
def expected(ids: Array) -> torch.Tensor:
    """transformers' logits in f32 at the scored positions: [tokens, V]."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager").eval()
    rows = torch.from_numpy(np.stack([ids[s : s + WINDOW] for s in range(0, len(ids) - WINDOW + 1, STRIDE)]))
    with torch.no_grad():
        return model(rows).logits[:, -STRIDE - 1 : -1].flatten(0, 1).double()


def scored(ids: Array) -> torch.Tensor:
    count = (len(ids) - WINDOW) // STRIDE + 1
    return torch.from_numpy(ids[WINDOW - STRIDE : WINDOW - STRIDE + count * STRIDE])


@pytest.mark.parametrize("cached", [False, True], ids=["forward", "prefill and decode"])
def test_perplexity_is_that_of_transformers(ids: Array, expected: torch.Tensor, cached: bool) -> None:
    options: dict[str, Any] = {"window": WINDOW, "stride": STRIDE}
    model = tilewright.compile(FOLDER, dtype="f32", max_length=WINDOW) if cached else FOLDER
    got = evaluate(model, ids, dtype="f32", **options)
    want = math.exp(F.cross_entropy(expected, scored(ids)).item())
    assert got.tokens == len(expected)
    assert got.perplexity == pytest.approx(want, rel=1e-5)
    assert (got.window, got.stride, got.reference, got.kl_mean) == (WINDOW, STRIDE, None, None)


def test_distances_are_those_of_torch(ids: Array, expected: torch.Tensor) -> None:
    """A compressed model against the compiled reference, beside torch on both their logits."""
    small = tilewright.compile(FOLDER, dtype="f32", passes="w8a8", max_length=WINDOW)
    got = evaluate(small, ids, reference=FOLDER, window=WINDOW, stride=STRIDE, dtype="f32")
    module = trace_folder(FOLDER, dtype="f32")
    plain = tilewright.compile(module, passes="clean,fusions,quantize{scheme=w8a8},kernels")
    mine = torch.from_numpy(plain(windows(ids, WINDOW, STRIDE))[:, -STRIDE - 1 : -1]).double().flatten(0, 1)
    kl = F.kl_div(mine.log_softmax(-1), expected.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert got.perplexity == pytest.approx(F.cross_entropy(mine, scored(ids)).exp().item(), rel=1e-3)
    assert got.reference_perplexity == pytest.approx(F.cross_entropy(expected, scored(ids)).exp().item(), rel=1e-5)
    assert got.kl_mean == pytest.approx(kl.mean().item(), rel=0.1)
    assert got.kl_p99 == pytest.approx(torch.quantile(kl, 0.99).item(), rel=0.2)
    assert got.top1 == pytest.approx((mine.argmax(-1) == expected.argmax(-1)).double().mean().item(), abs=0.02)
    assert 0 < got.kl_mean < got.kl_p99


def test_a_model_agrees_with_itself(ids: Array) -> None:
    got = evaluate(FOLDER, ids, reference=FOLDER, window=WINDOW, stride=STRIDE, max_tokens=2 * STRIDE)
    assert got.tokens == 2 * STRIDE
    assert got.perplexity == got.reference_perplexity
    assert (got.kl_mean, got.top1) == (0, 1)
    assert "same top token 100.00%" in got.summary()


def test_models_that_cannot_be_compared_are_refused_before_any_work(ids: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilewright.compiler.lower", lambda *a, **k: pytest.fail("compiled"))
    with pytest.raises(TextError, match="at most 512 tokens"):
        evaluate(FOLDER, ids, window=513)
    with pytest.raises(TextError, match="stride"):
        evaluate(FOLDER, ids, window=8, stride=8)
    with pytest.raises(TextError, match="0 to 4095"):
        evaluate(FOLDER, np.append(ids, 4096), window=8)
    other = language_model(vocabulary=100)
    with pytest.raises(TextError, match=r"4096 tokens, the reference m has 100: their"):
        evaluate(FOLDER, ids, reference=other)
    with pytest.raises(TextError, match=r"without a folder.*give token ids"):
        evaluate(language_model(), TEXT, window=8)


# ---- a module small enough for the interpreter -------------------------------------------------------------------


def language_model(vocabulary: int = 64, seed: int = 0) -> Module:
    """A table of tokens, two layers, a head: [B, S] -> [B, S, V]. No token sees another one."""
    rng = np.random.default_rng(seed)
    module = Module("m", dims={"B": (1, 64), "S": (1, 64)})
    module.meta |= {"task": "causal-lm", "vocab_size": str(vocabulary), "outputs": '["logits"]', "logits": "logits"}
    function = module.add(Function("forward"))
    x = function.arg("input_ids", TensorType((sym("B"), sym("S")), DType.i64))
    b = Builder(function)
    x = b(ops.Embedding, x, module.constant(rng.standard_normal((vocabulary, 32)).astype("f4"), "table"))
    for name, size, out in (("first", 1.0, 32), ("second", 0.05, 32), ("head", 0.5, vocabulary)):
        weight = module.constant(size * rng.standard_normal((out, 32)).astype("f4"), name)
        with b.at(Loc(f"model.{name}")):
            y = b(ops.Linear, x, weight)
            x = y if name == "head" else b(ops.Add, x, b(ops.Tanh, y))
    b.insert(Return((x,)))
    return module


SAMPLES = [{"input_ids": np.random.default_rng(1).integers(0, 64, (4, 32))}]


def test_a_layer_alone_changes_what_it_says() -> None:
    module = language_model()
    pipeline = Pipeline.parse("quantize{scheme=w8a8 layers=head},quantize{scheme=w3a16 group=32 layers=body},fuse")
    rows = sensitivity(module, pipeline, SAMPLES)
    assert sorted(r["layer"] for r in rows) == ["model.first", "model.head", "model.second"]
    assert [r["kl"] for r in rows] == sorted((r["kl"] for r in rows), reverse=True)
    assert rows[0]["layer"] == "model.first", "three bits, and large"
    want = prepared_outputs(module, "quantize{scheme=w3a16 group=32 only=first}")
    base = prepared_outputs(module, "")
    [first] = [r for r in rows if r["layer"] == "model.first"]
    error = np.sqrt(((want - base) ** 2).sum() / (base**2).sum())
    assert first["error"] == pytest.approx(error, rel=1e-5)
    assert not any(w.startswith("first.") for w in module.weights), "the module stays as it is"


def test_a_layer_is_compressed_by_the_pass_that_took_it() -> None:
    pipeline = Pipeline.parse("quantize{scheme=w2a16 group=32 only=second},quantize{scheme=w8a16 layers=body}")
    rows = sensitivity(language_model(), pipeline, SAMPLES)
    alone = sensitivity(language_model(), Pipeline.parse("quantize{scheme=w8a16 layers=body}"), SAMPLES)
    errors, eight = ({r["layer"]: r["error"] for r in found} for found in (rows, alone))
    assert errors["model.first"] == eight["model.first"]
    assert errors["model.second"] > 5 * eight["model.second"]


def prepared_outputs(module: Module, passes: str) -> Array:
    from tilewright.bisect import copy_of
    from tilewright.ir import interpret

    copy = copy_of(module)
    Pipeline.parse(passes).run(copy) if passes else None
    return interpret(copy, "forward", SAMPLES[0])[0].astype(np.float64)


def test_sensitivity_has_the_numbers_that_the_method_chose() -> None:
    """Of a method that needs data: a layer alone is what it was among the others."""
    module, options = language_model(), {"calibration": SAMPLES}
    pipeline = Pipeline.parse("quantize{scheme=w2a16 group=32 method=gptq layers=body}")
    plain = Pipeline.parse("quantize{scheme=w2a16 group=32 layers=body}")
    chosen, rounded = (
        {r["layer"]: r["error"] for r in sensitivity(module, p, SAMPLES, options)} for p in (pipeline, plain)
    )
    assert chosen.keys() == rounded.keys() == {"model.first", "model.second"}
    assert chosen["model.first"] < rounded["model.first"]


def test_the_table_is_in_the_report() -> None:
    data = SAMPLES[0]["input_ids"]
    done = tilewright.compile(language_model(), passes="quantize{scheme=w8a16},fuse,plan-memory",
                              calibration=data, sensitivity=True)  # fmt: skip
    rows = done.report.sensitivity
    assert len(rows) == 3
    assert f"  sensitive  {rows[0]['layer']}: error" in done.report.summary()
    text = sensitivity_table(done.report)
    assert [line.split()[-1] for line in text.splitlines()[1:]] == [r["layer"] for r in rows]


def test_sensitivity_is_refused_without_what_it_needs() -> None:
    with pytest.raises(PassError, match="no pass that compresses"):
        tilewright.compile(language_model(), passes="fuse,plan-memory", sensitivity=True)
    with pytest.raises(TextError, match="measured on calibration data"):
        tilewright.compile(language_model(), passes="quantize,fuse,plan-memory", sensitivity=True)


def test_few_rows_are_enough() -> None:
    batches = [{"x": np.zeros((4, 8))}, {"x": np.zeros((4, 8))}]
    assert [b["x"].shape for b in few(batches, 48)] == [(4, 8), (2, 8)]
    assert [b["x"].shape for b in few(batches, 1)] == [(1, 8)]


# ---- calibration -------------------------------------------------------------------------------------------------


def test_a_text_becomes_windows_that_follow_each_other() -> None:
    module = trace_folder(FOLDER)
    batches = Calibration(TEXT, FOLDER, tokens=3000, window=100).inputs(module)
    assert {tuple(b) for b in batches} == {("input_ids",)}
    assert [b["input_ids"].shape for b in batches] == [(20, 100), (10, 100)]
    joined = np.concatenate([b["input_ids"].ravel() for b in batches])
    assert joined.tolist() == token_ids(TEXT, FOLDER)[:3000].tolist()


def test_token_ids_and_inputs_by_name_are_taken_as_they_are() -> None:
    module = language_model()
    rows = np.arange(64).reshape(4, 16)
    for given in (rows, rows.tolist(), [{"input_ids": rows}]):
        [batch] = Calibration(given, None).inputs(module)
        assert batch["input_ids"].tolist() == rows.tolist()
        assert batch["input_ids"].dtype == np.int64
    [batch] = Calibration(np.arange(50), None, window=16).inputs(module)
    assert batch["input_ids"].tolist() == np.arange(48).reshape(3, 16).tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [([], "empty"), (3, "path of a text, token ids, or a list"), ([{"x": np.zeros((1, 2), int)}], r"takes input_ids"),
     ([{"input_ids": np.zeros((1, 2))}], r"calibration\[0\]\['input_ids'\] is float64\[1, 2\]"),
     (np.full((2, 8), 64), "the model has 64 tokens"), (np.zeros((2, 2, 2), int), "a row, or rows"),
     (np.arange(8), "a window needs"), (ROOT / "nothing.txt", "cannot be read")],
    ids=str,
)  # fmt: skip
def test_calibration_data_that_do_not_fit_are_refused(given: Any, message: str) -> None:
    with pytest.raises(TextError, match=message):
        Calibration(given, FOLDER, window=32).inputs(language_model())


def test_passes_get_the_calibration_data() -> None:
    data = SAMPLES[0]["input_ids"]
    passes = "quantize{scheme=w4a16 group=32 method=gptq layers=body},fuse,plan-memory"
    done = tilewright.compile(language_model(), passes=passes, calibration=data)
    assert np.isfinite(done(data)).all()
    with pytest.raises(PassError, match="calibration"):
        tilewright.compile(language_model(), passes=passes)


def test_prepare_hands_options_to_passes() -> None:
    from tilewright.codegen.target import parse_target

    done, _ = prepare(language_model(), Pipeline.parse("cse"), parse_target("native"), {"calibration": SAMPLES})
    assert done.ctx.options == {"calibration": SAMPLES}


# ---- sentences -----------------------------------------------------------------------------------------------------


def test_sentences_are_padded_on_the_right() -> None:
    ids, mask = padded([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_cosines() -> None:
    a = np.array([[1.0, 0.0], [1.0, 1.0]])
    np.testing.assert_allclose(cosines(a, np.array([[2.0, 0.0], [1.0, 0.0]])), [1, np.sqrt(0.5)])
