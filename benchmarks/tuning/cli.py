"""Schedules: measure a dataset, train the cost model on it, and see what model, defaults and tuning are worth.

``collect`` and ``train`` make what ships with the package: benchmarks/tuning/znver4.dataset and costmodel/shipped.model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.peers.workplace import ROOT, default_cache
from benchmarks.tuning import collect as collecting
from benchmarks.tuning import comparisons
from benchmarks.tuning.worth import worth
from tilewright.codegen.store import compiler_version
from tilewright.codegen.target import parse_target
from tilewright.costmodel.database import Database
from tilewright.costmodel.dataset import Dataset
from tilewright.costmodel.model import CostModel
from tilewright.costmodel.plots import predicted_against_measured, write_page
from tilewright.costmodel.scores import Scores, cross_validate, kernel_of
from tilewright.costmodel.shipped import SHIPPED
from tilewright.costmodel.training import train as train_model
from tilewright.measuring import LocalRunner
from tilewright.runtime.host import default_threads
from tilewright.workloads import host_name

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(comparisons.metaschedule)
app.command()(comparisons.searching)
app.command()(worth)
DATASET = Path(__file__).with_name("znver4.dataset")
RESULTS = ROOT / "benchmarks" / "results"
DbOption = Annotated[Path, typer.Option("--db", help="Where measurements are kept.")]
_HOME = default_cache() / "tuning"


@app.command()
def collect(
    models: Annotated[int, typer.Option(help="Models of random shape to take kernels from.")] = 48,
    candidates: Annotated[int, typer.Option(help="Schedules of each kernel, beside the default.")] = 20,
    target: str = "native",
    seed: int = 0,
    db: DbOption = _HOME / "dataset.db",
    out: Annotated[Path, typer.Option(help="The dataset's file.")] = DATASET,
) -> None:
    """Measure schedules of many kernels (about an hour) and write the dataset; Ctrl-C ends it early."""
    cpu = parse_target(target)
    name = f"workloads-{cpu.arch}-{models}-{seed}.jsonl"
    found = collecting.gather(db.parent / name, cpu, default_threads(), models, seed)
    typer.echo(f"{len(found)} kernels")
    with Database(db) as database, LocalRunner() as runner:
        try:
            collecting.measure(found, database, runner, candidates, seed, typer.echo)
        except KeyboardInterrupt:
            typer.echo("interrupted: the dataset has what there is; the same command goes on", err=True)
    dataset(compiler_version(), db, out)


@app.command()
def dataset(
    compiler: Annotated[str, typer.Argument(help="The version that the kernels were measured with.")],
    db: DbOption = _HOME / "dataset.db",
    out: Annotated[Path, typer.Option(help="The dataset's file.")] = DATASET,
) -> None:
    """Write the dataset of what was measured, with features as they are now."""
    with Database(db, create=False) as database:
        made = collecting.dataset(database, compiler)
    made.save(out)
    typer.echo(f"{made.rows} schedules of {len(made.trials)} kernels, {out.stat().st_size / 1e6:.1f} MB, {made.sha256}")


@app.command()
def train(dataset: Path = DATASET, out: Path = SHIPPED, seed: int = 0) -> None:
    """Train the cost model, with its scores on kernels that it did not learn from."""
    data = Dataset.load(dataset)
    held = cross_validate(data.trials, seed=seed)
    strict = cross_validate(data.trials, seed=seed, group=kernel_of)
    meta = {
        "dataset": data.sha256, "rows": data.rows, "kernels": len(data.trials), "compiler": data.compiler,
        "host": host_name(), "date": datetime.now(UTC).date().isoformat(),
        "scores": {family: asdict(scores) for family, scores in held.scores.items()},
    }  # fmt: skip
    train_model(data.trials, seed=seed, meta=meta).save(out)
    RESULTS.joinpath("costmodel.md").write_text(page(CostModel.load(out), held.scores, strict.scores))
    write_page(_HOME / "costmodel.html", "Kernels never trained on", [predicted_against_measured(held.points)])
    typer.echo(score_table(held.scores))
    typer.echo(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB) and {_HOME / 'costmodel.html'}")


def page(model: CostModel, scores: Mapping[str, Scores], strict: Mapping[str, Scores]) -> str:
    """The results page."""
    meta = model.meta
    size = f"{meta['rows']} schedules of {meta['kernels']} kernels"
    return f"""# The cost model on kernels that it did not learn from

{size} on {meta["host"]}, {meta["date"]}; dataset {meta["dataset"]}.

Five parts, no shape in two of them; each is predicted by a model of the other four. `top-1`, `top-5`: time of the best
candidate over that of the best of the model's picks, a mean over kernels; `random` the same for random picks, `rule` for
the schedule by rule. Candidates are the one by rule, some near it, and any.

{score_table(scores)}

The same with all sizes of a kernel's symbolic dims in one part:

{score_table(strict)}
"""


def score_table(scores: Mapping[str, Scores]) -> str:
    """A Markdown table."""
    names = ("top1", "top5", "random1", "random5", "rule", "pairwise", "spearman")
    lines = ["| family | kernels | candidates | top-1 | top-5 | random-1 | random-5 | rule | pairwise | Spearman |",
             "| --- |" + " --- |" * 9]  # fmt: skip
    for family, s in scores.items():
        cells = " | ".join(f"{getattr(s, name):.3f}" for name in names)
        lines.append(f"| {family} | {s.workloads} | {s.candidates} | {cells} |")
    return "\n".join(lines)
