"""Pattern rewriting with reasons: a match that fails can say why.

A pattern is a function ``(op, rewriter) -> None`` whose first parameter's annotation names the op class it looks at.
It calls :meth:`Rewriter.replace` when it matches and :meth:`Rewriter.skip` when it does not.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tilewright.ir.builder import Builder
from tilewright.ir.core import Function, Loc, Module, Op, Value
from tilewright.ir.errors import VerifyError

Pattern = Callable[[Any, "Rewriter"], None]


@dataclass(frozen=True)
class Skip:
    """Why a pattern did not apply to an operation."""

    pattern: str
    op: str
    loc: Loc
    reason: str

    def __str__(self) -> str:
        return f"{self.pattern}: {self.op} at {self.loc.describe()}: {self.reason}"


@dataclass
class Rewriter:
    """What a pattern may do to the function that holds the op it looks at."""

    module: Module
    skips: list[Skip] = field(default_factory=list)
    changed: int = 0
    pattern: str = ""

    def before(self, op: Op) -> Builder:
        """A builder that inserts before ``op`` with its location."""
        if op.parent is None:
            raise VerifyError(f"{op.name} is in no function", op.loc)
        return Builder(op.parent, op, op.loc)

    def skip(self, op: Op, reason: str) -> None:
        """Record why ``op`` was left alone."""
        self.skips.append(Skip(self.pattern, op.name, op.loc, reason))

    def replace(self, op: Op, new: Value | Op | Sequence[Value]) -> None:
        """Use ``new`` (a value, an op to insert here, or one value a result) instead of ``op``, which goes away."""
        if isinstance(new, Op):
            if new.parent is None:
                self.before(op).insert(new)
            new = new.results
        values = [new] if isinstance(new, Value) else list(new)
        if len(values) != len(op.results):
            raise VerifyError(f"{op.name} has {len(op.results)} results, {len(values)} replace them", op.loc)
        for old, value in zip(op.results, values):
            old.replace_all_uses(value)
        op.drop()
        self.changed += 1

    def erase(self, op: Op) -> None:
        """Take out an operation that nothing uses."""
        op.drop()
        self.changed += 1


def rewrite(module: Module, *patterns: Pattern, functions: Sequence[Function] | None = None) -> Rewriter:
    """Apply patterns to every op until none changes anything; gives the rewriter with counts and reasons."""
    rw = Rewriter(module)
    for function in functions if functions is not None else list(module.functions.values()):
        while _sweep(rw, function, patterns):
            pass
    return rw


def _sweep(rw: Rewriter, function: Function, patterns: Sequence[Pattern]) -> bool:
    start = rw.changed
    for op in function.walk():
        for pattern in patterns:
            if op.parent is function and isinstance(op, _looks_at(pattern)):
                rw.pattern = getattr(pattern, "__name__", str(pattern)).replace("_", "-")
                pattern(op, rw)
    return rw.changed > start


@cache
def _looks_at(pattern: Pattern) -> Any:
    """The op classes named by the annotation of the pattern's first parameter."""
    fn = inspect.unwrap(pattern)
    first = next(iter(inspect.signature(fn).parameters))
    hints = typing.get_type_hints(fn.__func__ if inspect.ismethod(fn) else fn)
    return typing.get_args(hints[first]) or hints[first]
