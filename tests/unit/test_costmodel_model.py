"""Training, predicting, saving and loading of the cost model, on kernels that are formulas."""

import json
import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.synthetic_tuning import many_trials, workload
from tilewright.costmodel import sealed
from tilewright.costmodel.boosters import Growth
from tilewright.costmodel.boosters import train as grow
from tilewright.costmodel.features import Columns, Sample, Trials, log_times, with_failures
from tilewright.costmodel.model import FACTS, CostModel, ModelError
from tilewright.costmodel.scores import evaluate
from tilewright.costmodel.sealed import SealedFileError
from tilewright.costmodel.training import Recipe, train
from tilewright.costmodel.workload import Measurement

SMALL = Recipe(members=3, growth=Growth(rounds=30, depth=5, rate=0.2))
TARGET = "cpu{arch=znver5}"


@pytest.fixture(scope="module")
def data() -> list[Trials]:
    return many_trials({"linear": 16, "attention": 8, "loops": 8}, least=15, most=30)


@pytest.fixture(scope="module")
def model(data: list[Trials]) -> CostModel:
    return train(data, SMALL, meta={"host": "toy"})


def rows(data: list[Trials], family: str) -> list[Any]:
    return [s.features for t in data if t.workload.family == family for s in t.samples]


def test_times_are_freed_of_drift_and_failures_come_last() -> None:
    measured = [
        Measurement("a", "ok", seconds=2.0, baseline=1.0),
        Measurement("b", "ok", seconds=6.0, baseline=2.0),  # the machine was half as fast: 3 / 1
        Measurement("c", "wrong", seconds=0.1, baseline=1.0),
        Measurement("d", "ok", seconds=0.0, baseline=1.0),
        Measurement("e", "timeout"),
    ]
    times = log_times(measured)
    assert np.allclose(np.exp(times[:2]), [2.0, 3.0])  # at the median speed
    assert np.isnan(times[2:]).all()
    assert with_failures(times)[2:].min() > times[:2].max()
    assert np.allclose(log_times([Measurement("a", "ok", seconds=3.0)]), np.log(3.0))


def test_columns_have_a_fixed_order_and_mark_what_is_missing() -> None:
    given = [{"b": 1.0, "a": 2.0}, {"c": float("inf"), "a": 2.0}]
    assert Columns.of(given).names == ("a", "b", "c")
    assert Columns.varying(given).names == ("b", "c")
    np.testing.assert_array_equal(Columns(("a", "b", "c")).matrix(given), [[2, 1, np.nan], [2, np.nan, np.nan]])
    assert Columns(("a",)).matrix([]).shape == (0, 1)


@pytest.mark.parametrize(
    "recipe", [SMALL, replace(SMALL, joint=True), replace(SMALL, objective="pairwise"), replace(SMALL, reference="best")]
)
def test_orders_schedules_of_sizes_never_seen(data: list[Trials], recipe: Recipe) -> None:
    fresh = many_trials({"linear": 6, "attention": 4, "loops": 4}, seed=99, least=20, most=20)
    scores = evaluate(train(data, recipe), fresh)
    assert scores["all"].pairwise > 0.72
    assert scores["all"].top5 > scores["all"].random5 + 0.05
    assert scores["all"].top1 > scores["all"].rule + 0.1


def test_a_ranking_predicts_log_time_too(data: list[Trials]) -> None:
    ranked = train(data, replace(SMALL, objective="pairwise"))
    one = next(t for t in data if t.workload.family == "linear")
    times = with_failures(log_times(one.measurements))
    predicted = ranked.predict("linear", [s.features for s in one.samples]).mean
    slope = np.polyfit(predicted, times, 1)[0]
    assert 0.4 < slope < 2.5


def test_facts_of_the_code(model: CostModel, data: list[Trials]) -> None:
    told = [(s.features, s.measurement.metrics) for t in data for s in t.samples if "registers" in s.features]
    predicted = model.predict("linear", [features for features, _ in told])
    for name in FACTS:
        pairs = [(p, m[name]) for p, (_, m) in zip(getattr(predicted, name), told) if name in m]
        got, expected = np.array(pairs).T
        assert np.corrcoef(got, expected)[0, 1] > 0.9, name
        assert (got >= 0).all()


def test_facts_that_nobody_told_are_nan(data: list[Trials]) -> None:
    bare = [
        replace(t, samples=tuple(replace(s, measurement=replace(s.measurement, metrics={})) for s in t.samples))
        for t in data[:6]
    ]
    prediction = train(bare, SMALL).predict("linear", rows(data, "linear")[:3])
    assert np.isnan(prediction.spills).all()
    assert np.isfinite(prediction.mean).all()


def test_uncertainty_is_larger_far_from_the_training_set() -> None:
    everything = many_trials({"linear": 24}, seed=3, least=20, most=30)

    def near(sample: Sample) -> bool:
        f = sample.features
        return f["knob_block_k"] <= 1024 and f["knob_tile_m"] <= 6 and f["size_m"] <= 37

    seen = [replace(t, samples=tuple(s for s in t.samples if near(s))) for t in everything]
    model = train([t for t in seen if t.samples], SMALL)
    fresh = [s for t in many_trials({"linear": 16}, seed=4, least=20, most=20) for s in t.samples]
    close = model.predict("linear", [s.features for s in fresh if near(s)]).std
    far = model.predict("linear", [s.features for s in fresh if not near(s)]).std
    assert np.median(far) > 1.5 * np.median(close)


def test_equal_data_give_equal_models_in_any_order(data: list[Trials], model: CostModel, tmp_path: Path) -> None:
    shuffled = [replace(t, samples=t.samples[::-1]) for t in reversed(data)]
    model.save(tmp_path / "a")
    train(shuffled, SMALL, meta={"host": "toy"}).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_knows_what_it_saw_enough_of(data: list[Trials], model: CostModel) -> None:
    assert model.knows(TARGET, "linear")
    assert not model.knows("cpu{arch=other}", "linear")
    assert not model.knows(TARGET, "convolution")
    two = [t for t in data if t.workload.family == "linear"][:2]
    assert not train(two, SMALL).knows(TARGET, "linear")


def test_a_family_never_seen_is_refused(model: CostModel) -> None:
    with pytest.raises(ModelError, match="no family 'convolution'; it knows attention, linear, loops"):
        model.predict("convolution", [{}])


def test_features_that_changed_are_refused(model: CostModel, data: list[Trials]) -> None:
    row = {name: value for name, value in rows(data, "linear")[0].items() if name != "flops"}
    with pytest.raises(ModelError, match="no longer have: flops; train it again"):
        model.predict("linear", [row])


def test_nothing_to_learn_from_is_refused() -> None:
    failed = Sample({"a": 1.0}, Measurement("x", "crashed"))
    with pytest.raises(ModelError, match="nothing to learn from"):
        train([Trials(workload("loops", 1, 64), (failed,))])


def test_no_rows_give_no_predictions(model: CostModel) -> None:
    assert model.predict("linear", []).mean.shape == (0,)


# --- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", [False, True])
def test_saved_and_loaded_is_the_same(data: list[Trials], joint: bool, tmp_path: Path) -> None:
    model = train(data, replace(SMALL, joint=joint), meta={"sha256": "abc", "scores": {"top1": 0.9}})
    model.save(tmp_path / "m.json.xz")
    loaded = CostModel.load(tmp_path / "m.json.xz")
    assert loaded.meta == json.loads(json.dumps(model.meta))
    assert loaded.workloads == model.workloads
    for family in ("linear", "attention", "loops"):
        before, after = (m.predict(family, rows(data, family)) for m in (model, loaded))
        for name in ("mean", "std", *FACTS):
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    assert [p.name for p in tmp_path.iterdir()] == ["m.json.xz"]


@pytest.fixture(scope="module")
def saved(model: CostModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "m.json.xz"
    model.save(path)
    return path


def test_damaged_files_are_refused(saved: Path, tmp_path: Path) -> None:
    good = saved.read_bytes()
    bad = tmp_path / "bad"
    for content in (b"", b"hello", good[:-20], good[: len(good) // 2], good + b"more", bytes(reversed(good))):
        bad.write_bytes(content)
        with pytest.raises(SealedFileError, match=r"bad: .*(get it again|no tilewright-costmodel file)"):
            CostModel.load(bad)
    for place in range(0, len(good), len(good) // 30):
        bad.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
        with pytest.raises(SealedFileError):
            CostModel.load(bad)
    with pytest.raises(SealedFileError, match="cannot be read: No such file"):
        CostModel.load(tmp_path / "none")


def test_files_of_another_kind_or_version_are_refused(saved: Path, tmp_path: Path) -> None:
    content = sealed.read(saved, "tilewright-costmodel", 1)
    sealed.write(tmp_path / "kind", "tilewright-dataset", 1, content)
    with pytest.raises(SealedFileError, match="no tilewright-costmodel file"):
        CostModel.load(tmp_path / "kind")
    sealed.write(tmp_path / "version", "tilewright-costmodel", 7, content)
    with pytest.raises(SealedFileError, match="version 7, this tilewright reads version 1"):
        CostModel.load(tmp_path / "version")
    head, _, rest = lzma.decompress(saved.read_bytes()).partition(b"\n")
    (tmp_path / "changed").write_bytes(lzma.compress(head + b"\n" + rest.replace(b"flops", b"FLOPS")))
    with pytest.raises(SealedFileError, match="checksum"):
        CostModel.load(tmp_path / "changed")


def _member(content: dict[str, Any]) -> dict[str, list[Any]]:
    return content["parts"]["linear"]["members"][0]


SPOILT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no parts": lambda c: c.pop("parts"),
    "a family without trees": lambda c: c["parts"].pop("linear"),
    "no meta": lambda c: c.update(meta=3),
    "counts that are none": lambda c: c.update(workloads={"t": {"linear": "many"}}),
    "a feature less": lambda c: c["parts"]["linear"]["names"].pop(),
    "features unsorted": lambda c: c["parts"]["linear"]["names"].reverse(),
    "a scale less": lambda c: c["parts"]["linear"]["scales"].pop(),
    "a scale that is none": lambda c: c["parts"]["linear"]["scales"].__setitem__(0, float("nan")),
    "no members": lambda c: c["parts"]["linear"].update(members=[], scales=[]),
    "an unknown fact": lambda c: c["parts"]["linear"]["facts"].update(mood={}),
    "a cycle": lambda c: _member(c)["left"].__setitem__(1, 0),
    "a child outside": lambda c: _member(c)["right"].__setitem__(0, 10**6),
    "half a node": lambda c: _member(c)["left"].__setitem__(0, -1),
    "a split on no feature": lambda c: _member(c)["feature"].__setitem__(0, 10**4),
    "a fraction of a child": lambda c: _member(c)["left"].__setitem__(0, 1.5),
    "a value that is text": lambda c: _member(c)["value"].__setitem__(0, "x"),
    "a value that is none": lambda c: _member(c)["value"].__setitem__(0, float("inf")),
    "columns of two lengths": lambda c: _member(c)["value"].pop(),
    "a negative size": lambda c: _member(c)["sizes"].extend([-1, 1]),
    "a list for a table": lambda c: c["parts"]["linear"].update(members=[[], [], []]),
}


@pytest.mark.parametrize("what", SPOILT)
def test_wellformed_files_that_are_no_model_are_refused(saved: Path, tmp_path: Path, what: str) -> None:
    content = json.loads(sealed.read(saved, "tilewright-costmodel", 1))
    SPOILT[what](content)
    sealed.write(tmp_path / "m", "tilewright-costmodel", 1, json.dumps(content).encode(), effort=0)
    with pytest.raises(ModelError, match="train it again"):
        CostModel.load(tmp_path / "m")


def test_trees_are_those_of_xgboost() -> None:
    import xgboost

    rng = np.random.default_rng(0)
    matrix = rng.random((200, 5), dtype=np.float32)
    matrix[::7, 2] = np.nan
    target = np.nan_to_num(matrix[:, 0] * 2 - matrix[:, 2])
    growth = Growth(rounds=10, depth=3, rate=0.3, rows=1.0, columns=1.0, least=1.0, bins=64)
    params = {"max_depth": 3, "eta": 0.3, "base_score": 0.0, "tree_method": "hist", "max_bin": 64, "nthread": 1}
    expected = xgboost.train(params, xgboost.DMatrix(matrix, label=target), 10).predict(xgboost.DMatrix(matrix))
    np.testing.assert_array_equal(grow(growth, matrix, target).predict(matrix), expected)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    sealed.write_beside(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tilewright.costmodel.sealed.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        sealed.write_beside(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
