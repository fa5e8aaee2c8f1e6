"""Errors of torch.export in the user's words: what, on which line, and what to do instead."""

from __future__ import annotations

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from tilewright.frontend.locate import Locator, source_line
from tilewright.ir.errors import TilewrightError, TraceError, UnsupportedError

_READS = (".item(", "int(", "float(", "bool(", ".tolist(", "print(", "range(")


def explain(error: Exception, locator: Locator) -> TilewrightError:
    """The error to raise in place of ``error``."""
    if isinstance(error, TilewrightError):
        return error
    loc = locator.error(error)
    line = source_line(loc)
    shown = f": {line}" if line else ""
    if isinstance(error, (GuardOnDataDependentSymNode, DataDependentOutputException)):
        return TraceError(f"{_data_dependence(line)}{shown}\n  remedy: {_remedy(line)}", loc)
    if isinstance(error, DynamicOutputShapeException):
        return UnsupportedError(f"the result's shape depends on data{shown}\n  remedy: use torch.where or a mask", loc)
    if "numpy" in str(error):
        return TraceError(f"numpy inside forward{shown}\n  remedy: use the torch function of the same name", loc)
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return TraceError(f"{type(error).__name__} while tracing: {first}{shown and chr(10) + '  ' + line}", loc)


def _data_dependence(line: str) -> str:
    if line.startswith("assert"):
        return "assertion about tensor values"
    if not line.startswith(("if ", "elif ", "while ")) and any(word in line for word in _READS):
        return "reads tensor values while tracing"
    return "branch depends on tensor values"


def _remedy(line: str) -> str:
    if line.startswith("assert"):
        return "leave it out, or check outside of forward"
    return "use torch.where, or compute it outside of forward and pass it in"
