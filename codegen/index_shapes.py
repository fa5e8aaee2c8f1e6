"""Shapes in index arithmetic: sizes as polynomials, positions in memory, and both taken apart again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import sympy

from tilewright.codegen.index import (
    Atom,
    Floor,
    Index,
    Mod,
    Poly,
    Size,
    expand,
    floor_div,
    modulo,
)
from tilewright.ir import Dim, sym


def size(dim: Dim | Poly) -> Poly:
    """A dimension as a polynomial."""
    if isinstance(dim, (int, Poly)):
        return Poly.of(dim)
    return _from_sympy(dim)


def as_dim(poly: Poly) -> Dim:
    """A polynomial over sizes as a dimension."""
    total: Any = sympy.Integer(0)
    for atoms, factor in poly.terms:
        total += factor * sympy.prod([_to_sympy(atom) for atom in atoms])
    return int(total) if total.is_Integer else total


def _to_sympy(atom: Atom) -> Any:
    if isinstance(atom, (Floor, Mod)):
        num, den = as_dim(atom.num), as_dim(atom.den)
        return sympy.floor(sympy.sympify(num) / den) if isinstance(atom, Floor) else sympy.Mod(num, den)
    assert isinstance(atom, Size)
    if not atom.parts:
        return sym(atom.key)
    return (sympy.Max if atom.key.startswith("max") else sympy.Min)(*map(as_dim, atom.parts))


@lru_cache(4096)
def _from_sympy(e: Any) -> Poly:
    if e.is_Integer:
        return Poly.of(int(e))
    if e.is_Symbol:
        return Poly.of(Size(str(e)))
    if e.is_Add:
        return _whole(e) or sum((_from_sympy(arg) for arg in e.args), Poly())
    if e.is_Mul:
        return _whole(e) or _product(map(_from_sympy, e.args))
    if e.is_Pow and e.exp.is_Integer and e.exp > 0:
        return _product([_from_sympy(e.base)] * int(e.exp))
    if isinstance(e, (sympy.floor, sympy.ceiling)):
        num, den = sympy.fraction(sympy.together(e.args[0]))
        extra = den - 1 if isinstance(e, sympy.ceiling) else 0
        return floor_div(_from_sympy(sympy.expand(num + extra)), _from_sympy(den))
    if isinstance(e, sympy.Mod):
        return modulo(_from_sympy(e.args[0]), _from_sympy(e.args[1]))
    if isinstance(e, (sympy.Max, sympy.Min)):
        parts = tuple(sorted(map(_from_sympy, e.args), key=lambda part: part.key))
        name = "max" if isinstance(e, sympy.Max) else "min"
        return Poly.of(Size(f"{name}({','.join(part.key for part in parts)})", 0, parts))
    raise ValueError(f"dimension expression without an index form: {e!r}")


def _whole(e: Any) -> Poly | None:
    """An exact division such as ``S/2``."""
    num, den = sympy.fraction(sympy.together(e))
    return None if den == 1 else floor_div(_from_sympy(sympy.expand(num)), _from_sympy(den))


def _product(factors: Iterable[Poly]) -> Poly:
    total = Poly.of(1)
    for factor in factors:
        total = total * factor
    return total


def linear(index: Sequence[Poly], shape: Sequence[Dim | Poly]) -> Poly:
    """The row-major position of ``index``."""
    total = Poly()
    for i, dim in zip(index, shape):
        total = total * size(dim) + i
    return expand(total)


def delinear(position: Poly, shape: Sequence[Dim | Poly]) -> Index:
    """The index whose row-major position is ``position``."""
    sizes = [size(dim) for dim in shape]
    leading = next((axis for axis, n in enumerate(sizes) if n.constant != 1), 0)
    out: list[Poly] = []
    rest = position
    for axis in reversed(range(len(sizes))):
        if sizes[axis].constant == 1:
            out.append(Poly())
        elif axis == leading:
            out.append(rest)
        else:
            out.append(modulo(rest, sizes[axis]))
            rest = floor_div(rest, sizes[axis])
    return tuple(reversed(out))
