"""The schedule of each kernel: as tuned, else as the cost model predicts, else by rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tilewright.codegen.schedule import Schedule, parse_schedule
from tilewright.codegen.store import compiler_version
from tilewright.codegen.target import Target
from tilewright.costmodel.choice import CONFIRMED, decide
from tilewright.costmodel.picks import pick
from tilewright.costmodel.workload import Measurement, Task
from tilewright.ir import Module
from tilewright.runtime.host import default_threads
from tilewright.workloads import KernelTask, kernel_tasks

SHIPPED = "shipped"
"""The cost model that comes with the package."""
RULE = "rule"


@dataclass
class Schedules:
    """Schedules by kernel. ``origins`` says where each is from; ``notes`` what could not be used, and why."""

    chosen: dict[str, Schedule] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def take(self, name: str, text: str, origin: str) -> None:
        self.chosen[name] = parse_schedule(text)
        self.origins[name] = origin


def choose_schedules(
    module: Module,
    target: Target,
    *,
    db: str | Path | None = None,
    cost_model: str | Path | None = SHIPPED,
    threads: int | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Schedules:
    """Schedules for every kernel of ``module``.

    ``db`` is a tuning database (a file or a URL), ``cost_model`` a file or ``"shipped"``; without either all kernels have
    the schedules of their family's rules. ``threads`` and ``sizes`` are those that were tuned for. Raises DatabaseError
    and ModelError (both TilewrightError) for what cannot be read.
    """
    found = Schedules()
    if db is None and cost_model is None:
        return found
    kernels = kernel_tasks(module, target, sizes)
    tasks = [kernel.task(target, threads or default_threads()) for kernel in kernels]
    held = _take_tuned(found, kernels, tasks, db) if db is not None else {}
    if cost_model is not None:
        _take_predicted(found, kernels, tasks, held, cost_model)
    return found


def _take_tuned(found: Schedules, kernels: Sequence[KernelTask], tasks: Sequence[Task], db: str | Path) -> dict[int, str]:
    """Take what a database knows; gives the layouts that are settled by it."""
    from tilewright.costmodel.database import Database

    with Database(db, create=False) as database:
        known = [database.find(task.workload, compiler_version()) for task in tasks]
    missing = [task for task, own in zip(tasks, known) if task.space.default.text not in own]
    if missing:
        found.notes.append(f"{db}: {len(missing)} of {len(tasks)} kernels were not tuned for this compiler, machine and "
                           "number of threads; `tilewright tune` would")  # fmt: skip
    held = {}
    for i, (kernel, task, own, best) in enumerate(zip(kernels, tasks, known, decide(tasks, known))):
        if task in missing:
            continue
        text = best.schedule if best else task.space.default.text
        found.take(kernel.kernel.name, text, _tuned(best, own))
        choice = task.space.parse(text)
        held |= {i: task.layout(choice)} if choice is not None else {}
    return held


def _tuned(best: Measurement | None, known: Mapping[str, Measurement]) -> str:
    if best is None:
        return f"tuning, the rule's is the best of {len(known)}"
    sure = "" if best.metrics.get(CONFIRMED) else ", not confirmed"
    return f"tuning, {best.ratio:.2f} of the time by rule, best of {len(known)}{sure}"


def _take_predicted(found: Schedules, kernels: Sequence[KernelTask], tasks: Sequence[Task], held: Mapping[int, str],
                    cost_model: str | Path) -> None:  # fmt: skip
    """Take what the cost model likes better than the rules, for kernels without a schedule yet."""
    from tilewright.costmodel.shipped import load_model

    model = load_model(None if cost_model == SHIPPED else cost_model)
    unknown = {task.workload.family for task in tasks if not model.knows(task.workload.target, task.workload.family)}
    if unknown:
        target = tasks[0].workload.target
        found.notes.append(f"the cost model has not learned {', '.join(sorted(unknown))} for {target}: schedules by rule")
    for i, (kernel, picked) in enumerate(zip(kernels, pick(tasks, model, held))):
        name = kernel.kernel.name
        if picked is not None and i not in held:
            found.take(name, picked.choice.text, f"cost model, {picked.ratio:.2f} of the time by rule")
