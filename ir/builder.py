"""Adding operations to a function."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tilewright.ir.core import UNKNOWN, Function, Loc, Op, Result, Value


class Builder:
    """Appends to ``function``, or inserts before ``before`` when that is given."""

    def __init__(self, function: Function, before: Op | None = None, loc: Loc = UNKNOWN) -> None:
        self.function, self.before, self.loc = function, before, loc

    @contextmanager
    def at(self, loc: Loc) -> Iterator[None]:
        """Give the operations added inside the block this location."""
        outer, self.loc = self.loc, loc
        try:
            yield
        finally:
            self.loc = outer

    def insert(self, op: Op) -> Op:
        """Add a detached operation."""
        if op.loc == UNKNOWN:
            op.loc = self.loc
        body = self.function.body
        return self.function.insert(len(body) if self.before is None else body.index(self.before), op)

    def add(self, op: Op) -> Result:
        """Add an operation with one result and give that result."""
        return self.insert(op).result

    def add_all(self, op: Op) -> tuple[Result, ...]:
        """Add an operation and give all its results."""
        return self.insert(op).results

    def full(self, value: float | int | bool, like: Value) -> Result:
        """The scalar ``value`` with the element type of ``like``."""
        from tilewright.ir.ops.core import Full

        return self.add(Full((), value, like.dtype))

    def __call__(self, kind: type[Op], *args: Any, **fields: Any) -> Result:
        """``b(Linear, x, w)`` is ``b.add(Linear(x, w))`` with the location filled in first, for error messages."""
        fields.setdefault("loc", self.loc)
        return self.add(kind(*args, **fields))
