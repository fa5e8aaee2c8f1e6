"""Runs jobs: one process at a time, limits of the machine before each, every sample written at once."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.peer import Peer
from benchmarks.peers.plan import Job, rounds
from benchmarks.peers.results import Results, Sample
from benchmarks.peers.tasks import TASKS
from benchmarks.peers.worker import request
from benchmarks.peers.workplace import Workplace

PATIENCE = 600
"""Seconds after which a process is given up."""


class Limits:
    """A process that measures bandwidth and peak arithmetic when asked."""

    def __init__(self, place: Workplace, prefix: Sequence[str], threads: int) -> None:
        command = [*prefix, str(place.own_python), "-m", "benchmarks.limits", "--serve", "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        cwd=place.cache, env=place.worker_environment)  # fmt: skip

    def __call__(self) -> dict[str, float]:
        """Bytes or operations a second by name."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the measurement of the machine's limits ended; see above")
        return dict(json.loads(line))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass(frozen=True)
class Runner:
    """Measures with ``peers`` at ``threads`` threads; ``prefix`` goes before each command (``chrt -f 1``)."""

    place: Workplace
    peers: Mapping[str, Peer]
    threads: int
    prefix: tuple[str, ...] = ()
    say: Callable[[str], None] = print

    def run(self, jobs: Sequence[Job], repeats: int, results: Results) -> None:
        """All rounds of all jobs that ``results`` does not have yet."""
        limits = Limits(self.place, self.prefix, self.threads)
        try:
            for number, job in rounds(jobs, repeats):
                at = (job.model, job.system, job.variant.name, number)
                tasks = results.missing(at, job.tasks)
                if tasks and not is_beaten(job, results.samples):
                    results.append({**self.measure(job, tasks, limits()), "round": number})
        finally:
            limits.close()

    def measure(self, job: Job, tasks: Sequence[str], limits: dict[str, float]) -> Sample:
        """One sample; what went wrong is its ``error``."""
        start = time.perf_counter()
        sample: Sample = {"model": job.model, "system": job.system, "variant": job.variant.name, "family": job.family,
                          "at": time.strftime("%Y-%m-%dT%H:%M:%S"), "limits": limits}  # fmt: skip
        try:
            sample |= self._worker(job, tasks)
        except (subprocess.TimeoutExpired, RuntimeError) as error:
            sample["error"] = str(error)[-600:]
        sample["wall_seconds"] = round(time.perf_counter() - start, 2)
        self.say(describe(job, sample))
        return sample

    def _worker(self, job: Job, tasks: Sequence[str]) -> dict[str, Any]:
        peer, more = self.peers[job.system], {"tasks": list(tasks), "threads": self.threads}
        text = request("measure", self.place, job.system, job.model, job.variant.name, **more)
        command = [*self.prefix, str(peer.python(self.place)), "-m", "benchmarks.peers.worker", text]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=self.place.cache,
                              env=self.place.worker_environment)  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr or f"exit code {done.returncode}")
        return dict(json.loads(done.stdout.splitlines()[-1]))


def is_beaten(job: Job, samples: Sequence[Sample]) -> bool:
    """Whether a sibling of the same family was faster in every task of the first round."""
    family = (job.model, job.system, job.family)
    first = [s for s in samples if s["round"] == 0 and "seconds" in s and (s["model"], s["system"], s["family"]) == family]
    own = next((s["seconds"] for s in first if s["variant"] == job.variant.name), None)
    others = [s["seconds"] for s in first if s["variant"] != job.variant.name]
    if own is None:
        return False
    return any(all(task in other and other[task] < own[task] for task in own) for other in others)


def describe(job: Job, sample: Sample) -> str:
    """A line on what was measured."""
    if "error" in sample:
        return f"{job}: failed: {sample['error'].splitlines()[-1]}"
    figures = [f"{task} {TASKS[task].figure(value):.4g} {TASKS[task].unit}" for task, value in sample["seconds"].items()]
    others = max(sample["others"].values())
    return f"{job}: {', '.join(figures)} ({sample['wall_seconds']:.0f} s; other processes {others:.0%})"
