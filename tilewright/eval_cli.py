"""``tilewright eval MODEL --text FILE``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tilewright.calibration_data import Calibration

CalibrationOption = Annotated[
    Path | None, typer.Option("--calibration", help="A text that quantization methods look at (held out from --text).")
]
TokensOption = Annotated[int, typer.Option("--calibration-tokens", help="Tokens of it that are used at most.")]
WindowOption = Annotated[int, typer.Option("--calibration-window", help="Tokens a piece of it.")]
SensitivityOption = Annotated[
    bool, typer.Option("--sensitivity", help="Compress one layer at a time and list what that changes (slow).")
]
CALIBRATION_TOKENS, CALIBRATION_WINDOW = 16384, 256


def eval_command(
    model: Annotated[Path, typer.Argument(help="A compiled artifact, or a Hugging Face folder that is compiled for it.")],
    text: Annotated[Path, typer.Option("--text", help="A text file; for an encoder, a sentence a line.")],
    reference: Annotated[Path | None, typer.Option(help="An artifact or a folder to compare with.")] = None,
    window: Annotated[int, typer.Option(help="Tokens a window; of a sentence, for an encoder.")] = 256,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; half a window if left out.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens to score at most.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A folder with a tokenizer, if the model came without.")] = None,
    passes: Annotated[str, typer.Option("--passes", "-p", help="For a folder: O0..O3, w8a8, or a list of passes.")] = "O2",
    reference_passes: Annotated[str, typer.Option(help="The same for a reference that is a folder.")] = "O2",
    target: Annotated[str, typer.Option("--target", "-t")] = "native",
    dtype: Annotated[str | None, typer.Option("--dtype", help="Element type to load weights in (f32, bf16).")] = None,
    calibration: CalibrationOption = None,
    calibration_tokens: TokensOption = CALIBRATION_TOKENS,
    calibration_window: WindowOption = CALIBRATION_WINDOW,
    threads: Annotated[int | None, typer.Option("--threads")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON ('-' is standard output).")] = None,
) -> None:
    """Perplexity on a text; against a reference also KL divergence and top-1 agreement (an encoder: cosines)."""
    import tilewright
    from tilewright.cli import progress_bar

    with progress_bar() as show:
        done = tilewright.evaluate(
            model, text, reference=reference, window=window, stride=stride, max_tokens=max_tokens, tokenizer=tokenizer,
            passes=passes, reference_passes=reference_passes, target=target, dtype=dtype, threads=threads, progress=show,
            calibration=calibration_option(model, calibration, calibration_tokens, calibration_window),
        )  # fmt: skip
    if json is not None and str(json) == "-":
        typer.echo(done.to_json(), nl=False)
        return
    if json is not None:
        json.write_text(done.to_json())
    typer.echo(done.summary())


def calibration_option(model: Path, text: Path | None, tokens: int, window: int) -> Calibration | None:
    """What ``--calibration`` asks for; raises TextError for a text that cannot be used."""
    if text is None:
        return None
    from tilewright.calibration_data import Calibration

    return Calibration(text, model, tokens, window)
