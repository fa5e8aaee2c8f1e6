"""Runs a bundle: a process for each workload, another one where a candidate ended it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tilewright.runtime.bundle.arrays import open_bundle
from tilewright.runtime.bundle.results import Outcome, Results, outcome_of
from tilewright.runtime.bundle.worker import BASELINE, Request
from tilewright.runtime.errors import DeviceError

_OPENING = 600.0
"""Seconds that loading the driver and uploading a workload may take."""
_SHARE = 0.5  # of the time left that goes to timing candidates themselves
_LONGEST = 2.0  # seconds for one candidate, whatever the budget


class LateError(Exception):
    """A process said nothing for too long."""


@dataclass(frozen=True)
class Options:
    """``budget``: seconds for all; None checks what is right and times nothing. ``timeout``: seconds for one candidate."""

    device: int = 0
    driver: str | None = None
    budget: float | None = 300.0
    timeout: float = 30.0


@dataclass
class Run:
    """Measures a bundle. ``show`` is told how far it is; ``keep`` is called when a workload is through."""

    folder: Path
    options: Options
    show: Callable[[str], None] = lambda text: None
    keep: Callable[[Results], None] = lambda results: None
    started: float = field(default_factory=time.monotonic)

    def open(self) -> Results:
        """Check all files, and look at the GPU. Raises ArtifactError, DeviceError."""
        self.show("checking files")
        bundle = open_bundle(self.folder)
        about = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
        for said in self.worker(Request(str(self.folder.resolve()), self.options.device, self.options.driver)):
            if "failed" in said:
                raise DeviceError(said["failed"])
            about |= {"device": said["device"], "driver": f"CUDA {said['driver']}"}
        if "device" not in about:
            raise DeviceError("the process that looks at the GPU ended without an answer")
        results = Results(bundle, about | {"target": bundle.target, "compiler": bundle.compiler[:12]})
        for w, workload in enumerate(bundle.workloads):
            refused = {i: c.refused for i, c in enumerate(workload.candidates) if c.refused}
            results.outcomes |= {(w, i): Outcome("refused", reason) for i, reason in refused.items()}
        return results

    def measure(self, results: Results) -> None:
        """Try every candidate. What is known when this is interrupted is in ``results``."""
        for w in range(len(results.bundle.workloads)):
            self.workload(results, w)
            self.keep(results)

    def workload(self, results: Results, index: int) -> None:
        """The candidates of one workload, the baseline first; a process for as many as it survives."""
        todo = [i for i, c in enumerate(results.bundle.workloads[index].candidates) if not c.refused]
        while todo:
            left = len(todo)
            self.follow(results, index, todo)
            if len(todo) == left:
                results.skipped.setdefault(index, "the process ended before it came to what is left")
                return

    def request(self, results: Results, index: int, todo: list[int]) -> Request:
        baseline = results.outcomes.get((index, BASELINE))
        sound = baseline is None or baseline.status == "ok"
        return Request(str(self.folder.resolve()), self.options.device, self.options.driver, index, tuple(todo), sound,
                       self.share(results))  # fmt: skip

    def share(self, results: Results) -> float | None:
        """Seconds for timing one candidate."""
        if self.options.budget is None:
            return None
        wanted = sum(len(w.candidates) for w in results.bundle.workloads) - len(results.outcomes)
        left = self.options.budget - (time.monotonic() - self.started)
        return min(max(_SHARE * left / max(wanted, 1), 0.0), _LONGEST)

    def follow(self, results: Results, index: int, todo: list[int]) -> None:
        """Start a process and take what it says; what was tried is no longer ``todo``, nor what the process died of."""
        current: int | None = None
        why = Outcome("crashed", "the process ended")
        try:
            for said in self.worker(self.request(results, index, todo)):
                if "failed" in said:
                    results.skipped[index] = str(said["failed"])
                if "trying" in said:
                    current = int(said["trying"])
                    self.show(f"{results.verdict()}; {results.bundle.workloads[index].name}")
                if "tried" in said:
                    current = None
                    take(results, index, int(said["tried"]), outcome_of(said), todo)
        except LateError as error:
            why = Outcome("timeout", str(error))
        if current is not None:
            take(results, index, current, why, todo)

    def worker(self, request: Request) -> Iterator[dict[str, Any]]:
        """What a process with ``request`` says. Raises LateError; the process has ended afterwards in any case."""
        command = [sys.executable, "-m", "tilewright.runtime.bundle.worker"]
        path = os.pathsep.join(p for p in sys.path if p)
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
                                   env=os.environ | {"PYTHONPATH": path})  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(asdict(request)).encode() + b"\n")
            process.stdin.close()
            yield from self.lines(process.stdout.fileno())
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()

    def lines(self, reader: int) -> Iterator[dict[str, Any]]:
        """Lines of JSON, until there are no more. Raises LateError."""
        left, seconds = b"", _OPENING
        while True:
            if not select.select([reader], [], [], seconds)[0]:
                raise LateError(f"not through after {seconds:g} s")
            part = os.read(reader, 1 << 16)
            if not part:
                return
            *whole, left = (left + part).split(b"\n")
            for text in whole:
                said = json.loads(text)
                seconds = self.options.timeout if "trying" in said else _OPENING
                yield said


def take(results: Results, workload: int, candidate: int, outcome: Outcome, todo: list[int]) -> None:
    """Take note of an outcome; that of a baseline which is tried again says nothing new."""
    if candidate in todo:
        todo.remove(candidate)
        results.outcomes[workload, candidate] = outcome
