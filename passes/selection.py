"""Which weights a pass is about: patterns of names, and why a weight is left alone."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatch

from tilewright.ir import Module, PassError, Weight


def check_patterns(name: str, module: Module, skip: Sequence[str], only: Sequence[str]) -> None:
    """Raise PassError for a pattern that matches no weight: a name that is misspelt would change nothing."""
    for option, pattern in [("skip", p) for p in skip] + [("only", p) for p in only]:
        if not any(fnmatch(weight, pattern) for weight in module.weights):
            close = get_close_matches(pattern.strip("*"), module.weights, n=3, cutoff=0.3) or list(module.weights)[:3]
            raise PassError(f"option {option} of {name}: no weight is named {pattern!r}; near are {', '.join(close)}")


def left_alone(weight: Weight | None, skip: Sequence[str], only: Sequence[str]) -> str | None:
    """Why a weight (None: one that is computed) stays as it is, if it does."""
    if weight is None:
        return "its weight is computed"
    if not weight.dtype.is_float:
        return f"@{weight.name} is {weight.dtype.value}"
    return left_out(weight, skip, only)


def left_out(weight: Weight, skip: Sequence[str], only: Sequence[str]) -> str | None:
    """Why patterns of names leave a weight out, if they do."""
    if any(fnmatch(weight.name, pattern) for pattern in skip):
        return f"the option skip names @{weight.name}"
    if only and not any(fnmatch(weight.name, pattern) for pattern in only):
        return f"the option only does not name @{weight.name}"
    return None
