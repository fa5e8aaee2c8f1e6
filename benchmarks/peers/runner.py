"""Runs jobs in turns: all models of a group are loaded, one works at a time, limits are measured around each sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from benchmarks.peers.peer import Peer
from benchmarks.peers.plan import Job, groups, turns
from benchmarks.peers.process import Process, ProcessError
from benchmarks.peers.results import Results, Sample
from benchmarks.peers.shapes import SHAPES
from benchmarks.peers.systems import OWN
from benchmarks.peers.tasks import TASKS
from benchmarks.peers.worker import request
from benchmarks.peers.workplace import Workplace

RECENT = 0.5
"""Seconds for which limits count as measured just now."""
SLOW = 2.0
"""A peer that takes this many times as long as another one in the first round is not measured again."""


class Limits:
    """A process that measures bandwidth and peak arithmetic when asked."""

    def __init__(self, place: Workplace, prefix: Sequence[str], threads: int) -> None:
        command = [*prefix, str(place.own_python), "-m", "benchmarks.limits", "--serve", "--threads", str(threads)]
        self.process = Process(place, command)
        self.latest: dict[str, float] = {}
        self.at = float("-inf")

    def __call__(self) -> dict[str, float]:
        """Giga bytes or operations a second by name."""
        if time.perf_counter() - self.at > RECENT:
            try:
                measured = self.process.ask({})
            except ProcessError as error:
                raise RuntimeError(f"the measurement of the machine's limits failed: {error}") from error
            self.latest, self.at = {name: round(value / 1e9, 1) for name, value in measured.items()}, time.perf_counter()
        return self.latest

    def close(self) -> None:
        self.process.close()


class Worker:
    """A process with the model of ``job`` loaded."""

    def __init__(self, runner: Runner, job: Job) -> None:
        command = [*runner.prefix, str(runner.peers[job.system].python(runner.place)), "-m", "benchmarks.peers.worker"]
        self.process = Process(runner.place, command)
        asked = request("load", runner.place, job.system, job.model, job.variant.name, threads=runner.threads)
        self.loaded = self.process.ask(asked)

    def measure(self, task: str) -> dict[str, Any]:
        return self.loaded | self.process.ask({"do": "measure", "task": task})

    def close(self) -> None:
        self.process.close()


@dataclass(frozen=True)
class Runner:
    """Measures with ``peers`` at ``threads`` threads; ``prefix`` goes before each command (``chrt -f 1``)."""

    place: Workplace
    peers: Mapping[str, Peer]
    threads: int
    prefix: tuple[str, ...] = ()
    say: Callable[[str], None] = print
    workers: dict[Job, Worker] = field(default_factory=dict, init=False)
    """Those that are loaded, the one that worked last at the end."""

    def run(self, jobs: Sequence[Job], repeats: int, results: Results) -> None:
        """All rounds of all jobs that ``results`` does not have yet; what failed is not tried again in this run."""
        with closing(Limits(self.place, self.prefix, self.threads)) as limits:
            for group in groups(jobs):
                try:
                    self._take_turns(group, repeats, results, limits)
                finally:
                    while self.workers:
                        self._close_one()

    def _take_turns(self, group: Sequence[Job], repeats: int, results: Results, limits: Limits) -> None:
        failed = set()
        for number, task, job in turns(group, repeats):
            at = (job.model, job.system, job.variant.name, task, number)
            if (job, task) in failed or results.has(at) or is_beaten(job, task, group, results.samples):
                continue
            sample = self.measure(job, task, limits) | {"round": number}
            results.append(sample)
            if "error" in sample:
                failed.add((job, task))

    def measure(self, job: Job, task: str, limits: Limits) -> Sample:
        """One sample; what went wrong is its ``error``."""
        sample: Sample = {"model": job.model, "system": job.system, "variant": job.variant.name, "task": task,
                          "at": time.strftime("%Y-%m-%dT%H:%M:%S")}  # fmt: skip
        try:
            worker = self._worker(job)
            before = limits()
            sample |= worker.measure(task)
            after = limits()
            sample["limits"] = {name: [before[name], after[name]] for name in before}
            self.workers[job] = worker
        except ProcessError as error:
            sample["error"] = str(error)
        self.say(describe(job, sample))
        return sample

    def _worker(self, job: Job) -> Worker:
        """The worker of ``job``, taken out of ``workers``; a new one if it is not there."""
        if job in self.workers:
            return self.workers.pop(job)
        peer, shape = self.peers[job.system], SHAPES[job.model]
        needed = 2 * size(peer.path(self.place, shape, job.variant)) + 2**30
        while self.workers and free_memory() < needed:
            self._close_one()
        return Worker(self, job)

    def _close_one(self) -> None:
        """Close the worker that waited longest."""
        self.workers.pop(next(iter(self.workers))).close()


def is_beaten(job: Job, task: str, group: Sequence[Job], samples: Sequence[Sample]) -> bool:
    """Whether the first round showed that a peer is not the fastest, so that there is no need to measure it again.

    Either a variant of the same family was faster in every task, or another peer, with weights as wide, was more than
    ``SLOW`` times as fast in this one.
    """
    own = first_round(job, samples)
    if job.system == OWN or task not in own:
        return False
    for other in group:
        seconds = first_round(other, samples)
        is_sibling = other != job and (other.system, other.family) == (job.system, job.family)
        if is_sibling and all(name in own and seconds.get(name, inf) < own[name] for name in job.tasks):
            return True
        is_rival = other.system not in (OWN, job.system) and other.variant.width == job.variant.width
        if is_rival and SLOW * seconds.get(task, inf) < own[task]:
            return True
    return False


def first_round(job: Job, samples: Sequence[Sample]) -> dict[str, float]:
    """Seconds by task."""
    mine = (job.model, job.system, job.variant.name, 0)
    return {s["task"]: s["seconds"] for s in samples
            if (s["model"], s["system"], s["variant"], s["round"]) == mine and "error" not in s}  # fmt: skip


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]))


def free_memory() -> int:
    """Bytes that processes could still have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("MemAvailable")]
    return int(line.split()[1]) * 1024


def describe(job: Job, sample: Sample) -> str:
    """A line on what was measured."""
    if "error" in sample:
        return f"{job} {sample['task']}: failed: {sample['error'].splitlines()[-1]}"
    task, (before, after) = TASKS[sample["task"]], sample["limits"]["read"]
    return (f"{job} {sample['task']}: {task.figure(sample['seconds']):.4g} {task.unit} "
            f"(memory {before:.0f}, {after:.0f} GB/s; other processes {sample['others']:.0%})")  # fmt: skip
