"""Times schedules of one kernel as `tilewright.measuring` does, a sample whenever it is asked for one.

Requests: ``load`` (workload, schedules by name, seconds), then ``sample`` (name).
"""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tilewright.codegen.target import parse_target
from tilewright.codegen.trial import Launcher, link_trials, shim
from tilewright.costmodel.measurement import Probe
from tilewright.costmodel.workload import Workload
from tilewright.measuring_bench import Bench
from tilewright.measuring_compile import Compilers
from tilewright.measuring_helper import serve
from tilewright.measuring_inputs import Subject
from tilewright.measuring_trial import Candidate, Results


class Server:
    """Answers requests; the kernels' results are compared with the reference first."""

    def __init__(self) -> None:
        self.timers: dict[str, Probe] = {}
        self.folder = tempfile.TemporaryDirectory()

    def answer(self, request: Mapping[str, Any], _: bytes = b"") -> tuple[Mapping[str, Any], bytes]:
        try:
            return getattr(self, request["do"])(**request["with"]), b""
        except Exception:
            return {"error": traceback.format_exc()}, b""

    def load(self, workload: dict[str, Any], schedules: dict[str, str], seconds: float) -> dict[str, Any]:
        given = Workload(**{**workload, "sizes": tuple(map(tuple, workload["sizes"]))})
        target = parse_target(given.target)
        bench = Bench.make(Subject.parse(given.kernel, dict(given.sizes), target), given.threads)
        launcher = Launcher(shim(target), given.threads)
        for name, candidate in self.candidates(given, schedules).items():
            bench.prepare(candidate.code)
            results = Results(bench)
            run = results.launch(launcher, candidate)
            run(1)
            if complaint := results.complaint():
                raise ValueError(f"{schedules[name]}: {complaint}")
            self.timers[name] = Probe(run, time.perf_counter, seconds)
            self.timers[name].warm(float("inf"))
        return {"copies": bench.copies}

    def candidates(self, workload: Workload, schedules: Mapping[str, str]) -> dict[str, Candidate]:
        compilers = Compilers(1)
        try:
            made = compilers.compile(workload, list(schedules.values()))
        finally:
            compilers.close()
        codes = [m.code for m in made if m.code is not None]
        if len(codes) < len(made):
            raise ValueError("; ".join(m.error for m in made if m.error))
        library, names = link_trials(codes, Path(self.folder.name), parse_target(workload.target))
        return {key: Candidate(str(library), name, code) for key, name, code in zip(schedules, names, codes)}

    def sample(self, name: str) -> dict[str, float]:
        timer = self.timers[name]
        timer.take()
        return {"seconds": timer.seconds[-1]}


if __name__ == "__main__":
    serve(Server().answer)
