"""The command line: ``tilewright compile | run | eval | export | tune | opt | inspect | bench | bisect``.

Exit codes: 0 success, 1 the request was refused or failed (the reason is on stderr), 2 wrong usage, 3 ``bisect`` found a
culprit, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
except ImportError as error:
    sys.exit(f"error: the command line needs {error.name}, which is not installed; pip install 'tilewright[cli]'")

from tilewright.eval_cli import (
    CALIBRATION_TOKENS,
    CALIBRATION_WINDOW,
    CalibrationOption,
    SensitivityOption,
    TokensOption,
    WindowOption,
    calibration_option,
    eval_command,
)
from tilewright.export_cli import export_command
from tilewright.tune_cli import app as tune_app

if TYPE_CHECKING:
    from tilewright.ir import Module
    from tilewright.runtime import Program

app = typer.Typer(
    help="A compiler for neural networks, made for LLM inference.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
CULPRIT = 3

ModelArg = Annotated[Path, typer.Argument(help="A Hugging Face folder, a GGUF file or a compiled artifact.")]
PassesOption = Annotated[str, typer.Option("--passes", "-p", help="A pipeline: O0..O3, w8a16, or a comma list of passes.")]
TargetOption = Annotated[str, typer.Option("--target", "-t", help="native, x86-64-v3, cpu{arch=znver5}, ...")]
LengthOption = Annotated[int | None, typer.Option("--max-length", help="Capacity of the KV cache in tokens.")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="Element type to load the weights in (f32, bf16).")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", help="Threads; all physical cores when left out.")]


def main() -> None:
    """Entry point of the console script: errors become a message and an exit code."""
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("tilewright"):
            raise
        needed = f"this needs {error.name}, which is not installed; pip install 'tilewright[compile]'"
        typer.secho(f"error: {needed}", fg="red", err=True)
        sys.exit(1)
    except Exception as error:
        if not _expected(error):
            raise
        typer.secho(f"error: {error}", fg="red", err=True)
        for note in getattr(error, "__notes__", ()):
            typer.echo(f"  {note}", err=True)
        sys.exit(1)


def _expected(error: Exception) -> bool:
    """Whether an error is a refusal that explains itself, and not a fault of ours."""
    from tilewright.runtime import errors

    refusals: tuple[type[Exception], ...] = (OSError, *(v for v in vars(errors).values() if isinstance(v, type)))
    for module, name in (("tilewright.ir.errors", "TilewrightError"), ("tilewright.codegen.target", "TargetError")):
        refusals += (getattr(sys.modules[module], name),) if module in sys.modules else ()
    return isinstance(error, refusals)


@contextmanager
def progress_bar() -> Iterator[Any]:
    """A progress callback for :func:`tilewright.compile`, shown on a terminal only."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

    console = Console(stderr=True)
    with Progress(SpinnerColumn(), *Progress.get_default_columns()[:3], TimeElapsedColumn(), console=console,
                  transient=True, disable=not console.is_terminal) as bars:  # fmt: skip
        rows: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in rows:
                rows[stage] = bars.add_task(stage, total=total)
            bars.update(rows[stage], completed=done, total=total)

        yield show


@app.command()
def compile(
    model: ModelArg,
    out: Annotated[Path, typer.Option("--out", "-o", help="The artifact folder to write.")],
    passes: PassesOption = "O2",
    target: TargetOption = "native",
    max_length: LengthOption = None,
    dtype: DtypeOption = None,
    errors: Annotated[bool, typer.Option("--errors", help="Measure the error of each layer (slow).")] = False,
    calibration: CalibrationOption = None,
    calibration_tokens: TokensOption = CALIBRATION_TOKENS,
    calibration_window: WindowOption = CALIBRATION_WINDOW,
    sensitivity: SensitivityOption = False,
) -> None:
    """Compile a Hugging Face folder or a GGUF file to an artifact."""
    import tilewright
    from tilewright.inspection import sensitivity_table

    with progress_bar() as show:
        done = tilewright.compile(
            model, passes=passes, target=target, max_length=max_length, dtype=dtype, errors=errors, out=out, progress=show,
            calibration=calibration_option(model, calibration, calibration_tokens, calibration_window),
            sensitivity=sensitivity,
        )  # fmt: skip
    typer.echo(done.report.summary())
    if sensitivity:
        typer.echo(sensitivity_table(done.report))
    typer.echo(f"wrote {out}")


@app.command()
def run(
    model: ModelArg,
    prompt: Annotated[str | None, typer.Option(help="Text to continue; '-' reads standard input.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids to continue, separated by commas.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest of this total probability.")] = 1.0,
    seed: int = 0,
    passes: PassesOption = "O2",
    target: TargetOption = "native",
    max_length: LengthOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Continue a text with an artifact, or with a Hugging Face folder that is compiled first."""
    from tilewright.generate_text import Options, continue_ids, continue_text

    if (prompt is None) == (ids is None):
        raise typer.BadParameter("give --prompt or --ids")
    options = Options(max_new_tokens, temperature, top_k, top_p, seed)
    numbers = None if ids is None else parse_ids(ids)
    with opened(model, passes, target, max_length, dtype, threads) as program, program.session(threads) as session:
        if numbers is not None:
            speed = continue_ids(session, numbers, options, typer.echo)
        else:
            text = sys.stdin.read() if prompt == "-" else prompt or ""
            speed = continue_text(session, program.path, text, options, lambda s: typer.echo(s, nl=False))
    typer.echo(speed, err=True)


def parse_ids(text: str) -> list[int]:
    """Token ids from ``1,2,3``."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--ids takes numbers separated by commas, got {text!r}") from None


@contextmanager
def opened(model: Path, passes: str, target: str, length: int | None, dtype: str | None, threads: int | None
           ) -> Iterator[Program]:  # fmt: skip
    """The program of an artifact, or of a folder that is compiled for as long as the block runs."""
    import tilewright

    if any((model / name).is_file() for name in ("manifest.json", "kernels.so")):
        yield tilewright.load(model, threads=threads)
        return
    with progress_bar() as show:
        done = tilewright.compile(model, passes=passes, target=target, max_length=length, dtype=dtype, progress=show)
    typer.echo(done.report.summary(), err=True)
    yield done.program


@app.command()
def opt(
    source: Annotated[Path, typer.Argument(help="IR text (.twir; '-' reads standard input) or a Hugging Face folder.")],
    passes: Annotated[str, typer.Option("--passes", "-p")] = "",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the result goes, if not to stdout.")] = None,
    print_before: Annotated[list[str] | None, typer.Option(help="Print the IR before this pass (or 'all').")] = None,
    print_after: Annotated[list[str] | None, typer.Option(help="Print the IR after this pass (or 'all').")] = None,
    stop_after: Annotated[str | None, typer.Option(help="Stop after the first run of this pass.")] = None,
    time: Annotated[bool, typer.Option("--time", help="Print time and memory of each pass.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say why patterns did not match.")] = False,
    verify: Annotated[bool, typer.Option(help="Verify the module between passes.")] = True,
) -> None:
    """Read IR text, or trace a model, run passes, write IR text."""
    from tilewright.ir import print_module
    from tilewright.passes.pipeline import Pipeline

    module = read_module(source)
    pipeline = Pipeline.parse(passes) if passes else Pipeline(())
    report = pipeline.run(module, verify, print_before=print_before or (), print_after=print_after or (),
                          stop_after=stop_after)  # fmt: skip
    text = print_module(module)
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text)
    for line in [report.table()] if time else []:
        typer.echo(line, err=True)
    for skip, where in report.ctx.skips.items() if explain else ():
        typer.echo(f"{where}: {skip}", err=True)


def read_module(source: Path) -> Module:
    """The module that IR text says, or the one that the model in a folder is."""
    from tilewright.ir import parse_module
    from tilewright.ir import verify as check

    if source.is_dir() or source.suffix == ".gguf":
        from tilewright.frontend import trace_folder

        return trace_folder(source)
    module = parse_module(sys.stdin.read() if str(source) == "-" else source.read_text())
    check(module)
    return module


@app.command()
def inspect(
    artifact: Annotated[Path, typer.Argument(help="A compiled artifact.")],
    kernels: Annotated[bool, typer.Option("--kernels", help="List kernels with backend and schedule.")] = False,
    passes: Annotated[bool, typer.Option("--passes", help="List passes with their times.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="List the errors measured by compile --errors.")] = False,
    sensitivity: Annotated[bool, typer.Option("--sensitivity", help="List what compile --sensitivity measured.")] = False,
    ir: Annotated[bool, typer.Option("--ir", help="Print the IR that was compiled.")] = False,
    program: Annotated[bool, typer.Option("--program", help="Print the generated program.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    tokens: Annotated[int, typer.Option(help="Say what KV caches for so many tokens of a sequence take.")] = 0,
    sequences: Annotated[int, typer.Option(help="And for so many sequences.")] = 1,
) -> None:
    """Show what an artifact holds and how it was made."""
    from tilewright.inspection import cache_need, describe, kernel_table, layer_table, pass_table, sensitivity_table
    from tilewright.report import CompileReport
    from tilewright.runtime.artifact import read_manifest

    manifest, report = read_manifest(artifact), CompileReport.read(artifact)
    if json:
        typer.echo(report.to_json(), nl=False)
        return
    typer.echo(describe(manifest, report))
    if tokens:
        typer.echo(cache_need(manifest, tokens, sequences))
    shown = [(kernels, lambda: kernel_table(report)), (passes, lambda: pass_table(report))]
    shown += [(layers, lambda: layer_table(report)), (sensitivity, lambda: sensitivity_table(report))]
    shown += [(ir, (artifact / "ir.twir").read_text), (program, (artifact / "program.c").read_text)]
    for wanted, text in shown:
        if wanted:
            typer.echo(text())


@app.command()
def bench(
    model: ModelArg,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt in tokens.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 64,
    repeats: int = 5,
    passes: PassesOption = "O2",
    target: TargetOption = "native",
    max_length: LengthOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Time prefill and decode of a causal language model: medians and spread over repeats."""
    from tilewright.benching import measure

    with opened(model, passes, target, max_length, dtype, threads) as program, program.session(threads) as session:
        typer.echo(measure(session, prompt_tokens, new_tokens, repeats).table())


@app.command()
def bisect(
    model: ModelArg,
    passes: PassesOption = "O2",
    target: TargetOption = "native",
    dtype: DtypeOption = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference, relative to the largest value.")] = 1e-3,
    tokens: Annotated[int, typer.Option(help="Length of the random input in tokens.")] = 16,
    seed: int = 0,
) -> None:
    """Name the first pass, or else kernel, whose result leaves the tolerance (exit code 3 when there is one)."""
    from tilewright.bisect import bisect_folder

    culprit = bisect_folder(model, passes, target, dtype, tolerance, tokens, seed)
    typer.echo("no pass and no kernel leaves the tolerance" if culprit is None else str(culprit))
    raise typer.Exit(0 if culprit is None else CULPRIT)


app.command("eval")(eval_command)
app.command("export")(export_command)
app.add_typer(tune_app, name="tune")

if __name__ == "__main__":
    main()
