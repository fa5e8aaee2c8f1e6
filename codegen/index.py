"""Index arithmetic of loop kernels: integer polynomials over loop variables and runtime sizes.

An index is a `Poly`. Division and remainder are resolved by ranges where that can be proved (``(h*64 + d) // 64`` is
``h`` for ``d < 64``) and stay as `Floor` and `Mod` atoms where it cannot. A reshape is then nothing but "make the
linear index of one shape, take it apart by the other"; what cancels, cancels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

_STEPS = 64


class Complex(Exception):
    """The lanes of a vector do not lie at a constant distance from each other."""


@dataclass(frozen=True)
class Atom:
    """A factor of a term. Atoms with the same key are the same."""

    key: str

    @property
    def depth(self) -> int:
        """The innermost loop scope this depends on; 0 is the function."""
        return 0

    @property
    def lane(self) -> Var | None:
        """The vector variable this depends on."""
        return None

    @property
    def is_size(self) -> bool:
        """Whether this depends on no variable."""
        return True

    @property
    def range(self) -> tuple[Poly, Poly]:
        """Least and greatest value."""
        return Poly.of(self), Poly.of(self)


@dataclass(frozen=True)
class Size(Atom):
    """A runtime size: a symbol (at least 1), or an opaque expression (at least 0)."""

    least: int = 1
    parts: tuple[Poly, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Var(Atom):
    """A variable with ``lo <= value <= hi``; its machine value is ``val``, or ``val + lane`` when it has ``lanes``."""

    lo: Poly = field(compare=False)
    hi: Poly = field(compare=False)
    level: int = field(default=0, compare=False)
    val: Any = field(default=None, compare=False)
    lanes: int = field(default=0, compare=False)
    mask: Any = field(default=None, compare=False)
    remaining: Any = field(default=None, compare=False)
    multiple: int = field(default=1, compare=False)

    @property
    def depth(self) -> int:
        return self.level

    @property
    def lane(self) -> Var | None:
        return self if self.lanes else None

    @property
    def is_size(self) -> bool:
        return False

    @property
    def range(self) -> tuple[Poly, Poly]:
        return self.lo, self.hi


@dataclass(frozen=True)
class _Quotient(Atom):
    num: Poly = field(compare=False)
    den: Poly = field(compare=False)

    @property
    def depth(self) -> int:
        return max(self.num.depth, self.den.depth)

    @property
    def lane(self) -> Var | None:
        return self.num.lane or self.den.lane

    @cached_property
    def is_size(self) -> bool:  # type: ignore[override]
        return all(atom.is_size for atom in (*self.num.atoms, *self.den.atoms))


class Floor(_Quotient):
    """``num // den`` that no range could resolve."""

    @cached_property
    def range(self) -> tuple[Poly, Poly]:  # type: ignore[override]
        if self.is_size:
            return Poly.of(self), Poly.of(self)
        low, high = bounds(self.num)
        return floor_div(low, self.den), floor_div(high, self.den)


class Mod(_Quotient):
    """``num % den`` that no range could resolve."""

    @property
    def range(self) -> tuple[Poly, Poly]:
        return (Poly.of(self), Poly.of(self)) if self.is_size else (Poly(), self.den - 1)


@dataclass(frozen=True)
class Poly:
    """A sum of integer multiples of products of atoms, in a canonical order."""

    terms: tuple[tuple[tuple[Atom, ...], int], ...] = ()

    @staticmethod
    def of(value: Poly | Atom | int) -> Poly:
        if isinstance(value, Poly):
            return value
        if isinstance(value, Atom):
            return Poly((((value,), 1),))
        return Poly((((), int(value)),)) if value else Poly()

    @staticmethod
    def _collect(terms: Iterable[tuple[tuple[Atom, ...], int]]) -> Poly:
        total: dict[tuple[Atom, ...], int] = {}
        for atoms, factor in terms:
            total[atoms] = total.get(atoms, 0) + factor
        kept = [(atoms, factor) for atoms, factor in total.items() if factor]
        if len(kept) > 1:
            kept.sort(key=_term_key)
        return Poly(tuple(kept))

    @cached_property
    def _hash(self) -> int:
        return hash(self.terms)

    def __hash__(self) -> int:
        return self._hash

    def __add__(self, other: Poly | int) -> Poly:
        other = Poly.of(other)
        if not other.terms:
            return self
        return Poly._collect((*self.terms, *other.terms)) if self.terms else other

    def __mul__(self, other: Poly | int) -> Poly:
        other = Poly.of(other)
        if self.constant is not None:
            self, other = other, self
        if other.constant is not None:  # the order of terms stays
            return Poly(tuple((atoms, n * other.constant) for atoms, n in self.terms)) if other.constant else Poly()
        products = ((a + b, m * n) for a, m in self.terms for b, n in other.terms)
        return Poly._collect((tuple(sorted(atoms, key=lambda atom: atom.key)), n) for atoms, n in products)

    def __neg__(self) -> Poly:
        return self * -1

    def __sub__(self, other: Poly | int) -> Poly:
        return self + -Poly.of(other)

    __radd__, __rmul__ = __add__, __mul__

    @cached_property
    def constant(self) -> int | None:
        """The number this is, if it is one."""
        if not self.terms:
            return 0
        return self.terms[0][1] if len(self.terms) == 1 and not self.terms[0][0] else None

    @property
    def offset(self) -> int:
        """The constant term."""
        return next((factor for atoms, factor in self.terms if not atoms), 0)

    @cached_property
    def atoms(self) -> tuple[Atom, ...]:
        return tuple(dict.fromkeys(atom for atoms, _ in self.terms for atom in atoms))

    @cached_property
    def depth(self) -> int:
        return max((atom.depth for atom in self.atoms), default=0)

    @cached_property
    def lane(self) -> Var | None:
        """The vector variable on which this depends, if any."""
        return next((atom.lane for atom in self.atoms if atom.lane is not None), None)

    @property
    def key(self) -> str:
        return "+".join("*".join([str(factor), *(atom.key for atom in atoms)]) for atoms, factor in self.terms) or "0"

    def quotients(self) -> list[Floor | Mod]:
        """Unresolved divisions in this, the inner ones included."""
        found = []
        for atom in self.atoms:
            if isinstance(atom, _Quotient):
                found += [atom, *atom.num.quotients(), *atom.den.quotients()]
        return found

    def substitute(self, mapping: Mapping[Atom, Poly]) -> Poly:
        """Atoms replaced, also inside of divisions."""
        total = Poly()
        for atoms, factor in self.terms:
            term = Poly.of(factor)
            for atom in atoms:
                term = term * _replace(atom, mapping)
            total = total + term
        return total


Index = tuple[Poly, ...]


def _term_key(term: tuple[tuple[Atom, ...], int]) -> list[str]:
    return [atom.key for atom in term[0]]


def _replace(atom: Atom, mapping: Mapping[Atom, Poly]) -> Poly:
    if atom in mapping:
        return mapping[atom]
    if not isinstance(atom, _Quotient):
        return Poly.of(atom)
    num, den = atom.num.substitute(mapping), atom.den.substitute(mapping)
    if num == atom.num and den == atom.den:
        return Poly.of(atom)
    return floor_div(num, den) if isinstance(atom, Floor) else modulo(num, den)


# --- ranges -------------------------------------------------------------------------------------------------------


def bounds(poly: Poly) -> tuple[Poly, Poly]:
    """Least and greatest value, as polynomials over sizes. Every atom is at least 0."""
    if all(atom.is_size for atom in poly.atoms):
        return poly, poly
    low, high = Poly(), Poly()
    for atoms, factor in poly.terms:
        least, most = Poly.of(factor), Poly.of(factor)
        for atom in atoms:
            a, b = atom.range
            least, most = least * a, most * b
        low, high = (low + least, high + most) if factor > 0 else (low + most, high + least)
    return low, high


def nonnegative(poly: Poly) -> bool:
    """Whether a polynomial over sizes can be seen to be at least 0 for all sizes."""
    if poly.constant is not None:
        return poly.constant >= 0
    shifted = Poly()
    for atoms, factor in poly.terms:
        term = Poly.of(factor)
        for atom in atoms:
            term = term * (Poly.of(atom) + atom.least if isinstance(atom, Size) else Poly.of(atom))
        shifted = shifted + term
    return all(factor >= 0 for _, factor in shifted.terms)


def less(a: Poly, b: Poly) -> bool:
    """Whether ``a < b`` can be proved."""
    if a.constant is not None and b.constant is not None:
        return a.constant < b.constant
    return nonnegative(bounds(b - a)[0] - 1) or nonnegative(bounds(b)[0] - bounds(a)[1] - 1)


def at_most(a: Poly, b: Poly) -> bool:
    """Whether ``a <= b`` can be proved."""
    return less(a, b + 1)


# --- division -----------------------------------------------------------------------------------------------------


def floor_div(num: Poly, den: Poly | int) -> Poly:
    """``num // den`` for a positive ``den``."""
    den = Poly.of(den)
    exact, rest = _divide(num, den)
    if at_most(Poly(), rest) and less(rest, den):
        return exact
    if less(rest, Poly()) and at_most(-den, rest):
        return exact - 1
    if rest.terms and all(factor < 0 for atoms, factor in rest.terms if atoms) and rest.constant is None:
        return exact - floor_div(den - rest - 1, den)  # the numerator of an atom is not negative
    return exact + Poly.of(Floor(f"({rest.key}//{den.key})", rest, den))


def modulo(num: Poly, den: Poly | int) -> Poly:
    """``num % den`` for a positive ``den``."""
    den = Poly.of(den)
    rest = _divide(num, den)[1]
    if at_most(Poly(), rest) and less(rest, den):
        return rest
    return Poly.of(Mod(f"({rest.key}%{den.key})", rest, den))


def _divide(num: Poly, den: Poly) -> tuple[Poly, Poly]:
    """``num == exact * den + rest`` by long division with the leading term of ``den``."""
    lead, factor = max(den.terms, key=lambda term: (len(term[0]), _term_key(term)))
    exact, rest = Poly(), num
    for _ in range(_STEPS):
        step = next((s for s in (_quotient(term, lead, factor) for term in rest.terms) if s.terms), None)
        if step is None:
            break
        exact, rest = exact + step, rest - step * den
    least = bounds(rest)[0].constant
    if least is None or den.constant is None or 0 <= least < den.constant:
        return exact, rest
    below = least // den.constant  # the constant was divided by itself, and other terms make up for it
    return exact + below, rest - below * den


def _quotient(term: tuple[tuple[Atom, ...], int], lead: tuple[Atom, ...], factor: int) -> Poly:
    atoms, number = list(term[0]), term[1]
    for atom in lead:
        if atom not in atoms:
            return Poly()
        atoms.remove(atom)
    if not term[0]:
        return Poly.of(number // factor)
    return Poly._collect([(tuple(atoms), number // factor)]) if number % factor == 0 else Poly()


def expand(poly: Poly) -> Poly:
    """``poly`` with remainders written as ``num - den * (num // den)`` where that makes divisions cancel."""
    mods = {a: a.num - a.den * floor_div(a.num, a.den) for a in poly.atoms if isinstance(a, Mod)}
    if not mods:
        return poly
    other = poly.substitute(mods)
    return other if len(other.quotients()) < len(poly.quotients()) else poly


MOST_KNOWN = 8
"""The largest divisor that is looked for."""


def divisor(poly: Poly) -> int:
    """The largest power of two, up to `MOST_KNOWN`, that can be seen to divide the value (at lane 0)."""
    known = [math.prod([factor, *(a.multiple for a in atoms if isinstance(a, Var))]) for atoms, factor in poly.terms]
    return math.gcd(MOST_KNOWN, *known)


# --- lanes ------------------------------------------------------------------------------------------------------------


def lane_form(poly: Poly) -> tuple[Var | None, Poly, Poly]:
    """``poly == base + stride * lane``: the vector variable (None for a scalar), stride, and the base at lane 0.

    Raises `Complex` when the lanes do not lie at a constant distance.
    """
    var = poly.lane
    if var is None:
        return None, Poly(), poly
    stride: list[tuple[tuple[Atom, ...], int]] = []
    for atoms, factor in poly.terms:
        if not any(atom.lane for atom in atoms):
            continue
        others = tuple(atom for atom in atoms if atom != var)
        if len(others) != len(atoms) - 1 or any(atom.lane for atom in others):
            raise Complex
        stride.append((others, factor))
    return var, Poly._collect(stride), poly


def substitute_all(index: Index, mapping: Mapping[Atom, Poly]) -> Index:
    return tuple(p.substitute(mapping) for p in index)
