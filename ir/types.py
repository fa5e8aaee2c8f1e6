"""Types: element types, symbolic dimensions, tensors and KV caches."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import sympy

from tilewright.ir.dtypes import DType as DType
from tilewright.ir.kv_type import KVType as KVType

Dim: TypeAlias = "int | sympy.Expr"
Shape: TypeAlias = "tuple[Dim, ...]"


@cache
def sym(name: str) -> sympy.Symbol:
    """The symbolic dimension ``name`` (upper case letters, digits, ``_``): a positive integer."""
    if not (name.isascii() and name.isidentifier() and name[0].isupper() and name == name.upper()):
        raise ValueError(f"a symbolic dimension is written in upper case, got {name!r}")
    return sympy.Symbol(name, integer=True, positive=True)


def as_dim(value: Any) -> Dim:
    """``value`` as an int when it is one, else as a simplified sympy expression."""
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, str):
        return parse_dim(value)
    return int(value) if value.is_Integer else value


_LONGEST_DIM = 1000
_BINARY: dict[type, Any] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: sympy.floor(a / b),
    ast.Mod: lambda a, b: sympy.Mod(a, b),
}


def parse_dim(text: str) -> Dim:
    """Read an expression over ``+ - * // % max min`` and upper case symbols; raises ValueError."""

    def walk(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=v) if type(v) is int:
                return sympy.Integer(v)
            case ast.Name(id=name):
                return sym(name)
            case ast.UnaryOp(op=ast.USub(), operand=x):
                return -walk(x)
            case ast.BinOp(left=a, op=op, right=b) if type(op) in _BINARY:
                return _BINARY[type(op)](walk(a), walk(b))
            case ast.Call(func=ast.Name(id=("max" | "min") as f), args=args) if args:
                return (sympy.Max if f == "max" else sympy.Min)(*map(walk, args))
        raise ValueError(f"not a dimension expression: {text!r}")

    if len(text) > _LONGEST_DIM:
        raise ValueError(f"a dimension expression of {len(text)} characters; {_LONGEST_DIM} are allowed")
    try:
        value = walk(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError, ZeroDivisionError, TypeError, OverflowError) as error:
        raise ValueError(f"not a dimension expression: {text!r}") from error
    if value.has(sympy.nan, sympy.zoo, sympy.oo):
        raise ValueError(f"division by zero in the dimension {text!r}")
    return as_dim(value)


def dim_text(dim: Dim) -> str:
    """The text of a dimension: ``896``, ``S`` or an expression such as ``(S//2)``; :func:`parse_dim` reads it."""
    if isinstance(dim, int) or dim.is_Symbol:
        return str(dim)
    return _expr_text(sympy.expand(dim))  # one text for equal dimensions, as for same_dim


def _expr_text(e: Any) -> str:
    if e.is_Integer or e.is_Symbol:
        return str(e)
    if isinstance(e, sympy.floor):
        num, den = sympy.fraction(sympy.together(e.args[0]))
        return f"({_expr_text(num)}//{_divisor(den)})"
    if isinstance(e, sympy.Mod):
        return f"({_expr_text(e.args[0])}%{_divisor(e.args[1])})"
    if isinstance(e, (sympy.Max, sympy.Min)):
        name = "max" if isinstance(e, sympy.Max) else "min"
        return f"{name}({', '.join(map(_expr_text, e.args))})"
    if e.is_Add:
        return "(" + "+".join(map(_expr_text, e.as_ordered_terms())).replace("+-", "-") + ")"
    if e.is_Mul:
        factors = e.as_ordered_factors()
        if factors[0] == -1:
            return "-" + _expr_text(sympy.Mul(*factors[1:]))
        if any(f.is_Rational and not f.is_Integer for f in factors):
            num, den = sympy.fraction(e)
            return f"({_expr_text(num)}//{_divisor(den)})"
        return "*".join(map(_expr_text, factors))
    if e.is_Pow and e.exp.is_Integer and e.exp > 0:
        return "*".join([_expr_text(e.base)] * int(e.exp))
    raise ValueError(f"dimension expression without a text form: {e!r}")


def _divisor(e: Any) -> str:
    text = _expr_text(e)
    return text if e.is_Integer or e.is_Symbol or _closed(text) else f"({text})"


def _closed(text: str) -> bool:
    """Whether one pair of parentheses holds all of ``text``."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return i > 0 and i == len(text) - 1
    return False


def eval_dim(dim: Dim, env: Mapping[str, int]) -> int:
    """The value of ``dim`` with its symbols taken from ``env``; KeyError names an unbound symbol."""
    if isinstance(dim, int):
        return dim
    if dim.is_Symbol:
        return env[str(dim)]
    value = dim.subs({s: env[str(s)] for s in dim.free_symbols})
    return int(value)


def dim_symbols(dims: Sequence[Dim]) -> set[str]:
    """Names of the symbols in ``dims``."""
    return {str(s) for d in dims if not isinstance(d, int) for s in d.free_symbols}


def product(dims: Sequence[Dim]) -> Dim:
    """Number of elements of a shape."""
    total: Any = 1
    for d in dims:
        total = total * d
    return as_dim(total)


def same_dim(a: Dim, b: Dim) -> bool:
    """Whether two dimensions are equal for every value of their symbols."""
    if a == b:
        return True
    if isinstance(a, int) and isinstance(b, int):
        return False
    return bool(sympy.expand(a - b) == 0 or sympy.expand(_flat_floors(a) - _flat_floors(b)) == 0)


def _flat_floors(dim: Any) -> Any:
    """``dim`` with floors of floors joined: ``(x//2 + k)//3`` is ``(x + 2*k)//6``."""
    return sympy.sympify(dim).replace(sympy.floor, lambda arg: sympy.floor(_without_floor(sympy.expand(arg))))


def _without_floor(arg: Any) -> Any:
    for term in sympy.Add.make_args(arg):
        factor, inner = term.as_coeff_Mul()
        if not isinstance(inner, sympy.floor) or not factor.is_Rational or factor.p != 1:
            continue
        rest = sympy.expand((arg - term) * factor.q)
        if rest.is_integer:  # only then the inner floor changes nothing
            return _without_floor(sympy.expand((inner.args[0] + rest) / factor.q))
    return arg


@dataclass(frozen=True)
class TensorType:
    """A dense row-major tensor; no strides, value semantics."""

    shape: Shape
    dtype: DType

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(map(as_dim, self.shape)))

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def elements(self) -> Dim:
        return product(self.shape)

    @property
    def bytes(self) -> Dim:
        """What the elements take where they are stored."""
        if self.dtype.bits < 8:
            return as_dim((self.elements * self.dtype.bits + 7) // 8)
        return as_dim(self.elements * self.dtype.size)

    def with_shape(self, shape: Sequence[Dim]) -> TensorType:
        return TensorType(tuple(shape), self.dtype)

    def with_dtype(self, dtype: DType) -> TensorType:
        return TensorType(self.shape, dtype)

    def __str__(self) -> str:
        return f"tensor<{''.join(_dim_item(d) + 'x' for d in self.shape)}{self.dtype.value}>"


def _dim_item(dim: Dim) -> str:
    text = dim_text(dim)
    if isinstance(dim, int) or dim.is_Symbol or _closed(text):
        return text
    return f"({text})"


Type: TypeAlias = TensorType | KVType
