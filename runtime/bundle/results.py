"""What came of a bundle: a file of measurements for a tuning database, and a page for people."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tilewright.runtime.bundle.format import Bundle, WorkloadSpec
from tilewright.runtime.measuring import document

DRIFT = "drift"
"""The metric that says by how much the baseline moved while a candidate was timed."""
_MOVED = 0.1
_TIMES = ("seconds", "spread", "repeats", "baseline")
_HEAD = "| kernel | calls | right | not | default | best | of default | GB/s | TFLOP/s | schedule |"


@dataclass(frozen=True)
class Outcome:
    """What came of a candidate; ``seconds`` and the like are those of a measurement."""

    status: str
    error: str = ""
    seconds: float | None = None
    spread: float | None = None
    repeats: int = 0
    baseline: float | None = None
    drift: float = 0.0
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="microseconds"))

    @property
    def ratio(self) -> float | None:
        return self.seconds / self.baseline if self.seconds and self.baseline else None


@dataclass
class Results:
    """Outcomes by the index of the workload and of the candidate. ``about`` are facts to be told with them."""

    bundle: Bundle
    about: dict[str, str] = field(default_factory=dict)
    outcomes: dict[tuple[int, int], Outcome] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)
    """Workloads that could not be run at all, and why."""

    def of(self, workload: int) -> dict[int, Outcome]:
        """The outcomes of a workload."""
        return {i: outcome for (w, i), outcome in self.outcomes.items() if w == workload}

    def count(self, *statuses: str) -> int:
        return sum(outcome.status in statuses for outcome in self.outcomes.values())

    @property
    def all_right(self) -> bool:
        """Whether everything ran that was compiled, and gave what it should."""
        wanted = sum(not c.refused for w in self.bundle.workloads for c in w.candidates)
        return self.count("ok") == wanted

    # ---- the file of measurements --------------------------------------------------------------------------------

    def records(self) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Workloads with their measurements, in order. What was checked and not timed is left out."""
        order = sorted(range(len(self.bundle.workloads)), key=lambda w: self.bundle.workloads[w].key)
        for w in order:
            workload = self.bundle.workloads[w]
            found = [self._record(workload, i, o) for i, o in self.of(w).items() if o.seconds or o.status != "ok"]
            if found:
                yield workload.record, sorted(found, key=lambda record: str(record["schedule"]))

    def _record(self, workload: WorkloadSpec, index: int, outcome: Outcome) -> dict[str, Any]:
        candidate = workload.candidates[index]
        metrics = candidate.metrics | ({DRIFT: outcome.drift} if outcome.baseline else {})
        return {
            "workload": workload.key, "compiler": self.bundle.compiler, "schedule": candidate.schedule,
            "status": outcome.status, **{name: getattr(outcome, name) for name in _TIMES},
            "error": plain(outcome.error), "metrics": metrics, "at": outcome.at,
        }  # fmt: skip

    def write(self, path: Path) -> None:
        """The file of measurements, and the page beside it: each whole or not at all."""
        content, _ = document(self.records())
        write_beside(path, content)
        write_beside(path.with_suffix(".md"), self.page().encode())

    # ---- the page ------------------------------------------------------------------------------------------------

    def page(self) -> str:
        """In Markdown."""
        facts = [f"- {name}: {value}" for name, value in self.about.items()]
        facts += [f"- the best schedules take {gain:.3f} of the default's time" for gain in self.gain()]
        table = [_HEAD, "|---" * (_HEAD.count("|") - 1) + "|", *(self._row(w) for w in range(len(self.bundle.workloads)))]
        return "\n".join(["# Kernels on a GPU", "", *facts, f"- {self.verdict()}", "", *table, "", *self._complaints(), ""])

    def verdict(self) -> str:
        """The numbers of candidates by what came of them."""
        counts = {s: self.count(s) for s in ("ok", "wrong", "crashed", "timeout", "refused")}
        told = ", ".join(f"{count} {'right' if s == 'ok' else s}" for s, count in counts.items() if count or s == "ok")
        missing = sum(len(w.candidates) for w in self.bundle.workloads) - len(self.outcomes)
        return f"{len(self.bundle.workloads)} kernels: {told}" + (f", {missing} not tried" if missing else "")

    def gain(self) -> Iterator[float]:
        """The time of all kernels that were timed, with the best schedule of each, relative to the default's."""
        best = {w: self._best(w) for w in range(len(self.bundle.workloads))}
        times = [(self.bundle.workloads[w].weight * b[1], b[2]) for w, b in best.items() if b is not None]
        if times:
            yield sum(default * ratio for default, ratio in times) / sum(default for default, _ in times)

    def _best(self, index: int) -> tuple[int, float, float] | None:
        """The fastest candidate of a workload, the default's seconds, and its time relative to that."""
        timed = {i: o for i, o in self.of(index).items() if o.ratio is not None}
        if not timed:
            return None
        best = min(timed, key=lambda i: (timed[i].ratio, i))
        default = timed[0].seconds if 0 in timed else timed[best].baseline
        return best, default or 0.0, timed[best].ratio or 1.0

    def _row(self, index: int) -> str:
        workload, outcomes = self.bundle.workloads[index], self.of(index)
        right, best = [i for i, o in outcomes.items() if o.status == "ok"], self._best(index)
        cells = [workload.name.replace("|", "/"), f"{workload.weight:g}", str(len(right)), str(len(outcomes) - len(right))]
        if best is None:
            return f"| {' | '.join([*cells, *[''] * 6])} |"
        candidate, default, ratio = best
        rates = workload.bytes_moved / (default * ratio) / 1e9, workload.flops / (default * ratio) / 1e12
        cells += [_us(default), _us(default * ratio), f"{ratio:.3f}", f"{rates[0]:.0f}", f"{rates[1]:.2f}"]
        return f"| {' | '.join(cells)} | `{workload.candidates[candidate].schedule}` |"

    def _complaints(self) -> Iterator[str]:
        for w, reason in self.skipped.items():
            yield f"- {self.bundle.workloads[w].name}: not run: {plain(reason)}"
        for (w, i), outcome in sorted(self.outcomes.items()):
            if outcome.status != "ok":
                workload = self.bundle.workloads[w]
                first = (plain(outcome.error).splitlines() or [""])[0]
                yield f"- {outcome.status}: {workload.name} `{workload.candidates[i].schedule}`: {first}"
        if moved := sum(outcome.drift > _MOVED for outcome in self.outcomes.values()):
            yield f"- while {moved} candidates were timed the default's time moved by more than {_MOVED:.0%}"


def plain(text: str) -> str:
    """What a driver or a crashed process prints, as a text that a database takes."""
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"


def write_beside(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises OSError."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def outcome_of(said: Mapping[str, Any]) -> Outcome:
    """An outcome that a worker tells."""
    return Outcome(**{key: value for key, value in said.items() if key != "tried"})
