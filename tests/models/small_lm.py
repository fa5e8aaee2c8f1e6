"""The trained language model in ``small-lm``: traced once a process, and a text that it was not trained on."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tilewright.bisect import copy_of
from tilewright.frontend import trace_folder
from tilewright.ir import Module
from tilewright.runtime.tokenizer import Tokenizer

FOLDER = Path(__file__).with_name("small-lm")
HELD_OUT = Path(__file__).parents[1] / "zoo.py"


def traced(dtype: str | None = None) -> Module:
    """The module as ``compile`` would trace it."""
    return copy_of(_traced(dtype))


@cache
def _traced(dtype: str | None) -> Module:
    return trace_folder(FOLDER, dtype=dtype)


def held_out() -> list[int]:
    return Tokenizer(FOLDER).encode(HELD_OUT.read_text())
