"""What default schedules and tuning are worth: kernel by kernel, and for a whole model."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter

import tilewright
from benchmarks.peers.figures import Spread
from benchmarks.peers.peer import prompt
from benchmarks.peers.shapes import Shape
from tilewright.codegen.store import compiler_version
from tilewright.costmodel.choice import decide
from tilewright.costmodel.database import Database
from tilewright.costmodel.model import CostModel
from tilewright.costmodel.picks import pick
from tilewright.costmodel.workload import Measurement, Runner, Task

_LONG = 4.0


@dataclass(frozen=True)
class KernelWorth:
    """Times of one kernel relative to the schedule by rule: as picked without measuring, and as tuned."""

    name: str
    family: str
    weight: float
    picked: float
    tuned: float

    @property
    def share(self) -> float:
        """How near the default comes to the tuned time."""
        return min(1.0, self.tuned / self.picked)


def kernels(tasks: Sequence[Task], model: CostModel, database: Database, runner: Runner) -> list[KernelWorth]:
    """Defaults beside tuned schedules, for tasks that the database knows; what is missing is measured."""
    found = []
    known = [dict(database.find(task.workload, compiler_version())) for task in tasks]
    for task, own, best, picked in zip(tasks, known, decide(tasks, known), pick(tasks, model)):
        default = task.space.default.text
        if default not in own:
            continue
        text = picked.choice.text if picked else default
        if text not in own and text != default:
            measured = runner.measure(task.workload, default, [text], _LONG)
            database.add(task.workload, compiler_version(), measured)
            own |= {m.schedule: m for m in measured}
        seconds = (own[default].baseline or 0.0) * task.weight
        ratio = _ratio(own.get(text)) if text != default else 1.0
        found.append(KernelWorth(task.name, task.workload.family, seconds, ratio, _ratio(best) if best else 1.0))
    return found


def _ratio(m: Measurement | None) -> float:
    return m.ratio if m is not None and m.ratio is not None else math.inf


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def end_to_end(shape: Shape, folder: Path, passes: str, dtype: str, choices: dict[str, dict[str, object]], rounds: int
               ) -> dict[str, dict[str, Spread]]:  # fmt: skip
    """Tokens a second of prefill and decode with each way to choose schedules, taken in turns.

    ``choices`` gives arguments of ``tilewright.compile`` by name.
    """
    speeds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in choices}
    with tempfile.TemporaryDirectory() as out:
        sessions = {}
        for name, more in choices.items():
            path = Path(out, name)
            tilewright.compile(folder, passes=passes, dtype=dtype, max_length=1024, out=path, **more)  # type: ignore[arg-type]
            sessions[name] = tilewright.load(path).session()
        for i in range(rounds + 1):
            for name, session in sessions.items():
                for kind, speed in turn(session, shape, i).items():
                    speeds[name][kind] += [speed] if i else []
        for session in sessions.values():
            session.close()
    return {name: {kind: Spread(tuple(v)) for kind, v in found.items()} for name, found in speeds.items()}


def turn(session: tilewright.Session, shape: Shape, seed: int) -> dict[str, float]:
    """Tokens a second, once: a prompt of 512 tokens; 64 tokens after a prompt of 128."""
    times = _times(session, prompt(shape, 512, seed), 1)
    steps = _times(session, prompt(shape, 128, seed), 65)
    return {"prefill": 512 / times[0], "decode": 1 / median(b - a for a, b in pairwise(steps))}


def _times(session: tilewright.Session, ids: list[int], count: int) -> list[float]:
    times: list[float] = []
    start = perf_counter()
    session.generate([ids], count, callback=lambda step, new: times.append(perf_counter() - start))
    return times
