"""Commands that compare the search: with TVM's MetaSchedule, and with random search."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.peers.workplace import ROOT, default_cache
from benchmarks.tuning import metaschedule as products
from benchmarks.tuning import searching as searches
from tilewright.codegen.target import parse_target
from tilewright.costmodel.database import Database
from tilewright.costmodel.shipped import load_model
from tilewright.measuring import LocalRunner
from tilewright.runtime.host import default_threads

_RESULTS = ROOT / "benchmarks" / "results"
_TIMES = default_cache() / "tuning" / "searching.db"
OnlyOption = Annotated[str, typer.Option(help="Names of cases, with commas between; all if left out.")]
ModelOption = Annotated[Path | None, typer.Option(help="A file with a cost model in place of the shipped one.")]
OutOption = Annotated[Path, typer.Option(help="JSON; cases that are not measured stay. The page is written beside it.")]


def metaschedule(
    trials: int = 64,
    only: OnlyOption = "",
    seed: int = 0,
    cost_model: ModelOption = None,
    target: str = "native",
    out: OutOption = _RESULTS / "metaschedule.json",
) -> None:
    """Tune f32 matrix products with TVM's MetaSchedule and with ours, then time the best of both in turns."""
    model = load_model(cost_model)
    plan = products.Plan(trials, seed, default_threads(), parse_target(target), model)
    products.run(plan, named(only, products.CASES), out, typer.echo)


def searching(
    trials: int = 200,
    seeds: int = 5,
    only: OnlyOption = "",
    cost_model: ModelOption = None,
    target: str = "native",
    db: Annotated[Path, typer.Option(help="Where measurements are kept.")] = _TIMES,
    out: OutOption = _RESULTS / "searching.json",
) -> None:
    """Count the trials that the guided search needs to find what random search finds; goes on where it stopped."""
    plan = searches.Plan(trials, seeds, default_threads(), parse_target(target), load_model(cost_model))
    db.parent.mkdir(parents=True, exist_ok=True)
    with Database(db) as database, LocalRunner() as runner:
        searches.run(plan, named(only, searches.CASES), database, runner, out, typer.echo)


def named(only: str, cases: Collection[str]) -> list[str]:
    """The names in ``only``. Raises typer.BadParameter for one that is no case."""
    names = [name for name in only.split(",") if name]
    if unknown := [name for name in names if name not in cases]:
        raise typer.BadParameter(f"no case {', '.join(unknown)}; there are {', '.join(cases)}")
    return names
