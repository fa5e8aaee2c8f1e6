"""What default schedules and tuning are worth: kernel by kernel, and for a whole model."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import typer

import tilewright
from benchmarks.peers.figures import Spread
from benchmarks.peers.peer import prompt
from benchmarks.peers.shapes import SHAPES, Shape
from benchmarks.peers.workplace import ROOT, Workplace, default_cache
from tilewright.codegen.store import compiler_version
from tilewright.codegen.target import host_target
from tilewright.costmodel.choice import decide
from tilewright.costmodel.database import Database
from tilewright.costmodel.model import CostModel
from tilewright.costmodel.picks import pick
from tilewright.costmodel.shipped import load_model
from tilewright.costmodel.workload import Measurement, Runner, Task
from tilewright.measuring import LocalRunner
from tilewright.runtime.host import default_threads
from tilewright.tuning import module_of, tunable
from tilewright.workloads import host_name

_LONG = 4.0
CAPACITY = 1024


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


RECIPES = {"S": ("w8a8", "bf16"), "M": ("w4a8", "bf16"), "L": ("w4a8", "bf16"), "E": ("O2", "f32")}
"""How each model is compiled: passes and element type."""


DB = default_cache() / "tuning" / "worth.db"


def worth(
    models: Annotated[str, typer.Option("--models", "-m", help="Some of S,M,L,E.")] = "S,M,L,E",
    budget: Annotated[str, typer.Option(help="Time to tune each of them.")] = "10m",
    db: Annotated[Path, typer.Option("--db", help="Where measurements are kept.")] = DB,
    rounds: Annotated[int, typer.Option(help="Turns of the whole models.")] = 15,
    out: Path = ROOT / "benchmarks" / "results" / "tuning.json",
) -> None:
    """Tune models (made by `python -m benchmarks.peers models`) and compare schedules: by rule, as predicted, as tuned."""
    results = json.loads(out.read_text()) if out.exists() else {}
    for name in models.split(","):
        results[name] = one(SHAPES[name], budget, db, rounds)
        out.write_text(json.dumps(results, indent=1) + "\n")
        out.with_suffix(".md").write_text(page(results))
        typer.echo(page({name: results[name]}))


def one(shape: Shape, budget: str, db: Path, rounds: int) -> dict[str, Any]:
    """What tuning one model gives."""
    folder, (passes, dtype) = Workplace(default_cache()).model(shape.name) / "hf", RECIPES[shape.name]
    length = None if shape.is_encoder else CAPACITY
    sizes = {"B": 1, "S": 128} if shape.is_encoder else {"B": 1, "S": 512}
    more: dict[str, Any] = {"passes": passes, "dtype": dtype, "max_length": length}
    result = tilewright.tune(folder, **more, sizes=sizes, budget=budget, db=db, resume=True)
    target = host_target()
    module = module_of(folder, (), {}, None, passes, length, dtype, None, target)
    tasks = tunable(module, target, default_threads(), sizes)
    with Database(db) as database, LocalRunner() as runner:
        rows = kernels(tasks, load_model(), database, runner)
    choices = {"rule": {"cost_model": None}, "predicted": {}, "tuned": {"db": db}}
    speeds = end_to_end(shape, folder, more, {name: {**given, "sizes": sizes} for name, given in choices.items()}, rounds)
    return {
        "recipe": f"{passes} {dtype}", "trials": result.trials, "seconds": round(result.seconds),
        "date": datetime.now(UTC).date().isoformat(), "host": host_name(),
        "kernels": [{**asdict(row), "share": row.share} for row in rows],
        "default_of_tuned": geometric_mean([row.share for row in rows]),
        "slower_than_default": [row.name for row in rows if row.tuned > row.picked],
        "end_to_end": {name: {kind: asdict(spread) for kind, spread in found.items()} for name, found in speeds.items()},
    }  # fmt: skip


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    parts = [
        "# Schedules: by rule, as the cost model predicts, and as tuned",
        "`default / tuned` is the geometric mean over kernels of the tuned time over that of the schedule that `compile` "
        "takes unmeasured. Speeds of whole models are relative to schedules by rule: the median of what is taken in turns.",
        "| model | trials | default / tuned | kernels | predicted: prefill, decode | tuned: prefill, decode |\n"
        "| --- | --- | --- | --- | --- | --- |\n" + "\n".join(_line(name, r) for name, r in results.items()),
    ]
    for name, r in results.items():
        rows = [f"| {k['name']} | {k['weight'] * 1e3:.2f} | {k['picked']:.3f} | {k['tuned']:.3f} |" for k in r["kernels"]]
        head = "| kernel | ms in all | predicted / rule | tuned / rule |\n| --- | --- | --- | --- |\n"
        parts += [f"## {name}, {r['recipe']}, {r['date']}, {r['host']}", head + "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def _line(name: str, result: Mapping[str, Any]) -> str:
    speeds = {way: {kind: s["values"] for kind, s in found.items()} for way, found in result["end_to_end"].items()}
    relative = [", ".join(f"{beside(speeds[way][kind], speeds['rule'][kind]):.3f}" for kind in speeds[way])
                for way in ("predicted", "tuned")]  # fmt: skip
    cells = [name, str(result["trials"]), f"{result['default_of_tuned']:.3f}", str(len(result["kernels"])), *relative]
    return f"| {' | '.join(cells)} |"


def beside(speeds: Sequence[float], others: Sequence[float]) -> float:
    """The median ratio of what was measured in the same turn: the speed of memory changes within seconds."""
    return median(a / b for a, b in zip(speeds, others))


def _ratio(m: Measurement | None) -> float:
    return m.ratio if m is not None and m.ratio is not None else math.inf


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def end_to_end(shape: Shape, folder: Path, options: Mapping[str, Any], choices: Mapping[str, Mapping[str, Any]],
               rounds: int) -> dict[str, dict[str, Spread]]:  # fmt: skip
    """Speeds of a model with each way to choose schedules, taken in turns; ``choices`` are arguments of ``compile``."""
    speeds: dict[str, dict[str, list[float]]] = {name: {} for name in choices}
    with tempfile.TemporaryDirectory() as out, ExitStack() as stack:
        sessions = {}
        for name, more in choices.items():
            tilewright.compile(folder, **options, **more, out=Path(out, name))
            sessions[name] = stack.enter_context(tilewright.load(Path(out, name)).session())
        for i in range(rounds + 1):
            for name, session in sessions.items():
                measured = encoded(session, shape, i) if shape.is_encoder else turn(session, shape, i)
                for kind, speed in measured.items():
                    speeds[name].setdefault(kind, []).extend([speed] if i else [])
    return {name: {kind: Spread(tuple(v)) for kind, v in found.items()} for name, found in speeds.items()}


def encoded(session: tilewright.Session, shape: Shape, seed: int) -> dict[str, float]:
    """Texts a second, one of 128 tokens at a time."""
    ids = np.array([prompt(shape, 128, seed)], np.int64)
    start = perf_counter()
    for _ in range(8):
        session("forward", input_ids=ids, attention_mask=np.ones_like(ids))
    return {"encode": 8 / (perf_counter() - start)}


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
