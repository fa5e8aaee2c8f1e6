"""``tilewright export MODEL --passes w4a16 --out FOLDER``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tilewright.eval_cli import (
    CALIBRATION_TOKENS,
    CALIBRATION_WINDOW,
    CalibrationOption,
    TokensOption,
    WindowOption,
    calibration_option,
)


def export_command(
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder or a GGUF file, quantized or not.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    format: Annotated[str, typer.Option(help="compressed-tensors.")] = "compressed-tensors",
    passes: Annotated[str, typer.Option("--passes", "-p", help="A pipeline that quantizes; '' changes nothing.")] = "w4a16",
    dtype: Annotated[str | None, typer.Option("--dtype", help="Element type of what stays in floats (f32, bf16).")] = None,
    calibration: CalibrationOption = None,
    calibration_tokens: TokensOption = CALIBRATION_TOKENS,
    calibration_window: WindowOption = CALIBRATION_WINDOW,
) -> None:
    """Write a quantized model as a Hugging Face folder that vLLM, transformers and tilewright read."""
    from tilewright.exporting import export

    given = calibration_option(model, calibration, calibration_tokens, calibration_window)
    export(model, out, format=format, passes=passes, dtype=dtype, calibration=given)
    typer.echo(f"wrote {out}")
