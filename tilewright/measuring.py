"""Schedules measured on this machine: compiled, compared with the interpreter, and timed beside a baseline."""

from __future__ import annotations

import hashlib
import json
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.store import encode
from tilewright.codegen.target import host_target, parse_target
from tilewright.codegen.trial import link_trials
from tilewright.costmodel.measurement import Effort
from tilewright.costmodel.workload import Measurement, Workload
from tilewright.ir import TilewrightError
from tilewright.measuring_compile import Compiler, Compilers, Made
from tilewright.measuring_helper import Helper, HelperError
from tilewright.measuring_server import described
from tilewright.measuring_trial import Candidate

_OPENING = 300.0
"""Seconds that making the inputs and the reference of a workload may take."""
_GRACE = 30.0
_SLOWEST = 2e10
"""Operations a second; what is so slow that all its calls together do not reach this has no chance."""
_GROUP = 64  # candidates that are compiled before they are measured


class MeasuringError(TilewrightError):
    """A workload cannot be measured here at all."""


@dataclass
class _Open:
    """The workload that the measuring process has in memory, and its baseline."""

    workload: Workload
    bytes_moved: float
    flops: float
    baseline: str = ""
    made: Made | None = None
    sound: bool = False


class LocalRunner:
    """Measures schedules on this machine, one at a time, each in a process of its own.

    A candidate may take ``timeout`` seconds in all, and more where a call is long. Code that is equal to that of another
    schedule of the workload is not timed again, but a schedule that is asked for again is. ``compiler`` makes the code;
    ``seed`` is that of the inputs.

    A baseline that fails (it should not: that is a bug of the compiler) leaves the others without ``baseline``.
    """

    def __init__(
        self, effort: Effort | None = None, timeout: float = 10.0, compiler: Compiler | None = None, seed: int = 0
    ) -> None:
        self.effort, self.timeout, self.seed = effort or Effort(), timeout, seed
        self.spent = self.effort
        self.compiler = compiler or Compilers()
        self.server = Helper("tilewright.measuring_server")
        self.opened: _Open | None = None
        self.known: dict[tuple[str, str, Effort], Measurement] = {}
        self._end = weakref.finalize(self, _close, self.compiler, self.server)

    def __enter__(self) -> LocalRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes. They are started again when something is measured."""
        self.opened = None
        _close(self.compiler, self.server)

    def measure(
        self, workload: Workload, baseline: str, schedules: Sequence[str], effort: float = 1.0
    ) -> list[Measurement]:
        """One measurement for each of ``schedules``, in order; ``baseline`` is timed beside them, ``effort`` times as long.

        Raises MeasuringError when the workload itself cannot be run: this machine lacks instructions of its target, or the
        interpreter refuses the kernel.
        """
        distinct = list(dict.fromkeys(schedules))
        self.spent = self.effort.times(effort)
        found: dict[str, Measurement] = {}
        for start in range(0, len(distinct), _GROUP):
            group = distinct[start : start + _GROUP]
            found |= dict(zip(group, self._group(workload, baseline, group)))
        return [found[schedule] for schedule in schedules]

    def _group(self, workload: Workload, baseline: str, schedules: Sequence[str]) -> list[Measurement]:
        opened = self._open(workload)
        first = [] if opened.baseline == baseline and opened.made else [baseline]
        made = self.compiler.compile(workload, [*first, *schedules])
        if first:
            opened.baseline, opened.made, opened.sound = baseline, made.pop(0), False
        with tempfile.TemporaryDirectory(prefix="tilewright-measure-") as folder:
            return _Group(self, opened, Path(folder), list(schedules), made).measure()

    def _open(self, workload: Workload) -> _Open:
        """Have ``workload`` in the measuring process."""
        if self.opened is not None and self.opened.workload == workload:
            return self.opened
        check_host(workload)
        self.opened = None
        request = {"kernel": workload.kernel, "sizes": dict(workload.sizes), "target": workload.target,
                   "threads": workload.threads, "seed": self.seed}  # fmt: skip
        try:
            answer, _ = self.server.ask(request, seconds=_OPENING)
        except HelperError as error:
            raise MeasuringError(f"{workload.family} kernel: making its inputs and reference: {error}") from None
        if "refused" in answer:
            raise MeasuringError(f"{workload.family} kernel with {dict(workload.sizes)}: {answer['refused']}")
        self.opened = _Open(workload, answer["bytes_moved"], answer["flops"])
        return self.opened

    def ask(self, opened: _Open, candidate: Candidate, baseline: Candidate | None) -> dict[str, Any]:
        """The measuring process's answer. When that process ends, the candidate is what ended it."""
        self._open(opened.workload)
        timeout = self.timeout + opened.flops / _SLOWEST
        request = {"candidate": described(candidate), "baseline": baseline and described(baseline),
                   "timeout": timeout, "effort": asdict(self.spent)}  # fmt: skip
        try:
            return self.server.ask(request, seconds=timeout + _GRACE)[0]
        except HelperError as error:
            self.opened = None
            return {"status": "timeout" if error.late else "crashed", "error": f"the measuring process: {error}"}


@dataclass
class _Group:
    """Compiled candidates on their way to measurements."""

    runner: LocalRunner
    opened: _Open
    folder: Path
    schedules: list[str]
    made: list[Made]

    def measure(self) -> list[Measurement]:
        candidates, refused = self.linked([self.opened.made or Made(), *self.made])
        baseline = self.checked(candidates.get(0))
        found: dict[int, Measurement] = {}
        order = sorted(candidates, key=lambda i: sorted(candidates[i].code.packing.items()))
        for i in order:
            if i > 0:
                found[i] = self.one(self.schedules[i - 1], candidates[i], baseline)
        for i, error in refused.items():
            if i > 0:
                found[i] = Measurement(self.schedules[i - 1], "refused", error=error)
        return [self.with_facts(found[i + 1], made) for i, made in enumerate(self.made)]

    def linked(self, made: Sequence[Made]) -> tuple[dict[int, Candidate], dict[int, str]]:
        """Those that can be linked, and why others were refused; all together, or else one by one."""
        codes = {i: m.code for i, m in enumerate(made) if m.code is not None}
        refused = {i: m.error for i, m in enumerate(made) if m.code is None}
        target = parse_target(self.opened.workload.target)
        try:
            library, names = link_trials(list(codes.values()), self.folder, target) if codes else (Path(), [])
            return {i: Candidate(str(library), n, c) for n, (i, c) in zip(names, codes.items())}, refused
        except TilewrightError:
            pass
        candidates = {}
        for i, code in codes.items():
            folder = self.folder / str(i)
            folder.mkdir()
            try:
                library, (name,) = link_trials([code], folder, target)
                candidates[i] = Candidate(str(library), name, code)
            except TilewrightError as error:
                refused[i] = str(error)
        return candidates, refused

    def checked(self, baseline: Candidate | None) -> Candidate | None:
        """The baseline when it is right, which is looked at once."""
        if baseline is None:
            return None
        if not self.opened.sound:
            self.opened.sound = self.runner.ask(self.opened, baseline, None)["status"] == "ok"
        return baseline if self.opened.sound else None

    def one(self, schedule: str, candidate: Candidate, baseline: Candidate | None) -> Measurement:
        key = (self.opened.workload.key, digest(candidate.code), self.runner.spent)
        known = self.runner.known.get(key)
        if known is not None and known.schedule != schedule and known.baseline is not None:
            return replace(known, schedule=schedule)
        answer = self.runner.ask(self.opened, candidate, baseline)
        fields = {k: answer[k] for k in ("seconds", "spread", "repeats", "baseline", "error") if k in answer}
        measured = Measurement(schedule, answer["status"], **fields)
        self.runner.known[key] = measured
        return measured

    def with_facts(self, measurement: Measurement, made: Made) -> Measurement:
        metrics = {**made.facts, "bytes_moved": float(self.opened.bytes_moved)}
        return replace(measurement, metrics=metrics if made.code is not None else {})


def digest(code: KernelCode) -> str:
    """A hash of the code and of how it is called."""
    return hashlib.sha256(json.dumps(encode(code), sort_keys=True).encode()).hexdigest()


def check_host(workload: Workload) -> None:
    """Raises MeasuringError when this machine cannot run code for the workload's target."""
    target, host = parse_target(workload.target), host_target()
    if missing := sorted(target.features - host.features):
        raise MeasuringError(f"cannot measure for {target} here: this processor lacks {', '.join(missing)}; measure on "
                             "such a machine, or tune for target native")  # fmt: skip


def _close(compiler: Compiler, server: Helper) -> None:
    compiler.close()
    server.close()
