"""``tilewright tune db merge | export | import | top | prune``: the tuning database on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tilewright.costmodel.database import Database, Row

app = typer.Typer(help="Look at tuning databases and put them together.", no_args_is_help=True)

DbOption = Annotated[
    str | None,
    typer.Option("--db", help="A SQLite file or any SQLAlchemy URL; the user's own database when left out."),
]
CompilerOption = Annotated[str | None, typer.Option("--compiler", help="A compiler version; 'current' is this one.")]


def opened(db: str | None, create: bool = False) -> Database:
    """The database that an option names."""
    from tilewright.costmodel.database import Database, default_url

    return Database(db or default_url(), create)


def compiler_named(text: str | None) -> str | None:
    """The compiler version that an option names."""
    from tilewright.codegen.store import compiler_version

    return compiler_version() if text == "current" else text


@app.command()
def merge(
    sources: Annotated[list[str], typer.Argument(help="Databases to take everything from: files or URLs.")],
    db: DbOption = None,
) -> None:
    """Take over what other databases hold, as if all had been measured into one."""
    with opened(db, create=True) as into:
        for source in sources:
            with opened(source) as other:
                done = into.merge(other)
            typer.echo(f"{other.name}: {done.new} new, {done.replaced} better founded, {done.kept} known")


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="NAME.jsonl or NAME.jsonl.xz")],
    db: DbOption = None,
    salvage: Annotated[bool, typer.Option("--salvage", help="Read what can be read of a damaged SQLite file.")] = False,
) -> None:
    """Write everything to a file of JSON lines."""
    if salvage:
        return _salvage(file, db)
    with opened(db) as source:
        typer.echo(f"wrote {source.export(file)} measurements to {file}")
    return None


def _salvage(file: Path, db: str | None) -> None:
    from tilewright.costmodel.database import default_url
    from tilewright.costmodel.database_files import salvage

    done = salvage((db or default_url()).removeprefix("sqlite:///"), file)
    for what in done.lost:
        typer.echo(what, err=True)
    typer.echo(f"wrote {done.rows} measurements to {file}; {len(done.lost)} losses, listed above")


@app.command("import")
def import_(
    files: Annotated[list[Path], typer.Argument(help="What export wrote.")],
    db: DbOption = None,
) -> None:
    """Take over files of JSON lines, each as a whole or not at all."""
    with opened(db, create=True) as into:
        for file in files:
            done = into.import_(file)
            typer.echo(f"{file}: {done.new} new, {done.replaced} better founded, {done.kept} known")


@app.command()
def top(
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many of each workload.")] = 1,
    family: Annotated[str | None, typer.Option(help="A kernel family.")] = None,
    compiler: CompilerOption = None,
    db: DbOption = None,
) -> None:
    """Show the best schedules of each workload."""
    from rich.console import Console

    with opened(db) as source:
        rows = source.top(count, family, compiler_named(compiler))
    Console().print(table(rows) if rows else "no schedule is measured")


def table(rows: list[Row]) -> Any:
    """Rows as a table for a terminal; ``speed`` is that relative to the schedule by rule."""
    from rich.table import Table

    shown = Table("workload", "family", "sizes", "target", "threads", "schedule", "time", "speed", "repeats", "compiler")
    for row in rows:
        workload, measured = row.workload, row.measurement
        sizes = " ".join(f"{name}={value}" for name, value in workload.sizes)
        time = f"{1e6 * (measured.seconds or 0):.4g} us ± {100 * (measured.spread or 0):.1f} %"
        speed = f"{1 / (measured.ratio or 1):.3f}"
        cells = (workload.key[:8], workload.family, sizes, workload.target, str(workload.threads), measured.schedule)
        shown.add_row(*cells, time, speed, str(measured.repeats), row.compiler[:8])
    return shown


@app.command()
def prune(
    keep: Annotated[int | None, typer.Option(min=1, help="Leave the best N of each workload, and what failed.")] = None,
    compiler: CompilerOption = None,
    older: Annotated[str | None, typer.Option(help="Remove what was measured longer ago: 30d, 12h.")] = None,
    db: DbOption = None,
) -> None:
    """Remove measurements: all but the best, those of other compilers than --compiler, or old ones."""
    from datetime import timedelta

    from tilewright.costmodel.jobs import parse_duration

    if keep is None and compiler is None and older is None:
        raise typer.BadParameter("give --keep, --compiler or --older")
    age = None if older is None else timedelta(seconds=parse_duration(older))
    with opened(db) as source:
        gone = source.prune(keep, compiler_named(compiler), age)
        typer.echo(f"removed {gone} measurements from {source.name}")
