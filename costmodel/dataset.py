"""The file of trials that a cost model is trained on.

One line of JSON for each workload, which is told once; features and measurements stand in columns, and a column whose
entries are all equal is told once too. Equal datasets are equal files, in whatever order they were measured.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from tilewright.costmodel import sealed
from tilewright.costmodel.features import Sample, Trials
from tilewright.costmodel.workload import Measurement, Status, Workload
from tilewright.ir import TilewrightError

KIND, VERSION = "tilewright-dataset", 1
_TEXTS = ("family", "kernel", "target", "host")
_HUGE = 1e300
_NUMBERS = ("seconds", "spread", "baseline")


class DatasetError(TilewrightError):
    """A dataset with a value that cannot be."""


@dataclass(frozen=True)
class Dataset:
    """Trials in the order of their workloads' keys, each with its schedules in the order of their texts.

    Make one with ``Dataset.of``. ``compiler`` is the version whose kernels were measured.
    """

    trials: tuple[Trials, ...]
    compiler: str

    @classmethod
    def of(cls, trials: Sequence[Trials], compiler: str) -> Dataset:
        """Raises DatasetError for a value that cannot be, a workload or a schedule that is there twice."""
        ordered = tuple(
            replace(t, samples=tuple(sorted(t.samples, key=lambda s: s.measurement.schedule)))
            for t in sorted(trials, key=lambda t: t.workload.key)
        )
        for name, count in Counter(t.workload.key for t in ordered).items():
            _need(count == 1, "dataset", f"workload {name} is there {count} times")
        for t in ordered:
            _check(t)
        return cls(ordered, compiler)

    @property
    def rows(self) -> int:
        """How many schedules were measured."""
        return sum(len(t.samples) for t in self.trials)

    @cached_property
    def sha256(self) -> str:
        """The checksum of its content, which its file names too."""
        return sealed.checksum(self._content)

    @cached_property
    def _content(self) -> bytes:
        head = {"compiler": self.compiler, "workloads": len(self.trials), "rows": self.rows}
        lines = [head, *(_encode(t) for t in self.trials)]
        return "".join(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n" for line in lines).encode()

    def save(self, path: str | Path) -> None:
        """Write one file, ``.jsonl.xz`` by custom."""
        sealed.write(path, KIND, VERSION, self._content, effort=6)

    @classmethod
    def load(cls, path: str | Path) -> Dataset:
        """Read and check every value. Raises SealedFileError or DatasetError, which say what is wrong where."""
        content = sealed.read(path, KIND, VERSION)
        try:
            head, *lines = [json.loads(line) for line in content.splitlines()]
            trials = [_decode(line) for line in lines]
            result = cls.of(trials, str(head["compiler"]))
            counts = (head["workloads"], head["rows"])
            _need(counts == (len(trials), result.rows), "dataset", f"{counts} workloads and rows were saved")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DatasetError(f"{path}: not a dataset of this version: {error!r}; make it again") from None
        except DatasetError as error:
            raise DatasetError(f"{path}: {error}; make it again") from None
        return result


def _encode(trials: Trials) -> dict[str, Any]:
    w, measured = trials.workload, trials.measurements
    names = sorted({name for sample in trials.samples for name in sample.features})
    metrics = sorted({name for m in measured for name in m.metrics})
    return {
        "workload": {**{name: getattr(w, name) for name in _TEXTS}, "sizes": dict(w.sizes), "threads": w.threads},
        "default": trials.default,
        "schedules": [m.schedule for m in measured],
        "features": {name: _column([s.features.get(name) for s in trials.samples]) for name in names},
        "status": _column([m.status for m in measured]),
        **{name: _column([getattr(m, name) for m in measured]) for name in (*_NUMBERS, "repeats", "error")},
        "metrics": {name: _column([m.metrics.get(name) for m in measured]) for name in metrics},
    }


def _column(entries: Sequence[Any]) -> Any:
    same = all(entry == entries[0] and type(entry) is type(entries[0]) for entry in entries)
    return entries[0] if same and entries else list(entries)


def _decode(line: Mapping[str, Any]) -> Trials:
    told, schedules = line["workload"], line["schedules"]
    sizes = tuple((name, size) for name, size in told["sizes"].items())
    workload = Workload(**{name: told[name] for name in _TEXTS}, sizes=sizes, threads=told["threads"])

    def column(entry: Any) -> list[Any]:
        entries = entry if isinstance(entry, list) else [entry] * len(schedules)
        _need(len(entries) == len(schedules), f"workload {workload.key}", "columns of different lengths")
        return entries

    def table(columns: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        full = {name: column(entry) for name, entry in columns.items()}
        for index in range(len(schedules)):
            yield {name: entries[index] for name, entries in full.items() if entries[index] is not None}

    fields = {name: column(line[name]) for name in ("status", *_NUMBERS, "repeats", "error")}
    samples = tuple(
        Sample(features, Measurement(schedule, metrics=metrics, **{name: fields[name][index] for name in fields}))
        for index, (schedule, features, metrics) in enumerate(
            zip(schedules, table(line["features"]), table(line["metrics"]))
        )
    )
    return Trials(workload, samples, line["default"])


def _check(trials: Trials) -> None:
    w = trials.workload
    where = f"workload {w.key}"
    _need(all(isinstance(getattr(w, name), str) for name in _TEXTS), where, "a text that is none")
    _need(_whole(w.threads) and w.threads >= 1, where, f"{w.threads!r} threads")
    for name, size in w.sizes:
        _need(isinstance(name, str) and _whole(size) and size >= 0, where, f"size {name}={size!r}")
    _need(isinstance(trials.default, str), where, "a default that is no text")
    _need(len(trials.samples) > 0, where, "no schedules")
    for schedule, count in Counter(m.schedule for m in trials.measurements).items():
        _need(count == 1, where, f"schedule {schedule} is there {count} times")
    for sample in trials.samples:
        _check_sample(sample, f"{where}, schedule {sample.measurement.schedule}")


def _check_sample(sample: Sample, where: str) -> None:
    m = sample.measurement
    _need(isinstance(m.schedule, str) and isinstance(m.error, str), where, "a text that is none")
    _need(m.status in get_args(Status), where, f"status {m.status!r}")
    _need(_whole(m.repeats) and m.repeats >= 0, where, f"{m.repeats!r} repeats")
    checks: dict[str, Callable[[float], bool]] = {
        "seconds": lambda value: value > 0,
        "baseline": lambda value: value > 0,
        "spread": lambda value: value >= 0,
    }
    for name, check in checks.items():
        value = getattr(m, name)
        _need(value is None or (_number(value) and check(value)), where, f"{name}={value!r}")
    _need(m.status != "ok" or m.seconds is not None, where, "status ok and no seconds")
    for name, value in (*sample.features.items(), *m.metrics.items()):
        _need(isinstance(name, str) and _number(value), where, f"{name}={value!r}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_HUGE < value < _HUGE


def _need(holds: bool, where: str, what: str) -> None:
    if not holds:
        raise DatasetError(f"{where}: {what}")
