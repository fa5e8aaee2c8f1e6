"""IR elementwise operations on kernel values (scalars or vectors), and IR sizes as index values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy

from tilewright.codegen.mlir import math
from tilewright.codegen.mlir.value import Val, constant
from tilewright.ir import Dim, DType, Op, ops

_NARROW = ("bf16", "f16")


def _not(x: Val) -> Val:
    return ~x


def _truncated_div(a: Val, b: Val) -> Val:
    if a.is_float:
        return a / b
    quotient, remainder = a // b, a % b
    return quotient + (remainder.ne(0) & ((a < 0) ^ (b < 0))).select(constant(1, a.dtype, a.lanes), 0)


UNARY: dict[type[Op], Callable[[Val], Val]] = {
    ops.Neg: lambda x: -x,
    ops.Abs: Val.abs,
    ops.Sign: lambda x: (x > 0).to(x.dtype) - (x < 0).to(x.dtype),
    ops.Not: _not,
    ops.Exp: math.exp,
    ops.Log: math.log,
    ops.Log1p: math.log1p,
    ops.Sqrt: Val.sqrt,
    ops.Rsqrt: math.rsqrt,
    ops.Reciprocal: lambda x: 1.0 / x,
    ops.Sin: math.sin,
    ops.Cos: math.cos,
    ops.Tanh: math.tanh,
    ops.Sigmoid: math.sigmoid,
    ops.Erf: math.erf,
    ops.Floor: lambda x: x.floor() if x.is_float else x,
    ops.Ceil: lambda x: x.ceil() if x.is_float else x,
    ops.Round: lambda x: x.round_even() if x.is_float else x,
    ops.Relu: lambda x: x.maximum(0),
    ops.Silu: math.silu,
    ops.Gelu: math.gelu,
    ops.GeluTanh: math.gelu_tanh,
    ops.Softplus: math.softplus,
}
BINARY: dict[type[Op], Callable[[Val, Val], Val]] = {
    ops.Add: lambda a, b: a | b if a.dtype == "bool" else a + b,
    ops.Sub: lambda a, b: a - b,
    ops.Mul: lambda a, b: a & b if a.dtype == "bool" else a * b,
    ops.Div: _truncated_div,
    ops.FloorDiv: lambda a, b: a // b,
    ops.Mod: lambda a, b: a % b,
    ops.Pow: math.power,
    ops.Maximum: Val.maximum,
    ops.Minimum: Val.minimum,
    ops.And: lambda a, b: a & b,
    ops.Or: lambda a, b: a | b,
    ops.Xor: lambda a, b: a ^ b,
    ops.Eq: Val.eq,
    ops.Ne: Val.ne,
    ops.Lt: Val.__lt__,
    ops.Le: Val.__le__,
    ops.Gt: Val.__gt__,
    ops.Ge: Val.__ge__,
}


def compute_dtype(dtype: DType) -> str:
    """The element type that kernels compute in: narrow floats widen to f32, integers of four bits or fewer take eight."""
    if dtype in (DType.bf16, DType.f16) or dtype.is_narrow_float:
        return "f32"
    return f"{dtype.value[0]}8" if dtype.bits < 8 else dtype.value


def lowers(op: Op) -> bool:
    """Whether :func:`apply` knows the operation."""
    return type(op) in UNARY or type(op) in BINARY or isinstance(op, (ops.Where, ops.Cast, ops.Threshold))


def apply(op: Op, operands: Sequence[Val]) -> Val:
    """The result of an elementwise operation; operands and result are in their compute types and of one lane count."""
    if isinstance(op, ops.Cast):
        (x,) = operands
        narrow = op.dtype.value in _NARROW and op.dtype != op.x.dtype
        return x.to(op.dtype.value).to("f32") if narrow else x.to(compute_dtype(op.dtype))
    if isinstance(op, ops.Where):
        cond, a, b = operands
        return cond.select(a, b)
    if isinstance(op, ops.Threshold):
        return threshold(*operands)
    if type(op) in UNARY:
        return UNARY[type(op)](operands[0])
    return BINARY[type(op)](operands[0], operands[1])


def threshold(x: Val, limit: Val, by: Val | None = None) -> Val:
    """x where ``by``, or x itself, is not smaller than the limit."""
    size = (x if by is None else by).abs()
    return (size < limit.to(size.dtype)).select(constant(0, x.dtype, x.lanes), x)


def dim_value(dim: Dim, dims: Mapping[str, Val]) -> Val:
    """``dim`` as an index value, its symbols taken from ``dims``."""
    if isinstance(dim, int):
        return constant(dim)
    return _expr(dim, dims)


def _expr(e: Any, dims: Mapping[str, Val]) -> Val:
    if e.is_Integer:
        return constant(int(e))
    if e.is_Symbol:
        return dims[str(e)]
    if isinstance(e, sympy.floor) or (e.is_Mul and any(f.is_Rational and not f.is_Integer for f in e.args)):
        num, den = sympy.fraction(sympy.together(e.args[0] if isinstance(e, sympy.floor) else e))
        return _expr(num, dims) // _expr(den, dims)
    parts = [_expr(a, dims) for a in e.args]
    if isinstance(e, sympy.Mod):
        return parts[0] % parts[1]
    if e.is_Pow and e.exp.is_Integer and e.exp > 0:
        parts = [_expr(e.base, dims)] * int(e.exp)
    combine = {"Add": Val.__add__, "Mul": Val.__mul__, "Pow": Val.__mul__, "Max": Val.max, "Min": Val.min}
    total = parts[0]
    for part in parts[1:]:
        total = combine[type(e).__name__](total, part)
    return total
