"""How many trials the search under the cost model needs to find what random search finds in many.

Kernels are of models that the cost model did not learn from. A schedule is measured once, and every search that asks for it
gets the same time: searches differ by what they choose, not by noise. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.environment import commit
from benchmarks.peers.shapes import SHAPES
from benchmarks.tuning.zoo import Source
from tilewright.codegen.store import compiler_version
from tilewright.codegen.target import CpuTarget
from tilewright.costmodel.database import Database
from tilewright.costmodel.model import CostModel
from tilewright.costmodel.search import RandomSearch, Search, Searching
from tilewright.costmodel.workload import Choice, Measurement, Runner, Task
from tilewright.tuning import strategy
from tilewright.workloads import host_name, kernel_tasks

BATCH = 16
LONGER = 4.0
"""How much longer what looks best is measured again."""
GOAL = 5
"""As many times fewer trials than random search is the goal."""
NEAR = 1.01
"""Times that differ by less are the same but for noise."""
RANDOM, MODEL, ALONE = "random", "cost model", "no cost model"
_SIZES = {"B": 1, "S": 512}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """The kernel of a family with the most schedules in a model, of those for many tokens or those for one."""

    name: str
    model: str
    recipe: tuple[str, str]
    family: str
    prefill: bool

    def task(self, target: CpuTarget, threads: int) -> Task:
        shape = SHAPES[self.model]
        config = {**shape.config, "num_hidden_layers": 2, "vocab_size": 8192}  # no kernel of a layer knows of these
        module = Source(shape.architecture, config, self.recipe, 1024, _SIZES).module()
        kernels = kernel_tasks(module, target, _SIZES)
        own = [k for k in kernels if k.emitter.name == self.family and ("S" in k.sizes) == self.prefill]
        return max(own, key=lambda k: len(k.space(target))).task(target, threads)


CASES = {case.name: case for case in (
    Case("prefill-int8-linear", "M", ("w8a8", "bf16"), "mlir.linear", True),
    Case("decode-int4-linear", "L", ("w4a8", "bf16"), "mlir.linear", False),
    Case("prefill-f32-linear", "S", ("O2", "f32"), "mlir.linear", True),
    Case("decode-f32-attention", "S", ("O2", "f32"), "mlir.attention", False),
)}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How to compare."""

    trials: int
    seeds: int
    threads: int
    target: CpuTarget
    model: CostModel


class Times:
    """The time of each schedule of a task: measured when it is asked for first, kept in ``database``.

    What looks faster than all before is measured again, for longer: a moment's disturbance is no goal.
    """

    def __init__(self, task: Task, database: Database, runner: Runner) -> None:
        self.task, self.database, self.runner, self.compiler = task, database, runner, compiler_version()
        self.known = dict(database.find(task.workload, self.compiler))

    def __call__(self, choices: Sequence[Choice]) -> list[Measurement]:
        missing = [c.text for c in choices if c.text not in self.known]
        if missing:
            found = {m.schedule: m for m in self._measure(missing, 1.0)}
            fastest = min((m.ratio for m in self.known.values() if m.ratio), default=float("inf"))
            doubted = [text for text, m in found.items() if m.ratio and m.ratio < fastest]
            found |= {m.schedule: m for m in self._measure(doubted, LONGER)}
            self.database.add(self.task.workload, self.compiler, list(found.values()))
            self.known |= found
        return [self.known[c.text] for c in choices]

    def _measure(self, texts: Sequence[str], effort: float) -> list[Measurement]:
        return self.runner.measure(self.task.workload, self.task.space.default.text, texts, effort) if texts else []


def curve(search: Searching, times: Times, trials: int, until: float = 0.0) -> list[float]:
    """The best time relative to the default after each trial; ends at ``until``, or when there are no schedules left."""
    best: list[float] = []
    while len(best) < trials and (choices := search.ask(min(BATCH, trials - len(best)))):
        found = times(choices)
        search.tell(found)
        for m in found:
            best.append(min(m.ratio or float("inf"), best[-1] if best else float("inf")))
        if best[-1] <= until:
            break
    return best


def reached(best: Sequence[float], goal: float) -> int | None:
    """How many trials it took to be as fast as ``goal``."""
    return next((i + 1 for i, ratio in enumerate(best) if ratio <= goal), None)


def compare(case: Case, plan: Plan, database: Database, runner: Runner, say: Say) -> dict[str, Any]:
    """The searches of one case, seed by seed."""
    task = case.task(plan.target, plan.threads)
    if not plan.model.knows(task.workload.target, task.workload.family):
        say(f"{case.name}: the cost model knows nothing of {task.workload.family} for {task.workload.target}")
    times = Times(task, database, runner)
    guided = strategy([task], plan.model)
    seeds = []
    for seed in range(plan.seeds):
        curves = {RANDOM: curve(RandomSearch(task, seed), times, plan.trials)}
        goal = curves[RANDOM][-1]
        curves[MODEL] = curve(guided(task, seed), times, plan.trials, goal)
        curves[ALONE] = curve(Search(task, seed), times, plan.trials, goal)
        seeds.append({name: [round(ratio, 4) for ratio in own] for name, own in curves.items()})
        say(f"{case.name}, seed {seed}: {goal:.3f} of the default's time after {len(curves[RANDOM])} trials at random; "
            f"reached after {reached(curves[MODEL], goal)}, {reached(curves[ALONE], goal)} without a model")  # fmt: skip
    return {**asdict(case), "operations": task.name, "space": len(list(task.space)), "measured": len(times.known),
            "host": host_name(), "threads": plan.threads, "asked": plan.trials, "date": time.strftime("%Y-%m-%d"),
            "commit": commit(), "seeds": seeds}  # fmt: skip


# --- results ----------------------------------------------------------------------------------------------------------


def keep(path: Path, case: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Put a case's results in the file, in place of earlier ones; gives all."""
    known = json.loads(path.read_text()) if path.exists() else []
    by_name = {c["name"]: c for c in known} | {case["name"]: case}
    cases = [by_name[name] for name in CASES if name in by_name]
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(cases) + "\n")
    beside.rename(path)
    return cases


def page(cases: Sequence[Mapping[str, Any]]) -> str:
    """The results page."""
    first = cases[0]
    about = ", ".join((first["host"], f"{first['threads']} threads", first["date"], first["commit"]))
    return f"""# The search under the cost model beside random search

{about}.
Random search has {first["asked"]} trials, fewer where there are not so many schedules; medians over {len(first["seeds"])}
seeds. `best`: what it finds, relative to the time of the schedule by rule. Then the trials after which each search was as
fast, and those after which it was within {100 * (NEAR - 1):.0f} %; `-` where it never was with most seeds. The goal is a
{GOAL}th of the trials of random search.

{table(cases)}

{chr(10).join(map(details, cases))}"""


def table(cases: Sequence[Mapping[str, Any]]) -> str:
    """A row a case."""
    within = f"{100 * (NEAR - 1):.0f} %"
    names = [f"{name}{more}" for name in (RANDOM, MODEL, ALONE) for more in ("", f", {within}")]
    lines = [f"| kernel | schedules | trials | best | {' | '.join(names)} | goal |", "| --- |" + " --- |" * 10]
    for case in cases:
        count = statistics.median(len(s[RANDOM]) for s in case["seeds"])
        best = statistics.median(s[RANDOM][-1] for s in case["seeds"])
        cells = [middle(counts(case, name, near)) for name in (RANDOM, MODEL, ALONE) for near in (1.0, NEAR)]
        goal = "hit" if (median(counts(case, MODEL)) or count) <= count / GOAL else "missed"
        lines.append(f"| {case['name']} | {case['space']} | {count:.0f} | {best:.3f} | {' | '.join(cells)} | {goal} |")
    return "\n".join(lines)


def counts(case: Mapping[str, Any], name: str, near: float = 1.0) -> list[int | None]:
    """For each seed the trials until the best of random search."""
    return [reached(seed[name], near * seed[RANDOM][-1]) for seed in case["seeds"]]


def median(values: Sequence[int | None]) -> float | None:
    """None stands for more than all."""
    found = statistics.median(float("inf") if v is None else v for v in values)
    return None if found == float("inf") else found


def middle(values: Sequence[int | None]) -> str:
    found = median(values)
    return "-" if found is None else f"{found:.0f}"


def details(case: Mapping[str, Any]) -> str:
    """What each seed gave."""
    lines = [f"- {case['name']}: `{case['operations']}` of {case['model']}, {case['measured']} schedules measured."]
    for name in (RANDOM, MODEL, ALONE):
        lines.append(f"  {name}: " + ", ".join("-" if v is None else str(v) for v in counts(case, name)) + ".")
    return "\n".join(lines)


def run(plan: Plan, only: Sequence[str], database: Database, runner: Runner, out: Path, say: Say) -> None:
    """Compare the cases named ``only``, or all, and write ``out`` and the page beside it."""
    cases: list[dict[str, Any]] = []
    for name in only or CASES:
        cases = keep(out, compare(CASES[name], plan, database, runner, say))
        out.with_suffix(".md").write_text(page(cases))
    say(table(cases))
