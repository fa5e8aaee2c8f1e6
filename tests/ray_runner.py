"""A runner that runs nothing, and what it needs to be one of several on a Ray cluster: nodes import this file."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from tilewright.costmodel.workload import Measurement, Workload

HOST = "TW_TEST_HOST"  # each test node has its own value
LOG = "TW_TEST_LOG"


def identify() -> dict[str, str]:
    return {"host": os.environ.get(HOST, "AMD EPYC"), "compiler": "v1"}


class FakeRunner:
    """Seconds are the length of the text. ``die`` ends its process the first time, ``dead`` every time."""

    def measure(
        self, workload: Workload, baseline: str, schedules: Sequence[str], effort: float = 1.0
    ) -> list[Measurement]:
        return [self.one(workload, baseline, schedule) for schedule in schedules]

    def one(self, workload: Workload, baseline: str, schedule: str) -> Measurement:
        log = Path(os.environ[LOG])
        with log.open("a") as file:
            file.write(f"{os.environ['RAY_NODE']} {schedule}\n")
        if schedule == "dead" or (schedule == "die" and log.read_text().count(" die\n") == 1):
            os._exit(1)
        if schedule == "hang":
            time.sleep(1000)
        if schedule == "bug":
            raise ValueError("no such kernel")
        time.sleep(0.05)
        return Measurement(schedule, "ok", len(schedule) * 1e-3, 0.0, workload.threads, len(baseline) * 1e-3)
