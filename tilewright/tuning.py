"""``tilewright.tune``: find faster schedules for the kernels of a model by measuring, and keep them in a database."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright.codegen.cuda.target import CudaTarget
from tilewright.codegen.store import compiler_version
from tilewright.codegen.target import Target, parse_target
from tilewright.compiler import prepare, trace, with_length
from tilewright.costmodel.features import Sample, Trials
from tilewright.costmodel.picks import pick
from tilewright.costmodel.scores import Point, points_of
from tilewright.costmodel.search import RandomSearch, Search
from tilewright.costmodel.tuner import Budget, Progress, Tuner, TuningResult
from tilewright.costmodel.workload import Runner, Task
from tilewright.ir import Module, TilewrightError, parse_module
from tilewright.passes.pipeline import Pipeline
from tilewright.runtime.host import default_threads
from tilewright.schedules import SHIPPED
from tilewright.workloads import host_name, kernel_tasks

if TYPE_CHECKING:
    from tilewright.costmodel.model import CostModel

SECONDS = 600.0
"""The budget when none is given."""


def tune(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Any = None,
    passes: str = "O2",
    target: str = "native",
    max_length: int | None = None,
    dtype: str | None = None,
    task: str | None = None,
    sizes: Mapping[str, int] | None = None,
    budget: float | str | None = None,
    trials: int | None = None,
    db: str | os.PathLike[str] | None = None,
    seed: int = 0,
    resume: bool = False,
    threads: int | None = None,
    cost_model: str | os.PathLike[str] | None = SHIPPED,
    runner: Runner | str = "local",
    address: str | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> TuningResult:
    """Tune the kernels that ``compile`` would make of a model; ``compile(..., db=db)`` then uses what was found.

    ``model`` and what describes it are those of ``tilewright.compile``; an artifact's folder does, too. ``sizes`` gives
    symbolic dims (``{"S": 512, "B": 1}``) the values to tune for. ``budget`` is time to spend on measuring (seconds, or
    ``"20m"``), ``trials`` the number of schedules to try; ten minutes when neither is given. ``db`` is a file or a URL,
    by default the user's own. Equal seeds and databases lead to equal choices; with ``resume`` what the database knows
    counts as spent. ``runner`` is ``"local"``, ``"ray"`` (a cluster at ``address``) or an object that measures.

    Ctrl-C ends it early, with what was found so far. Raises subclasses of TilewrightError.
    """
    from tilewright.costmodel.database import Database, default_url
    from tilewright.costmodel.jobs import parse_duration

    seconds = None if budget is None else parse_duration(budget)
    limit = Budget(trials, SECONDS if seconds is None and trials is None else seconds)
    cpu = parse_target(target)
    if isinstance(cpu, CudaTarget) and isinstance(runner, str):
        raise TilewrightError(f"{cpu} is not measured here; `tilewright tune MODEL --target {cpu} --emit-bundle FOLDER` "
                              "writes what is to be run where such a GPU is")  # fmt: skip
    module = module_of(model, args, kwargs, dynamic, passes, max_length, dtype, task, cpu)
    tasks = tunable(module, cpu, threads or default_threads(), sizes)
    known = load_costs(cost_model)
    with Database(os.fspath(db) if db is not None else default_url()) as database:
        measuring = runner_of(runner, address) if isinstance(runner, str) else runner
        tuner = Tuner(tasks, measuring, database, compiler_version(), known, seed=seed, resume=resume,
                      strategy=strategy(tasks, known), report=report)  # fmt: skip
        try:
            return tuner.run(limit)
        finally:
            if isinstance(runner, str):
                measuring.close()  # type: ignore[attr-defined]


def module_of(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None, dynamic: Any, passes: str,
              max_length: int | None, dtype: str | None, task: str | None, target: Target) -> Module:  # fmt: skip
    """The module that ``compile`` would generate code from; an artifact has it."""
    if isinstance(model, (str, os.PathLike)) and (Path(model) / "ir.twir").is_file():
        return parse_module((Path(model) / "ir.twir").read_text())
    module, _ = trace(model, args, kwargs, dynamic, dtype)
    module.meta |= {"task": task} if task else {}
    prepare(module, with_length(Pipeline.parse(passes), max_length), target)
    return module


def tunable(module: Module, target: Target, threads: int, sizes: Mapping[str, int] | None = None) -> list[Task]:
    """The tasks with a choice. Raises TilewrightError when there is none."""
    kernels = [kernel for kernel in kernel_tasks(module, target, sizes) if len(kernel.space(target).knobs)]
    if not kernels:
        raise TilewrightError("nothing to tune: no kernel of this model has more than one schedule")
    return [kernel.task(target, threads) for kernel in kernels]


def load_costs(cost_model: str | os.PathLike[str] | None) -> CostModel | None:
    """The model of a file or of the package; None for None."""
    from tilewright.costmodel.shipped import load_model

    if cost_model is None:
        return None
    return load_model(None if cost_model == SHIPPED else Path(cost_model))


def strategy(tasks: Sequence[Task], model: CostModel | None) -> Callable[[Task, int], RandomSearch]:
    """Evolution under ``model``, which begins with what ``compile`` would take unmeasured."""
    picked = pick(tasks, model) if model is not None else []
    hints = {task.workload.key: [p.choice.text] for task, p in zip(tasks, picked) if p is not None}
    return lambda task, seed: Search(task, seed, model, hints=hints.get(task.workload.key, ()))


def predictions(result: TuningResult) -> list[Point]:
    """What the model that guided a job predicts of the schedules that were tried, where it knows their kernels."""
    found: list[Point] = []
    for row in result.rows:
        workload = row.task.workload
        if result.model is None or not result.model.knows(workload.target, workload.family):
            continue
        measured = {m.schedule: m for name, m in result.history if name == row.task.name}
        parsed = [(row.task.space.parse(text), m) for text, m in measured.items()]
        samples = tuple(Sample(row.task.features(choice), m) for choice, m in parsed if choice is not None)
        found += points_of(result.model, Trials(workload, samples))
    return found


def runner_of(name: str, address: str | None) -> Any:
    """Raises TilewrightError for a name that is no runner."""
    if name == "local":
        return local_runner()
    if name == "ray":
        from tilewright.costmodel.cluster import RayRunner

        return RayRunner(address, local_runner, identity)
    raise TilewrightError(f"no runner {name!r}; there are local and ray")


def local_runner() -> Any:
    from tilewright.measuring import LocalRunner

    return LocalRunner()


def identity() -> dict[str, str]:
    """What another machine must have in common with this one for its times to count here."""
    return {"CPU": host_name(), "compiler": compiler_version()}
