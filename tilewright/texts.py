"""Texts to evaluate and to calibrate on: read, tokenized with the model's tokenizer, cut into windows, checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.ir import TilewrightError
from tilewright.runtime import Tokenizer

Array = np.ndarray[Any, Any]
Text = str | os.PathLike[str] | Sequence[int] | Array
"""The path of a file in UTF-8, or token ids."""


class TextError(TilewrightError):
    """A text, or token ids, that a model cannot be evaluated or calibrated on."""


def read_text(path: str | os.PathLike[str]) -> str:
    """What a file says; raises TextError for a file that is missing, empty, or no text in UTF-8."""
    name = os.fspath(path)
    try:
        text = Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise TextError(f"{name}: cannot be read ({error.strerror}); give the path of a text file") from None
    except UnicodeDecodeError as error:
        raise TextError(f"{name}: byte {error.start} is not UTF-8; give a text file") from None
    if not text.strip():
        raise TextError(f"{name}: the text is empty; give a file with some thousand words")
    return text


def token_ids(text: Text, folder: str | os.PathLike[str] | None) -> Array:
    """The token ids i64 ``[N]`` of ``text``, by the tokenizer in ``folder``.

    Raises TextError for a text that is empty or ids that are no row of integers, ArtifactError without a tokenizer.
    """
    if isinstance(text, (str, os.PathLike)):
        return np.array(tokenizer_of(folder).encode(read_text(text)), np.int64)
    ids = np.asarray(text)
    if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise TextError(f"token ids are a row of integers, got {ids.dtype}{list(ids.shape)}")
    return ids.astype(np.int64)


def tokenizer_of(folder: str | os.PathLike[str] | None) -> Tokenizer:
    """The tokenizer of a model folder or an artifact; raises TextError or ArtifactError when there is none."""
    if folder is None:
        raise TextError("the model came without a folder, so it has no tokenizer: give token ids, or a folder with one")
    return Tokenizer(folder)


def windows(ids: Array, window: int, stride: int, most: int | None = None) -> Array:
    """Windows ``[n, window]`` of ``ids``, each starts ``stride`` tokens after the one before; a rest is left out.

    ``most``: so many that at most that many tokens are scored, ``stride`` a window. Raises TextError when not even one
    window fits or the numbers make no sense.
    """
    if not 1 <= stride < window:
        raise TextError(f"stride {stride} must be between 1 and window - 1 = {window - 1}: the rest of a window is context")
    if most is not None and most < stride:
        raise TextError(f"at most {most} tokens are to be scored, a window scores {stride}; give at least that")
    if len(ids) < window:
        raise TextError(f"the text has {len(ids)} tokens, a window needs {window}; give a longer text or a smaller window")
    rows = np.lib.stride_tricks.sliding_window_view(ids, window)[::stride]
    return np.ascontiguousarray(rows if most is None else rows[: most // stride])


def check_vocabulary(ids: Array, size: int | None, model: str) -> None:
    """Raise TextError for ids that a model with ``size`` tokens does not have."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (size is not None and high >= size):
        raise TextError(f"{model}: the text has token ids from {low} to {high}, the model has {size} tokens (0 to "
                        f"{(size or 0) - 1}); give the model's own tokenizer")  # fmt: skip


def sentences(text: str, tokenizer: Tokenizer, longest: int) -> list[list[int]]:
    """Token ids of the lines of ``text`` that say something, with what the model expects around, cut to ``longest``."""
    return [tokenizer.encode(line)[:longest] for line in text.splitlines() if line.strip()]
