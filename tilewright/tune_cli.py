"""``tilewright tune MODEL`` and ``tilewright tune JOB.yaml``; ``tilewright tune db ...`` is in ``tune_db_cli.py``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from tilewright.tune_db_cli import app as db_app

if TYPE_CHECKING:
    from tilewright.costmodel.jobs import Job
    from tilewright.costmodel.tuner import Progress, TuningResult


class ModelFirst(TyperGroup):
    """A group whose command ``model`` runs when the first word is none of its commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["model", *args]
        return super().parse_args(ctx, args)


BUNDLE = "Measure nothing: write a folder of kernels to be measured on a GPU machine, for a target cuda{arch=...}."

app = typer.Typer(cls=ModelFirst, no_args_is_help=True,
                  help="Find faster schedules by measuring: `tilewright tune MODEL`, or a job file.")  # fmt: skip
app.add_typer(db_app, name="db")


@app.command("model")
def model_command(
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder, a compiled artifact, or a job file (.yaml).")],
    budget: Annotated[str | None, typer.Option(help="Time for measuring: 20m, 1h30m; 10m if no --trials.")] = None,
    trials: Annotated[int | None, typer.Option(help="Schedules to try.")] = None,
    db: Annotated[str | None, typer.Option(help="A SQLite file or any SQLAlchemy URL; the user's own if left out.")] = None,
    seed: int = 0,
    resume: Annotated[bool, typer.Option("--resume", help="What the database knows counts as spent.")] = False,
    passes: Annotated[str, typer.Option("--passes", "-p")] = "O2",
    target: Annotated[str, typer.Option("--target", "-t")] = "native",
    dtype: Annotated[str | None, typer.Option("--dtype")] = None,
    max_length: Annotated[int | None, typer.Option("--max-length")] = None,
    size: Annotated[list[str] | None, typer.Option(help="Tune for this value of a symbolic dim: S=512.")] = None,
    threads: Annotated[int | None, typer.Option("--threads")] = None,
    runner: Annotated[Literal["local", "ray"], typer.Option(help="Where to measure.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of the Ray cluster; a running one is found if left out.")] = None,
    page: Annotated[Path | None, typer.Option("--report", help="Write a page (HTML) with results and curves.")] = None,
    bundle: Annotated[Path | None, typer.Option("--emit-bundle", metavar="FOLDER", help=BUNDLE)] = None,
) -> None:  # fmt: skip
    """Tune the kernels of a model. Ctrl-C ends it with what was found; the same command with --resume goes on."""
    from tilewright.costmodel.jobs import Job, parse_duration, read_job

    if bundle is not None:
        if budget or db or resume or page:
            raise typer.BadParameter("--emit-bundle measures nothing: leave out --budget, --db, --resume and --report")
        emit(model, bundle, passes=passes, target=target, dtype=dtype, max_length=max_length, trials=trials, seed=seed,
             sizes=sizes_of(size or []))  # fmt: skip
        return
    if model.suffix in (".yaml", ".yml"):
        run_job(model, read_job(model), resume, page)
        return
    seconds = parse_duration(budget) if budget else None if trials else parse_duration("10m")
    job = Job(
        model=str(model), passes=passes, target=target, dtype=dtype, max_length=max_length, sizes=sizes_of(size or []),
        budget=seconds, trials=trials, seed=seed, db=db, threads=threads, runner=runner, address=address,
    )  # fmt: skip
    report(execute(job, resume), page)


def sizes_of(words: list[str]) -> dict[str, int]:
    """``["S=512"]`` as a mapping."""
    try:
        return {name: int(value) for name, _, value in (word.partition("=") for word in words)}
    except ValueError:
        raise typer.BadParameter(f"--size takes NAME=NUMBER, got {' '.join(words)}") from None


def emit(model: Path, folder: Path, **options: Any) -> None:
    """Write a bundle, and say how it is run."""
    from tilewright.bundling import emit_bundle

    with counting_line() as show:
        done = emit_bundle(model, out=folder, progress=show, **options)
    refused = f", {done.refused} refused by the compiler" if done.refused else ""
    typer.echo(f"wrote {done.kernels} kernels under {done.schedules} schedules{refused}: {done.bytes / 1e6:.1f} MB\n"
               f"on the GPU machine: python -m tilewright.runtime.bundle run {folder} --out results.jsonl")  # fmt: skip


def run_job(path: Path, job: Job, resume: bool, page: Path | None) -> None:
    """Run a job file; its results and curves go beside it."""
    from tilewright.codegen.store import compiler_version
    from tilewright.costmodel.jobs import write_results
    from tilewright.workloads import host_name

    result = execute(job, resume)
    rows = [kernel_result(row) for row in result.rows]
    written = write_results(path, job, compiler=compiler_version(), host=host_name(), kernels=rows, trials=result.trials,
                            seconds=result.seconds)  # fmt: skip
    report(result, page or path.with_suffix(".html"))
    typer.echo(f"wrote {written}")


def kernel_result(row: Any) -> dict[str, Any]:
    """A row as the results of a job tell it."""
    seconds = row.seconds or None
    return {
        "name": row.task.name, "workload": row.task.workload.key, "family": row.task.workload.family,
        "default": row.task.space.default.text, "default_seconds": seconds, "best": row.schedule,
        "best_seconds": seconds and seconds * row.ratio, "trials": row.trials,
    }  # fmt: skip


def execute(job: Job, resume: bool) -> TuningResult:
    """Tune as ``job`` says, with a line of progress on a terminal."""
    from tilewright.tuning import tune

    options = job.model_dump(exclude={"model"})
    with progress_line() as show:
        return tune(job.model, **options, resume=resume, report=show)


@dataclass
class _Line:
    """What the line of progress tells."""

    bar: Any
    job: Any

    def __call__(self, progress: Progress) -> None:
        gain = f"{progress.gain:.3f} of the default's time, {progress.trials} tried; {progress.stage} {progress.task}"
        self.bar.update(self.job, completed=progress.used, description=gain)


@contextmanager
def progress_line() -> Iterator[Callable[[Progress], None]]:
    """Best so far, what is tried, time left; on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda progress: None
        return
    texts = TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn(), TextColumn("{task.description}")
    with Bar(BarColumn(20), *texts, console=console, transient=True) as bar:
        yield _Line(bar, bar.add_task("tracing the model", total=1.0))


@contextmanager
def counting_line() -> Iterator[Callable[[str, int, int], None]]:
    """What is compiled, and how much of it; on a terminal only."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("tracing the model") as status:
        yield lambda name, done, total: status.update(f"{done} of {total} schedules; {name}")


def report(result: TuningResult, page: Path | None) -> None:
    """Print what was found, and draw it."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(*HEAD, title=title(result))
    for cells in rows(result):
        shown.add_row(*cells)
    Console().print(shown)
    if page is not None:
        write_report(result, page)
        typer.echo(f"wrote {page}")
    if result.interrupted:
        typer.echo("interrupted; the same command with --resume goes on from here", err=True)


HEAD = ("kernel", "share", "default", "tuned", "tried", "failed", "schedule")


def title(result: TuningResult) -> str:
    tried = f"{result.trials} schedules tried in {result.seconds:.0f} s"
    return f"{tried}: kernels take {result.gain:.3f} of the default's time"


def rows(result: TuningResult) -> Iterator[tuple[str, ...]]:
    """The cells of each kernel, those first in which most time is spent."""
    total = sum(row.seconds * row.task.weight for row in result.rows) or 1.0
    for row in sorted(result.rows, key=lambda row: -row.seconds * row.task.weight):
        changed = row.schedule if row.schedule != row.task.space.default.text else "the default"
        share = row.seconds * row.task.weight / total
        numbers = (f"{share:.1%}", f"{row.seconds * 1e6:.1f} us", f"{row.ratio:.3f}", str(row.trials))
        yield (row.task.name, *numbers, failures(row.failures), changed)


def write_report(result: TuningResult, page: Path) -> None:
    """A page with the table, the curves, and what the cost model would have said where it knows the kernels."""
    from tilewright.costmodel.plots import html_table, predicted_against_measured, tuning_curve, write_page
    from tilewright.tuning import predictions

    curve = tuning_curve(result.history, {row.task.name: row.task.weight for row in result.rows})
    parts = [html_table(HEAD, rows(result)), curve]
    points = predictions(result)
    write_page(page, title(result), [*parts, predicted_against_measured(points)] if points else parts)


def failures(counts: Mapping[str, int]) -> str:
    return json.dumps(dict(counts)).strip("{}").replace('"', "") if counts else ""
