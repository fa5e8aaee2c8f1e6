"""tilewright: a compiler for neural networks, made for LLM inference.

    compiled = tilewright.compile("path/to/hf-folder")
    compiled.save("model.tw")
    tilewright.load("model.tw").session().generate([[1, 2, 3]], 32)

Everything is imported when it is first used: loading and running an artifact needs none of the compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright.bisect import bisect
    from tilewright.bundling import emit_bundle
    from tilewright.compiler import Compiled, compile
    from tilewright.evaluation import Evaluation, evaluate
    from tilewright.exporting import export
    from tilewright.ir import TilewrightError
    from tilewright.report import CompileReport
    from tilewright.runtime import Program, Session, Tokenizer, load
    from tilewright.tuning import tune

_HOMES = {
    "compile": "tilewright.compiler",
    "Compiled": "tilewright.compiler",
    "CompileReport": "tilewright.report",
    "bisect": "tilewright.bisect",
    "emit_bundle": "tilewright.bundling",
    "evaluate": "tilewright.evaluation",
    "Evaluation": "tilewright.evaluation",
    "export": "tilewright.exporting",
    "tune": "tilewright.tuning",
    "load": "tilewright.runtime",
    "Program": "tilewright.runtime",
    "Session": "tilewright.runtime",
    "Tokenizer": "tilewright.runtime",
    "TilewrightError": "tilewright.ir",
}

__all__ = [
    "CompileReport",
    "Compiled",
    "Evaluation",
    "Program",
    "Session",
    "TilewrightError",
    "Tokenizer",
    "bisect",
    "compile",
    "emit_bundle",
    "evaluate",
    "export",
    "load",
    "tune",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tilewright' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("tilewright"):
            raise
        from tilewright.runtime.errors import MissingExtraError

        raise MissingExtraError(
            f"tilewright.{name} needs {error.name}, which is not installed; pip install 'tilewright[compile]'"
        ) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
