"""What a model learns from: the features of schedules beside how they did, as matrices and target values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.costmodel.workload import Measurement, Workload

Floats = NDArray[np.float64]
FAILED = math.log(4)
"""A schedule that gave no time counts as so much slower, in log(seconds), than the slowest that gave one."""


@dataclass(frozen=True)
class Sample:
    """A schedule of a workload: its features, and how it did."""

    features: Mapping[str, float]
    measurement: Measurement


@dataclass(frozen=True)
class Trials:
    """What was measured of one workload. ``default`` is the text of the schedule chosen by rule, "" when not known."""

    workload: Workload
    samples: tuple[Sample, ...]
    default: str = ""

    @property
    def measurements(self) -> list[Measurement]:
        return [sample.measurement for sample in self.samples]


def log_times(measurements: Iterable[Measurement]) -> Floats:
    """log(seconds) of each, NaN where there is no time that counts.

    The ratio to the baseline takes the drift of the machine out; the median of the baselines gives the seconds back.
    """
    measured = list(measurements)
    baselines = [m.baseline for m in measured if _positive(m.baseline)]
    scale = math.log(float(np.median(np.array(baselines, float)))) if baselines else 0.0
    return np.array([_log_time(m, scale) for m in measured], dtype=np.float64)


def _log_time(measurement: Measurement, scale: float) -> float:
    if measurement.status != "ok" or not _positive(measurement.seconds):
        return math.nan
    if _positive(measurement.baseline):
        return math.log(measurement.ratio or math.nan) + scale
    return math.log(measurement.seconds or math.nan)


def _positive(value: float | None) -> bool:
    return value is not None and 0 < value < math.inf


def with_failures(times: Floats) -> Floats:
    """``times`` with every NaN replaced by a time slower than all of them; at least one must be a number."""
    return np.where(np.isnan(times), np.nanmax(times) + FAILED, times)


@dataclass(frozen=True)
class Columns:
    """The features of a model in a fixed order."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, float]]) -> Columns:
        """All names of ``rows``, sorted."""
        return cls(tuple(sorted({name for row in rows for name in row})))

    @classmethod
    def varying(cls, rows: Sequence[Mapping[str, float]]) -> Columns:
        """The names of ``rows`` whose values differ between them."""
        every = cls.of(rows)
        first = rows[0] if rows else {}
        return cls(tuple(n for n in every.names if any(row.get(n) != first.get(n) for row in rows)))

    def matrix(self, rows: Sequence[Mapping[str, float]]) -> NDArray[np.float32]:
        """One line for each of ``rows``; what a row lacks, and what is no finite float32, is NaN."""
        values: Any = [[row.get(name, math.nan) for name in self.names] for row in rows]
        with np.errstate(over="ignore"):
            matrix = np.array(values, dtype=np.float64).reshape(len(rows), len(self.names)).astype(np.float32)
        matrix[~np.isfinite(matrix)] = np.nan
        return matrix
