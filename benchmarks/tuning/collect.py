"""Measure schedules of many kernels, into a database and then the dataset's file; goes on where it stopped."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.tuning.zoo import workloads
from tilewright.codegen.store import compiler_version
from tilewright.codegen.target import CpuTarget
from tilewright.costmodel.database import Database
from tilewright.costmodel.dataset import Dataset
from tilewright.costmodel.features import Sample, Trials
from tilewright.costmodel.workload import Choice, Measurement, Runner, Task, Workload
from tilewright.ir import TilewrightError
from tilewright.workloads import task_of

_NEAR = 0.5
"""Share of the schedules that are near the default; the others are any."""


def gather(path: Path, target: CpuTarget, threads: int, count: int, seed: int) -> list[Workload]:
    """The workloads of ``count`` models, kept in ``path``."""
    if not path.exists():
        found = [vars(w) for w in workloads(target, threads, count, seed)]
        names = ("family", "kernel", "sizes", "target", "threads", "host")
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        beside.write_text("\n".join(json.dumps({name: w[name] for name in names}) for w in found))
        beside.rename(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [Workload(**{**line, "sizes": tuple(map(tuple, line["sizes"]))}) for line in lines]


def drawn(task: Task, count: int, seed: int) -> list[Choice]:
    """The default and up to ``count`` other schedules."""
    default = task.space.default
    rng = np.random.default_rng([seed, int(task.workload.key[:16], 16)])
    whole = list(islice(task.space, count + 2))
    if len(whole) <= count + 1:
        return list({c.text: c for c in (default, *whole)}.values())
    found = {default.text: default}
    for _ in range(50 * count):
        choice = task.space.sample(rng)
        if rng.random() < _NEAR:
            choice = task.space.mutate(task.space.mutate(default, rng), rng)
        found.setdefault(choice.text, choice)
        if len(found) > count:
            break
    return list(found.values())


def measure(all_workloads: Sequence[Workload], database: Database, runner: Runner, count: int, seed: int,
            say: Callable[[str], None] = print) -> None:  # fmt: skip
    """Measure ``count`` schedules of each workload that the database does not have yet."""
    compiler, start = compiler_version(), time.perf_counter()
    order = np.random.default_rng(seed).permutation(len(all_workloads))
    for done, i in enumerate(order):
        workload = all_workloads[i]
        task = task_of(workload)
        known = database.find(workload, compiler)
        missing = [choice.text for choice in drawn(task, count, seed) if choice.text not in known]
        if not missing:
            continue
        try:
            found = runner.measure(workload, task.space.default.text, missing)
        except TilewrightError as error:
            say(f"{workload.family} {workload.key}: left out: {error}")
            continue
        database.add(workload, compiler, found)
        say(f"{done + 1}/{len(order)} {time.perf_counter() - start:.0f} s {workload.family} {describe(found)}")


def describe(found: Sequence[Measurement]) -> str:
    ratios = [m.ratio for m in found if m.ratio]
    counts = dict(Counter(m.status for m in found))
    return f"{counts} best {min(ratios, default=0):.2f} worst {max(ratios, default=0):.2f}"


def dataset(database: Database, compiler: str) -> Dataset:
    """Everything that the database has from ``compiler``, with features."""
    by_workload: dict[Workload, list[Measurement]] = {}
    for row in database.rows(compiler):
        by_workload.setdefault(row.workload, []).append(row.measurement)
    return Dataset.of([trials(workload, found) for workload, found in by_workload.items()], compiler)


def trials(workload: Workload, found: Sequence[Measurement]) -> Trials:
    """Measurements of a workload with the features of their schedules, rounded to what a float of the trees holds."""
    task = task_of(workload)
    samples = []
    for m in found:
        choice = task.space.parse(m.schedule)
        if choice is not None:
            features = {name: float(np.float32(value)) for name, value in task.features(choice).items()}
            samples.append(Sample(features, m))
    return Trials(workload, tuple(samples), task.space.default.text)
