"""Loops, scopes and index values of a kernel under construction.

Whatever does not depend on a loop's variable is emitted before that loop, once: a `Scope` is one level of the nest with
what was computed there. ``memo`` asks for the level a value belongs to, and reuses it when it is there already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch_mlir import ir

from tilewright.codegen.index import Floor, Mod, Poly, Size, Var, bounds, divisor, floor_div, nonnegative
from tilewright.codegen.mlir.builder import Kernel, Loop
from tilewright.codegen.mlir.value import Val, constant

T = TypeVar("T")
Group = list[Val]


@dataclass
class Scope:
    """One level of the nest; ``anchor`` is the operation in the level above that contains it."""

    anchor: Any
    known: dict[Any, Any] = field(default_factory=dict)


class Nest:
    """The stack of scopes, and how to open loops on it."""

    def __init__(self, kernel: Kernel, lanes: int) -> None:
        self.kernel, self.lanes = kernel, lanes
        self.scopes = [Scope(None)]
        self.barrier = 0  # nothing moves out of the conditional block at this level
        self._names = 0

    # --- placement --------------------------------------------------------------------------------------------------

    def memo(self, key: Any, depth: int, make: Callable[[], T]) -> T:
        """The value of ``key``, made in the scope ``depth`` when it is not known yet."""
        place = max(depth, self.barrier)
        for scope in self.scopes[depth:place + 1]:
            if key in scope.known:
                return scope.known[key]
        known = self.scopes[place].known
        with self._at(place):
            known[key] = value = make()
        return value

    @contextmanager
    def _at(self, depth: int) -> Iterator[None]:
        if depth == len(self.scopes) - 1:
            yield
            return
        inner, self.scopes = self.scopes, self.scopes[:depth + 1]
        try:
            with ir.InsertionPoint(inner[depth + 1].anchor):
                yield
        finally:
            self.scopes = inner

    @contextmanager
    def scope(self, anchor: Any) -> Iterator[None]:
        self.scopes = [*self.scopes, Scope(anchor)]
        try:
            yield
        finally:
            self.scopes = self.scopes[:-1]

    def fenced(self, build: Callable[[], Val]) -> Callable[[], Sequence[Val]]:
        """``build`` as one side of ``Kernel.branch``: what it emits stays in there."""

        def side() -> Sequence[Val]:
            outer, self.barrier = self.barrier, len(self.scopes)
            try:
                with self.scope(None):
                    return [build()]
            finally:
                self.barrier = outer

        return side

    # --- variables and loops ----------------------------------------------------------------------------------------

    def variable(self, low: Poly | int, high: Poly | int, val: Val | None, lanes: int = 0, **extra: Any) -> Var:
        """A fresh variable of the current scope with ``low <= value <= high``."""
        self._names += 1
        name = f"v{self._names:05d}"
        return Var(name, Poly.of(low), Poly.of(high), len(self.scopes) - 1, val, lanes, **extra)

    @contextmanager
    def loop(self, start: Val | int, stop: Val | int, step: int = 1, carry: Sequence[Val] = ()) -> Iterator[Loop]:
        """``Kernel.loop`` with a scope of its own."""
        with self.kernel.loop(start, stop, step, carry) as loop, self.scope(loop.operation):
            yield loop

    def each(self, start: Poly, stop: Poly, body: Callable[[Var, Group], Group], carry: Group) -> Group:
        """A loop over scalars: ``carry = body(i, carry)``."""
        with self.loop(self.bound(start), self.bound(stop), 1, carry) as loop:
            after = body(self.variable(start, stop - 1, loop.index), loop.values)
            if carry:
                loop.next(*after)
        return loop.results if carry else []

    def sweep(self, start: Poly, stop: Poly, body: Callable[[Var, Group], Group], carry: Sequence[Group],
              span: tuple[Poly, Poly] | None = None) -> list[Group]:
        """A loop over vectors, ``len(carry)`` of them at a time, each with a group of carried values of its own.

        Lanes past ``stop`` are masked off. ``span`` is the range of the variable when start and stop say too little.
        """
        groups, unroll = [list(group) for group in carry], len(carry)
        low, high = span or (start, stop - 1)
        count = stop - start
        wide = unroll * self.lanes
        main = floor_div(count, wide) * wide
        if main.constant != 0:
            groups = self._vectors(start, start + main, groups, body, (low, high), None)
        rest = count - main
        if rest.constant is None:
            groups[:1] = self._vectors(start + main, stop, groups[:1], body, (low, high), stop)
            return groups
        full = rest.constant // self.lanes * self.lanes
        if full:
            groups[:1] = self._vectors(start + main, start + main + full, groups[:1], body, (low, high), None)
        if rest.constant != full:
            groups[:1] = self._vectors(start + main + full, stop, groups[:1], body, (low, high), stop)
        return groups

    def _vectors(self, start: Poly, stop: Poly, groups: list[Group], body: Callable[[Var, Group], Group],
                 span: tuple[Poly, Poly], limit: Poly | None) -> list[Group]:
        carry = [value for group in groups for value in group]
        size = len(groups[0])
        end = None if limit is None else self.number(limit)
        multiple = math.gcd(divisor(start), self.lanes)
        with self.loop(self.bound(start), self.bound(stop), self.lanes * len(groups), carry) as loop:
            after: Group = []
            for i in range(len(groups)):
                at = loop.index + i * self.lanes
                remaining = None if end is None else end - at
                mask = None if remaining is None else self.kernel.mask(remaining, self.lanes)
                var = self.variable(*span, at, self.lanes, mask=mask, remaining=remaining, multiple=multiple)
                after += body(var, loop.values[i * size:(i + 1) * size])
            if carry:
                loop.next(*after)
        out = loop.results if carry else []
        return [out[i * size:(i + 1) * size] for i in range(len(groups))]

    # --- index values -----------------------------------------------------------------------------------------------

    def bound(self, poly: Poly) -> Val | int:
        return poly.constant if poly.constant is not None else self.number(poly)

    def number(self, poly: Poly) -> Val:
        """A polynomial as an index value (at lane 0, for a vector variable)."""
        if poly.constant is not None:
            return constant(poly.constant)
        return self.memo(("number", poly), poly.depth, lambda: self._sum(poly))

    def _sum(self, poly: Poly) -> Val:
        """The terms of outer scopes are one number of theirs, so that only the rest is added in this one."""
        inner = [t for t in poly.terms if max((a.depth for a in t[0]), default=0) == poly.depth]
        outer = Poly(tuple(t for t in poly.terms if t not in inner))
        total = self.number(outer) if outer.terms and outer.constant is None else None
        for atoms, factor in inner:
            term = self._term(atoms, factor)
            total = term if total is None else total + term
        assert total is not None
        return total + outer.constant if outer.constant else total

    def _term(self, atoms: Sequence[Any], factor: int) -> Val:
        value = None
        for atom in atoms:
            number = self._atom(atom)
            value = number if value is None else value * number
        return constant(factor) if value is None else value * factor

    def _atom(self, atom: Any) -> Val:
        if isinstance(atom, Var):
            return atom.val
        if isinstance(atom, Size):
            return self._size(atom)
        return self.memo(("atom", atom), atom.depth, lambda: self._quotient(atom))

    def _quotient(self, atom: Floor | Mod) -> Val:
        num, den = self.number(atom.num), self.number(atom.den)
        if not nonnegative(bounds(atom.num)[0]):
            num, den = num.to("i64"), den.to("i64")  # rounds down below zero, too
        return (num // den if isinstance(atom, Floor) else num % den).to("index")

    def _size(self, atom: Size) -> Val:
        if not atom.parts:
            return self.kernel.dims[atom.key]
        total, *others = map(self.number, atom.parts)
        for other in others:
            total = total.max(other) if atom.key.startswith("max") else total.min(other)
        return total
