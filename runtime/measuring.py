"""What measuring needs on any machine: durations, the spread of repeats, and the file that measurements are written to.

The file is lines of JSON: a head, a line for each workload followed by its measurements, and an end with their numbers and
the SHA-256 of all lines before it. Rows are in order, so that equal content gives equal files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Record = Mapping[str, Any]

HEAD = {"format": "tilewright-measurements", "version": 1}
_NORMAL_MAD = 1.4826  # standard deviation over median absolute deviation of a normal distribution
_SAME = 0.001  # relative difference of times that says nothing
_NUMBER = r"(\d+(?:\.\d*)?)"
_DURATION = re.compile(f"P?(?:{_NUMBER}D)?T?(?:{_NUMBER}H)?(?:{_NUMBER}M)?(?:{_NUMBER}S?)?")
_PARTS = (86400, 3600, 60, 1)
_LONGEST = 1e13  # seconds


def duration(value: Any) -> float:
    """Seconds of ``20m``, ``1h30m``, ``2d``, ``90s``, ``90`` or an ISO 8601 duration. Raises ValueError."""
    match = _DURATION.fullmatch("".join(str(value).upper().split()))
    seconds = sum(float(n or 0) * part for n, part in zip(match.groups(), _PARTS)) if match else 0.0
    if not 0 < seconds < _LONGEST:
        raise ValueError(f"{value!r} is no duration; write 20m, 1h30m, 2d or a number of seconds")
    return seconds


def inliers(values: Sequence[float] | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Which values lie within three standard deviations, estimated by the median absolute deviation."""
    array = np.asarray(values)
    middle = float(np.median(array))
    away = np.abs(array - middle)
    return np.asarray(away <= max(3 * _NORMAL_MAD * float(np.median(away)), _SAME * abs(middle)))


def spread(values: Sequence[float] | np.ndarray[Any, Any]) -> float:
    """Interquartile range over median."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return float((high - low) / middle)


def line(record: Record) -> str:
    """A record as one line of JSON, the same for equal records."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def end_of(workloads: int, measurements: int, seen: Any) -> dict[str, Any]:
    """The last record of a file; ``seen`` is the hash of the lines before."""
    return {"workloads": workloads, "measurements": measurements, "sha256": seen.hexdigest()}


def document(groups: Iterable[tuple[Record, Sequence[Record]]]) -> tuple[bytes, int]:
    """The content of a file of workloads with their measurements, which are in order, and how many of these it has."""
    lines, workloads, count = [line(HEAD)], 0, 0
    for workload, measurements in groups:
        lines += [line({"workload": workload}), *(line({"measurement": m}) for m in measurements)]
        workloads, count = workloads + 1, count + len(measurements)
    body = "\n".join([*lines, ""]).encode()
    return body + line({"end": end_of(workloads, count, hashlib.sha256(body))}).encode() + b"\n", count
