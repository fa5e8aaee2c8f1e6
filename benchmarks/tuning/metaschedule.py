"""Beside TVM's MetaSchedule: as many trials for the same matrix products, then the best of both in turns.

MetaSchedule runs in a process of its own (`metaschedule_tvm`) and so do our kernels when they are timed
(`metaschedule_own`): while one works the others wait. Every call reads the next of many copies of the weight, the same
number for all.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.limits import PeakArithmetic, ReadBandwidth
from benchmarks.peers.environment import commit
from tilewright.codegen.store import compiler_version
from tilewright.codegen.target import CpuTarget
from tilewright.costmodel.database import Database
from tilewright.costmodel.model import CostModel
from tilewright.costmodel.picks import pick
from tilewright.costmodel.tuner import Budget, Tuner
from tilewright.costmodel.workload import Task
from tilewright.measuring import LocalRunner
from tilewright.measuring_helper import Helper
from tilewright.tuning import module_of, strategy
from tilewright.workloads import host_name, kernel_tasks

BATCH = 16
"""Trials after which either search learns from them."""
ROUNDS, SAMPLE = 15, 0.1
PAUSE = 0.5
"""Seconds before each sample: the threads of the one before look for work for a while, TVM's for tenths of a second."""
_HOURS = 3600.0
_FEW = 16
THEIRS, RULE, PICK, TUNED, GUIDED = "MetaSchedule", "by rule", "cost model", "tuned", "tuned, cost model"
Say = Callable[[str], None]


class MetaScheduleError(RuntimeError):
    """One of the processes could not do what it was asked to; the message has its traceback."""


@dataclass(frozen=True)
class Case:
    """y[rows, features] = x[rows, k] w[features, k]^T, all f32."""

    name: str
    rows: int
    features: int
    k: int

    @property
    def bound(self) -> str:
        """Which limit of the machine there is for it."""
        return "read" if self.rows < _FEW else "f32"

    @property
    def work(self) -> float:
        """Bytes of the weight, or operations."""
        return 4.0 * self.features * self.k if self.bound == "read" else 2.0 * self.rows * self.features * self.k


CASES = {case.name: case for case in (
    Case("gemm", 512, 2048, 2048), Case("gemv", 1, 5632, 2048), Case("gemm-small", 128, 1536, 576),
)}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How to compare."""

    trials: int
    seed: int
    threads: int
    target: CpuTarget
    model: CostModel | None


def compare(case: Case, plan: Plan, say: Say) -> dict[str, Any]:
    """Everything that the tables need of one case."""
    with ExitStack() as stack:
        theirs = stack.enter_context(worker("benchmarks.tuning.metaschedule_tvm"))
        own = stack.enter_context(worker("benchmarks.tuning.metaschedule_own"))
        shape = {"rows": case.rows, "features": case.features, "k": case.k}
        how = {"trials": plan.trials, "batch": BATCH, "seed": plan.seed + 1, "threads": plan.threads}
        found = {THEIRS: ask(theirs, "tune", **shape, **how)}
        say(f"{case.name}: MetaSchedule took {found[THEIRS]['wall']:.0f} s")
        task = task_of(case, plan)
        found |= schedules(task, plan, say)
        texts = {name: facts["schedule"] for name, facts in found.items() if name != THEIRS}
        loaded = ask(own, "load", workload=asdict(task.workload), schedules=texts, seconds=SAMPLE)
        ask(theirs, "load", copies=loaded["copies"], seconds=SAMPLE)
        runs = {name: lambda name=name: sample(theirs if name == THEIRS else own, name) for name in found}
        rounds = in_turns(runs, limit(case, plan))
    about = {"host": host_name(), "threads": plan.threads, "date": time.strftime("%Y-%m-%d"), "commit": commit()}
    return {**asdict(case), **about, "asked": plan.trials, "copies": loaded["copies"], "systems": found, "rounds": rounds}


@contextmanager
def worker(module: str) -> Iterator[Helper]:
    """A process that leaves none behind when it goes."""
    helper = Helper(module)
    try:
        yield helper
    finally:
        if helper.process is not None and helper.process.poll() is None:
            os.killpg(helper.process.pid, signal.SIGKILL)  # it leads a session of its own
        helper.close()


def ask(helper: Helper, do: str, **given: Any) -> dict[str, Any]:
    answer, _ = helper.ask({"do": do, "with": given}, seconds=_HOURS)
    if "error" in answer:
        raise MetaScheduleError(answer["error"])
    return answer


def sample(helper: Helper, name: str) -> float:
    return float(ask(helper, "sample", name=name)["seconds"])


def limit(case: Case, plan: Plan) -> Callable[[], float]:
    """Measures what the machine can do of the case's work in a second."""
    if case.bound == "read":
        return ReadBandwidth(plan.threads, 512 << 20)
    return PeakArithmetic(case.bound, plan.target, plan.threads)


def in_turns(runs: Mapping[str, Callable[[], float]], peak: Callable[[], float]) -> list[dict[str, float]]:
    """Rounds of one sample of each, whoever began being the last in the next one."""
    rounds = []
    for i in range(ROUNDS):
        names = [*runs][i % len(runs) :] + [*runs][: i % len(runs)]
        rounds.append({name: rested(run) for name, run in (("peak", peak), *((name, runs[name]) for name in names))})
    return rounds


def rested(run: Callable[[], float]) -> float:
    time.sleep(PAUSE)
    return run()


# --- our schedules ----------------------------------------------------------------------------------------------------


def task_of(case: Case, plan: Plan) -> Task:
    """The kernel of a module with one ``nn.Linear``."""
    import torch

    layer, x = torch.nn.Linear(case.k, case.features, bias=False), torch.zeros(case.rows, case.k)
    module = module_of(layer, (x,), None, None, "O2", None, None, None, plan.target)
    [kernel] = kernel_tasks(module, plan.target)
    return kernel.task(plan.target, plan.threads)


def schedules(task: Task, plan: Plan, say: Say) -> dict[str, dict[str, Any]]:
    """By rule, of the cost model alone, and tuned without and with it."""
    found: dict[str, dict[str, Any]] = {RULE: {"schedule": task.space.default.text, "wall": 0.0, "trials": 0}}
    if plan.model is not None:
        start = time.perf_counter()
        [picked] = pick([task], plan.model)
        text = picked.choice.text if picked else task.space.default.text
        found[PICK] = {"schedule": text, "wall": time.perf_counter() - start, "trials": 0}
    for name, model in ((TUNED, None), (GUIDED, plan.model)):
        if name == TUNED or model is not None:
            found[name] = tuned(task, plan, model)
            say(f"  {name}: {found[name]['wall']:.0f} s, {found[name]['schedule']}")
    return found


def tuned(task: Task, plan: Plan, model: CostModel | None) -> dict[str, Any]:
    """The schedule that tuning takes, which knows nothing from before."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, Database(Path(folder, "tuning.db")) as memory, LocalRunner() as runner:
        tuner = Tuner([task], runner, memory, compiler_version(), model, seed=plan.seed, batch=BATCH,
                      strategy=strategy([task], model))  # fmt: skip
        [row] = tuner.run(Budget(trials=plan.trials)).rows
    return {"schedule": row.schedule, "wall": time.perf_counter() - start, "trials": row.trials}


# --- results ----------------------------------------------------------------------------------------------------------


def keep(path: Path, case: dict[str, Any]) -> list[dict[str, Any]]:
    """Put a case's results in the file, in place of earlier ones; gives all."""
    known = json.loads(path.read_text()) if path.exists() else []
    by_name = {c["name"]: c for c in known} | {case["name"]: case}
    cases = [by_name[name] for name in CASES if name in by_name]
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(cases, indent=1) + "\n")
    beside.rename(path)
    return cases


def page(cases: Sequence[Mapping[str, Any]]) -> str:
    """The results page."""
    first = cases[0]
    return f"""# Beside TVM's MetaSchedule

{first["host"]}, {first["threads"]} threads, {first["date"]}, {first["commit"]}.
y[rows, features] = x[rows, k] w[features, k]^T in f32; {first["asked"]} trials for either, which learns after each {BATCH}.
`ratio`: MetaSchedule's time over this one's, above 1 is faster than MetaSchedule; the median of {len(first["rounds"])}
rounds with its quartiles. `of peak`: of what the machine did in the same rounds, bytes read for one row, multiply-adds
else. `tuning`: wall time of all trials, with the start of what measures them.

{chr(10).join(map(table, cases))}"""


def table(case: Mapping[str, Any]) -> str:
    """A case as a Markdown table."""
    own = Case(case["name"], case["rows"], case["features"], case["k"])
    unit = "GB/s" if own.bound == "read" else "GFLOP/s"
    peak = statistics.median(r["peak"] for r in case["rounds"]) / 1e9
    lines = [f"## {case['rows']} x {case['features']} x {case['k']}\n",
             f"Peak: {peak:.0f} {unit}. {case['copies']} copies of the weight.\n",
             f"| | {unit} | of peak | ratio | trials | tuning | schedule |", "| --- |" + " --- |" * 6]  # fmt: skip
    lines += [row(own, name, facts, case["rounds"]) for name, facts in case["systems"].items()]
    return "\n".join([*lines, ""])


def row(case: Case, name: str, facts: Mapping[str, Any], rounds: Sequence[Mapping[str, float]]) -> str:
    speed = statistics.median(case.work / r[name] for r in rounds) / 1e9
    share = statistics.median(case.work / r[name] / r["peak"] for r in rounds)
    ratio = "" if name == THEIRS else quartiles([r[THEIRS] / r[name] for r in rounds])
    what = f"`{facts['schedule']}`" if "schedule" in facts else f"weight packed: {'yes' if facts['packed'] else 'no'}"
    return f"| {name} | {speed:.1f} | {100 * share:.0f} % | {ratio} | {facts['trials']} | {facts['wall']:.0f} s | {what} |"


def quartiles(values: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def run(plan: Plan, only: Sequence[str], out: Path, say: Say) -> None:
    """Compare the cases named ``only``, or all, and write ``out`` and the page beside it."""
    for name in only or CASES:
        cases = keep(out, compare(CASES[name], plan, say))
        out.with_suffix(".md").write_text(page(cases))
        say(table(next(c for c in cases if c["name"] == name)))
