"""The learned cost model: which schedule of a kernel is the fastest, before any is compiled.

Gradient-boosted trees (XGBoost) over the features of a schedule. Several are trained on different draws of the training
set's workloads; their mean predicts log(time), their standard deviation says how far to trust it. ``training.py`` makes
models, ``online.py`` corrects one by what a running search measures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.costmodel import sealed
from tilewright.costmodel.boosters import Trees
from tilewright.costmodel.features import Columns, Floats
from tilewright.ir import TilewrightError

KIND, VERSION = "tilewright-costmodel", 1
FACTS = ("spills", "vector_registers", "code_bytes", "bytes_moved")
"""What is predicted about the code beside its time: names in ``Measurement.metrics``."""
ENOUGH = 3  # workloads of a family on a target


class ModelError(TilewrightError):
    """A cost model that cannot be read, or does not know what it is asked for."""


@dataclass(frozen=True)
class Prediction:
    """One value for each schedule that was asked about.

    ``mean`` is log(seconds) relative to a reference of the workload, lower is better: it orders the schedules of one
    workload and says nothing across workloads. ``std`` is its standard deviation among the members of the ensemble, more
    where features leave the training set's ranges. The rest describes the code; NaN where the training set did not say.
    """

    mean: Floats
    std: Floats
    spills: Floats
    vector_registers: Floats
    code_bytes: Floats
    bytes_moved: Floats


@dataclass(frozen=True)
class Part:
    """The trees for one family, or for all: ``members`` vote on the time, ``facts`` predict log(1 + value).

    ``low`` and ``high``: what each column was between in the training set.
    """

    columns: Columns
    low: Floats
    high: Floats
    required: frozenset[str]
    members: tuple[Trees, ...]
    scales: tuple[float, ...]
    facts: Mapping[str, Trees]

    def times(self, rows: Sequence[Mapping[str, float]]) -> Floats:
        """log(time) by each member, shape [members, rows]."""
        matrix = self.columns.matrix(rows)
        return np.array([scale * member.predict(matrix) for member, scale in zip(self.members, self.scales)])

    def outside(self, rows: Sequence[Mapping[str, float]]) -> Floats:
        """The share of the features that are beyond all of the training set, where trees cannot tell how times go on."""
        matrix = self.columns.matrix(rows)
        return np.asarray(((matrix < self.low) | (matrix > self.high)).mean(axis=1), dtype=np.float64)

    def fact(self, name: str, rows: Sequence[Mapping[str, float]]) -> Floats:
        if name not in self.facts:
            return np.full(len(rows), np.nan)
        value = np.expm1(self.facts[name].predict(self.columns.matrix(rows)))
        return np.asarray(np.maximum(value, 0.0))


@dataclass(frozen=True)
class CostModel:
    """Predicts times of schedules.

    ``parts``: one for each family, or one named "" for all. ``workloads``: how many were learned from, by target and
    family. ``meta``: where the model comes from (training set's sha256, scores, recipe, host, date); not interpreted.
    """

    parts: Mapping[str, Part]
    workloads: Mapping[str, Mapping[str, int]]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def knows(self, target: str, family: str) -> bool:
        """Whether it learned from several workloads of ``family`` on ``target``."""
        return self.workloads.get(target, {}).get(family, 0) >= ENOUGH

    def predict(self, family: str, rows: Sequence[Mapping[str, float]]) -> Prediction:
        """What to expect of schedules described by ``rows``. Raises ModelError for a family it never saw."""
        part, prepared = self._prepare(family, rows)
        times = part.times(prepared)
        facts = {name: part.fact(name, prepared) for name in FACTS}
        return Prediction(times.mean(axis=0), np.hypot(times.std(axis=0), part.outside(prepared)), **facts)

    def members(self, family: str, rows: Sequence[Mapping[str, float]]) -> Floats:
        """log(time) by each member of the ensemble, shape [members, rows]."""
        part, prepared = self._prepare(family, rows)
        return part.times(prepared)

    def _prepare(self, family: str, rows: Sequence[Mapping[str, float]]) -> tuple[Part, Sequence[Mapping[str, float]]]:
        if all(family not in known for known in self.workloads.values()):
            known = sorted({name for by_family in self.workloads.values() for name in by_family})
            raise ModelError(f"the cost model knows no family {family!r}; it knows {', '.join(known)}: train it again")
        if "" in self.parts:
            part, rows = self.parts[""], [with_family(row, family) for row in rows]
        else:
            part = self.parts[family]
        if rows and (missing := part.required - rows[0].keys()):
            raise ModelError(
                f"the cost model learned from features that {family} schedules no longer have:"
                f" {', '.join(sorted(missing)[:5])}; train it again"
            )
        return part, rows

    def save(self, path: str | Path) -> None:
        """Write one file; equal models give equal files."""
        parts = {name: _encode(part) for name, part in sorted(self.parts.items())}
        content = {"meta": dict(self.meta), "workloads": {k: dict(v) for k, v in self.workloads.items()}, "parts": parts}
        sealed.write(path, KIND, VERSION, json.dumps(content, sort_keys=True).encode())

    @classmethod
    def load(cls, path: str | Path) -> CostModel:
        """Read a file that ``save`` wrote. Raises SealedFileError or ModelError, which say what is wrong with it."""
        text = sealed.read(path, KIND, VERSION)
        try:
            content = json.loads(text)
            parts = {str(name): _decode(part) for name, part in content["parts"].items()}
            workloads = {
                str(target): {str(family): int(count) for family, count in by_family.items()}
                for target, by_family in content["workloads"].items()
            }
            meta = dict(content["meta"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"{path}: not a cost model of this version ({error!r}); train it again") from None
        if "" not in parts and (lacking := {f for known in workloads.values() for f in known} - parts.keys()):
            raise ModelError(f"{path}: no trees for {', '.join(sorted(lacking))}; train it again")
        return cls(parts, workloads, meta)


def with_family(row: Mapping[str, float], family: str) -> dict[str, float]:
    """``row`` with the family as a feature, for a part that serves all."""
    return {**row, f"family={family}": 1.0}


def _encode(part: Part) -> dict[str, Any]:
    return {
        "names": list(part.columns.names),
        "low": part.low.tolist(),
        "high": part.high.tolist(),
        "required": sorted(part.required),
        "scales": list(part.scales),
        "members": [member.table for member in part.members],
        "facts": {name: trees.table for name, trees in sorted(part.facts.items())},
    }


def _decode(part: Mapping[str, Any]) -> Part:
    names = [str(name) for name in part["names"]]
    scales = tuple(float(scale) for scale in part["scales"])
    low, high = (np.array(part[end], dtype=np.float64) for end in ("low", "high"))
    if low.shape != (len(names),) or high.shape != low.shape or not np.all(low <= high):
        raise ValueError("ranges that do not fit the names of the features")
    members = tuple(Trees.checked(member, len(names)) for member in part["members"])
    if names != sorted(set(names)) or not set(part["required"]) <= set(names):
        raise ValueError("names of features are not sorted, or some are missing")
    if not members or len(scales) != len(members) or not np.all(np.isfinite(scales)):
        raise ValueError(f"{len(members)} members, {len(scales)} scales")
    if unknown := set(part["facts"]) - set(FACTS):
        raise ValueError(f"unknown facts {sorted(unknown)}")
    facts = {name: Trees.checked(table, len(names)) for name, table in part["facts"].items()}
    return Part(Columns(tuple(names)), low, high, frozenset(part["required"]), members, scales, facts)
