"""The process in which one workload of a bundle runs: what a kernel does to it, or to the GPU, ends with it.

    python -m tilewright.runtime.bundle.worker

reads a request from its input and writes lines of JSON: the GPU, then for each candidate that it tries it and what came of
it. A process that cannot go on says so, or just ends; another one gets the candidates that are left.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tilewright.runtime.bundle.arrays import Arrays, open_bundle
from tilewright.runtime.bundle.format import CandidateSpec
from tilewright.runtime.bundle.trial import Bench, Kernel
from tilewright.runtime.cuda import Device
from tilewright.runtime.errors import ArtifactError, DeviceError
from tilewright.runtime.loader import cuda_arch

Say = Callable[[dict[str, Any]], None]
BASELINE = 0
"""The candidate that the others are timed beside."""


@dataclass(frozen=True)
class Request:
    """Candidates ``todo`` of a workload; with None as workload the GPU is looked at and nothing else.

    ``seconds`` is the time to spend on timing each, None for none at all; ``baseline``: whether to have that beside them.
    """

    folder: str
    device: int
    driver: str | None
    workload: int | None = None
    todo: tuple[int, ...] = ()
    baseline: bool = False
    seconds: float | None = None


def serve(request: Request, say: Say) -> None:
    """Do what is asked. Raises ArtifactError, DeviceError and MemoryError for what no candidate is to blame for."""
    folder = Path(request.folder)
    bundle = open_bundle(folder, verify=False)  # the asking process has done that
    device = Device(request.device, request.driver)
    device.check_arch(cuda_arch(bundle.target) or bundle.target, str(folder))
    say({"device": device.name, "driver": device.version, "memory": device.free()[1]})
    if request.workload is None:
        return
    workload = bundle.workloads[request.workload]
    _Work(Bench(device, folder, Arrays(folder, bundle), workload), request, workload.candidates, say).run()


@dataclass
class _Work:
    """The candidates of a request, on their way."""

    bench: Bench
    request: Request
    candidates: tuple[CandidateSpec, ...]
    say: Say
    baseline: Kernel | None = None

    def run(self) -> None:
        todo = self.request.todo
        for index in (BASELINE, *todo) if self.request.baseline and BASELINE not in todo else todo:
            self.say({"trying": index})
            outcome = self.outcome(index)
            self.say({"tried": index, **outcome})
            if outcome["status"] == "crashed" and not self.bench.alive():
                return

    def outcome(self, index: int) -> dict[str, Any]:
        """The fields of a measurement."""
        try:
            return self.measured(index, self.bench.load(self.candidates[index]))
        except MemoryError as error:
            return {"status": "refused", "error": str(error)}
        except DeviceError as error:
            return {"status": "crashed", "error": str(error)}

    def measured(self, index: int, kernel: Kernel) -> dict[str, Any]:
        if complaint := self.bench.check(kernel):
            return {"status": "wrong", "error": complaint}
        if index == BASELINE:
            self.baseline = kernel
        if self.request.seconds is None or index not in self.request.todo:
            return {"status": "ok"}
        timing = self.bench.time(kernel, self.baseline, self.request.seconds)
        if isinstance(timing, str):
            return {"status": "wrong", "error": f"not always: {timing}"}
        return {"status": "ok", **asdict(timing)}


def main() -> None:
    """Serves one request."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no reply

    def say(what: dict[str, Any]) -> None:
        replies.write(json.dumps(what) + "\n")
        replies.flush()

    given = json.loads(sys.stdin.readline())
    try:
        serve(Request(**given | {"todo": tuple(given["todo"])}), say)
    except (ArtifactError, DeviceError, MemoryError) as error:
        say({"failed": str(error)})


if __name__ == "__main__":
    main()
