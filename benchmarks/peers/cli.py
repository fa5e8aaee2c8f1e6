"""tilewright beside llama.cpp, ONNX Runtime, OpenVINO and PyTorch, on this machine, in one run.

``setup`` installs and builds the peers, ``models`` makes the models in all formats, ``run`` measures and ``table`` writes
the tables again. Each part goes on where it stopped.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.peers.checkpoints import make
from benchmarks.peers.environment import cpu_name, describe_machine
from benchmarks.peers.peer import Peer
from benchmarks.peers.plan import Job, jobs
from benchmarks.peers.results import Results, ResultsError, key
from benchmarks.peers.runner import Runner
from benchmarks.peers.shapes import SHAPES
from benchmarks.peers.systems import OWN, PEERS
from benchmarks.peers.table import console_table, markdown
from benchmarks.peers.workplace import ROOT, StepError, Workplace, default_cache
from benchmarks.peers.works import WORKS

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
ModelsOption = Annotated[str, typer.Option("--models", "-m", help="Some of S,M,L,E.")]
SystemsOption = Annotated[str, typer.Option("--systems", "-s", help=f"Some of {','.join(PEERS)}; all when left out.")]
OnlyOption = Annotated[str, typer.Option("--only", help="Some works, separated by commas; a name's start is enough.")]
CacheOption = Annotated[Path, typer.Option("--cache", help="Where environments, builds and models are kept.")]
PythonOption = Annotated[Path, typer.Option("--own-python", help="The interpreter with the tilewright to measure.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="The JSON of results; tables are written beside it.")]

ALL_MODELS = ",".join(SHAPES)


@app.command()
def setup(systems: SystemsOption = "", cache: CacheOption = default_cache()) -> None:  # noqa: B008
    """Install and build the peers: about 3 GB and 25 minutes on two cores."""
    place = Workplace(cache)
    with place.alone(), reported() as attempt:
        for peer in chosen(systems):
            attempt(peer.name, lambda peer=peer: peer.setup(place))


@app.command()
def models(
    models: ModelsOption = ALL_MODELS, systems: SystemsOption = "", only: OnlyOption = "",
    cache: CacheOption = default_cache(), own_python: PythonOption = Path(sys.executable),  # noqa: B008
) -> None:  # fmt: skip
    """Make the models, in every format that the works need."""
    place = Workplace(cache, own_python=own_python)
    with place.alone(), reported() as attempt:
        for model in split(models, SHAPES, "model"):
            shape = SHAPES[model]
            folder = place.model(model) / "hf"
            place.step(f"checkpoint-{model}", str(shape.config), lambda shape=shape, folder=folder: make(shape, folder))
        for job in selected(models, systems, only):
            attempt(str(job), lambda job=job: PEERS[job.system].prepare(place, SHAPES[job.model], job.variant))


@app.command()
def run(
    models: ModelsOption = ALL_MODELS, systems: SystemsOption = "", only: OnlyOption = "",
    repeats: Annotated[int, typer.Option(help="Rounds over all systems.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of every system.")] = 2,
    prefix: Annotated[str, typer.Option(help="A command before each process: 'chrt -f 1'.")] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget earlier results of what is selected.")] = False,
    out: OutOption = None,
    cache: CacheOption = default_cache(), own_python: PythonOption = Path(sys.executable),  # noqa: B008
) -> None:  # fmt: skip
    """Measure, and write the tables."""
    place = Workplace(cache, own_python=own_python)
    ready = []
    for job in selected(models, systems, only):
        is_ready = PEERS[job.system].is_ready(place, SHAPES[job.model], job.variant)
        ready += [job] if is_ready else []
        if not is_ready:
            typer.echo(f"{job}: left out, not there (run setup and models)", err=True)
    with place.alone():
        results = Results(out or default_results())
        if fresh:
            chosen_ones = {(job.model, job.system, job.variant.name, task) for job in ready for task in job.tasks}
            results.drop(lambda s: key(s)[:-1] in chosen_ones)
        try:
            results.begin({"threads": threads, "prefix": prefix}, describe_machine(place))
            Runner(place, PEERS, threads, tuple(shlex.split(prefix))).run(ready, repeats, results)
        except ResultsError as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            typer.echo("interrupted; the same command goes on from here", err=True)
            raise typer.Exit(130) from None
        finally:
            write_tables(results)


@app.command()
def table(out: OutOption = None) -> None:
    """Write the tables of results that are there."""
    write_tables(Results(out or default_results()))


def write_tables(results: Results) -> None:
    if not results.samples:
        return
    results.path.with_suffix(".md").write_text(markdown(results))
    console_table(results)


def default_results() -> Path:
    return ROOT / "benchmarks" / "results" / f"peers-{cpu_name()}.json"


def split(text: str, known: Sequence[str], what: str) -> list[str]:
    """Names separated by commas; an error lists those that exist."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"no {what} {name!r}; there are {', '.join(known)}")
    return names


def chosen(systems: str) -> list[Peer]:
    return [PEERS[name] for name in split(systems, list(PEERS), "system") or PEERS]


def selected(models: str, systems: str, only: str) -> list[Job]:
    """The jobs that options ask for."""
    starts = tuple(name for name in only.split(",") if name)
    works = [work for work in WORKS if not starts or work.name.startswith(starts)]
    if not works:
        raise typer.BadParameter(f"no work {only!r}; there are {', '.join(work.name for work in WORKS)}")
    return jobs(works, split(models, list(SHAPES), "model"), {peer.name: peer for peer in chosen(systems)}, OWN)


@contextmanager
def reported() -> Iterator[Callable[[str, Callable[[], None]], None]]:
    """Runs steps; those that fail are told at once and make the exit code 1 at the end, the others still run."""
    failed = []

    def attempt(name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except StepError as error:
            failed.append(name)
            typer.secho(f"{name}: {error}", fg="red", err=True)

    yield attempt
    if failed:
        typer.secho(f"failed: {', '.join(failed)}", fg="red", err=True)
        raise typer.Exit(1)
