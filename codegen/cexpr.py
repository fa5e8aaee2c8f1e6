"""Dimension expressions as C."""

from __future__ import annotations

from typing import Any

import sympy

from tilewright.ir import Dim

PRELUDE = """\
static inline int64_t tw_floordiv(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }
static inline int64_t tw_mod(int64_t a, int64_t b) { return a - tw_floordiv(a, b) * b; }
static inline int64_t tw_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t tw_min(int64_t a, int64_t b) { return a < b ? a : b; }
"""


def c_dim(dim: Dim) -> str:
    """``dim`` as a C expression of type int64_t over variables named as its symbols."""
    if isinstance(dim, int):
        return f"INT64_C({dim})"
    return _expr(dim)


def _expr(e: Any) -> str:
    if e.is_Integer:
        return f"INT64_C({int(e)})"
    if e.is_Symbol:
        return str(e)
    if isinstance(e, sympy.floor):
        return _ratio(sympy.together(e.args[0]))
    if isinstance(e, sympy.Mod):
        return f"tw_mod({_expr(e.args[0])}, {_expr(e.args[1])})"
    if isinstance(e, (sympy.Max, sympy.Min)):
        name = "tw_max" if isinstance(e, sympy.Max) else "tw_min"
        first, *rest = map(_expr, e.args)
        for item in rest:
            first = f"{name}({first}, {item})"
        return first
    if e.is_Add:
        return "(" + " + ".join(map(_expr, e.args)) + ")"
    if e.is_Mul:
        if any(f.is_Rational and not f.is_Integer for f in e.args):
            return _ratio(e)
        return "(" + " * ".join(map(_expr, e.args)) + ")"
    if e.is_Pow and e.exp.is_Integer and e.exp > 0:
        return "(" + " * ".join([_expr(e.base)] * int(e.exp)) + ")"
    raise ValueError(f"dimension expression without a C form: {e}")


def _ratio(e: Any) -> str:
    num, den = sympy.fraction(e)
    return f"tw_floordiv({_expr(num)}, {_expr(den)})"
