"""The file of trials: what is written comes back, what cannot be is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.synthetic_tuning import many_trials, trials, workload
from tilewright.costmodel import sealed
from tilewright.costmodel.dataset import KIND, VERSION, Dataset, DatasetError
from tilewright.costmodel.features import Sample, Trials
from tilewright.costmodel.sealed import SealedFileError
from tilewright.costmodel.workload import Measurement


@pytest.fixture(scope="module")
def data() -> list[Trials]:
    odd = Trials(
        workload("loops", 1, 64),
        (
            Sample({"a": 1.5, "b": 0.0}, Measurement("x", "ok", 1e-9, None, 3, None, metrics={"spills": 2.0})),
            Sample({"a": 1.5, "c": -2}, Measurement("y{ä}", "wrong", error="row 3: 0.1 instead of 7\n")),
            Sample({}, Measurement("z", "timeout")),
        ),
        default="x",
    )
    return [*many_trials({"linear": 3, "attention": 2}, least=5, most=9), odd]


def test_saved_and_loaded_is_the_same(data: list[Trials], tmp_path: Path) -> None:
    dataset = Dataset.of(data, "compiler 1")
    dataset.save(tmp_path / "d.jsonl.xz")
    loaded = Dataset.load(tmp_path / "d.jsonl.xz")
    assert loaded == dataset
    assert loaded.sha256 == dataset.sha256
    assert loaded.rows == sum(len(t.samples) for t in data)
    by_key = {t.workload.key: t for t in loaded.trials}
    for t in data:
        expected = {s.measurement.schedule: s for s in t.samples}
        assert {s.measurement.schedule: s for s in by_key[t.workload.key].samples} == expected


def test_the_order_of_measuring_does_not_show(data: list[Trials], tmp_path: Path) -> None:
    Dataset.of(data, "v").save(tmp_path / "a")
    Dataset.of([replace(t, samples=t.samples[::-1]) for t in reversed(data)], "v").save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_another_value_is_another_checksum(data: list[Trials]) -> None:
    first, *rest = data
    sample = replace(first.samples[0], features={**first.samples[0].features, "knob_unroll": 9})
    changed = [replace(first, samples=(sample, *first.samples[1:])), *rest]
    assert Dataset.of(changed, "v").sha256 != Dataset.of(data, "v").sha256
    assert Dataset.of(data, "w").sha256 != Dataset.of(data, "v").sha256


def test_a_thousand_rows_take_little(tmp_path: Path) -> None:
    wide = [trials(workload("linear", 1 + i, 512, 640), 50) for i in range(10)]
    Dataset.of(wide, "v").save(tmp_path / "d")
    assert (tmp_path / "d").stat().st_size < 500 * 60


def _first(t: Trials, **changes: Any) -> Trials:
    return replace(t, samples=(replace(t.samples[0], **changes), *t.samples[1:]))


def _measured(t: Trials, **changes: Any) -> Trials:
    return _first(t, measurement=replace(t.samples[0].measurement, **changes))


WRONG: dict[str, tuple[Callable[[Trials], Trials], str]] = {
    "time 0": (lambda t: _measured(t, seconds=0.0), "seconds=0.0"),
    "time NaN": (lambda t: _measured(t, seconds=float("nan")), "seconds=nan"),
    "time as text": (lambda t: _measured(t, seconds="1"), "seconds='1'"),
    "baseline below 0": (lambda t: _measured(t, baseline=-1.0), "baseline=-1.0"),
    "spread below 0": (lambda t: _measured(t, spread=-0.1), "spread=-0.1"),
    "ok without a time": (lambda t: _measured(t, seconds=None, status="ok"), "no seconds"),
    "a status unheard of": (lambda t: _measured(t, status="fine"), "status 'fine'"),
    "half a repeat": (lambda t: _measured(t, repeats=1.5), "1.5 repeats"),
    "an infinite metric": (lambda t: _measured(t, metrics={"spills": float("inf")}), "spills=inf"),
    "an infinite feature": (lambda t: _first(t, features={"flops": float("inf")}), "flops=inf"),
    "a huge feature": (lambda t: _first(t, features={"flops": 10**400}), "flops=1000"),
    "a feature that is no number": (lambda t: _first(t, features={"flops": True}), "flops=True"),
    "no schedules": (lambda t: replace(t, samples=()), "no schedules"),
    "a schedule twice": (lambda t: replace(t, samples=(*t.samples, t.samples[0])), "is there 2 times"),
    "no threads": (lambda t: replace(t, workload=replace(t.workload, threads=0)), "0 threads"),
    "a negative size": (lambda t: replace(t, workload=replace(t.workload, sizes=(("m", -1),))), "size m=-1"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_refused(data: list[Trials], what: str) -> None:
    change, message = WRONG[what]
    with pytest.raises(DatasetError) as caught:
        Dataset.of([change(data[0]), *data[1:]], "v")
    assert message in str(caught.value)


def test_a_workload_twice_is_refused(data: list[Trials]) -> None:
    with pytest.raises(DatasetError, match="is there 2 times"):
        Dataset.of([data[0], data[0]], "v")


SPOILT: dict[str, Callable[[list[Any]], Any]] = {
    "a workload less": lambda lines: lines.pop(),
    "a text for a size": lambda lines: lines[1]["workload"]["sizes"].update(m="8"),
    "no target": lambda lines: lines[1]["workload"].pop("target"),
    "no schedules": lambda lines: lines[1].pop("schedules"),
    "a column too short": lambda lines: lines[1].update(seconds=[1.0]),
    "a list for a workload": lambda lines: lines.append([]),
    "a text for a feature": lambda lines: lines[1]["features"].update(flops="many"),
    "no head": lambda lines: lines.pop(0),
}


@pytest.mark.parametrize("what", SPOILT)
def test_wellformed_files_that_are_no_dataset_are_refused(data: list[Trials], tmp_path: Path, what: str) -> None:
    Dataset.of(data, "v").save(tmp_path / "d")
    lines = [json.loads(line) for line in sealed.read(tmp_path / "d", KIND, VERSION).splitlines()]
    SPOILT[what](lines)
    sealed.write(tmp_path / "d", KIND, VERSION, "\n".join(json.dumps(line) for line in lines).encode())
    with pytest.raises(DatasetError, match="make it again"):
        Dataset.load(tmp_path / "d")


def test_damaged_files_are_refused(data: list[Trials], tmp_path: Path) -> None:
    path = tmp_path / "d"
    Dataset.of(data, "v").save(path)
    good = path.read_bytes()
    for content in (b"", b"PK\3\4", good[:-1], good + b"\0\0"):
        path.write_bytes(content)
        with pytest.raises(SealedFileError):
            Dataset.load(path)
    sealed.write(path, KIND, VERSION, b"{")
    with pytest.raises(DatasetError):
        Dataset.load(path)
