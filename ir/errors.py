"""Errors of the compiler. One class a kind; a message says what, where, why and the remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tilewright.ir.core import Loc


class TilewrightError(Exception):
    """Base of every error that tilewright raises on purpose."""


class LocatedError(TilewrightError):
    """An error that knows the source location it is about."""

    def __init__(self, message: str, loc: Loc | None = None) -> None:
        self.message = message
        self.loc = loc
        super().__init__(f"{message}\n  at {loc.describe()}" if loc else message)


class ParseError(TilewrightError):
    """IR or pipeline text that is not well formed; ``line`` and ``column`` count from 1."""

    def __init__(self, message: str, line: int, column: int, text: str = "") -> None:
        self.message, self.line, self.column = message, line, column
        lines = text.split("\n")
        shown = f"\n  {lines[line - 1]}\n  {' ' * (column - 1)}^" if 0 < line <= len(lines) else ""
        super().__init__(f"line {line}, column {column}: {message}{shown}")


class VerifyError(LocatedError):
    """An operation, function or module that breaks a rule of the IR."""


class InterpreterError(LocatedError):
    """The interpreter could not run a function on the given inputs."""


class TraceError(LocatedError):
    """A model that cannot be traced: names the module, the user's line and the remedy."""


class UnsupportedError(LocatedError):
    """Something valid that tilewright does not support (yet): an op, a layout, a combination."""


class CheckpointError(TilewrightError):
    """A folder of weights that cannot be read, or does not fit its model."""


class PassError(LocatedError):
    """A pass that failed, or pipeline text that names no pass."""


class CodegenError(LocatedError):
    """A kernel that no backend can lower for the target, or a tool chain that failed."""
