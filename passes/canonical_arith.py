"""``x * 1`` -> ``x``, ``pow(x, 2)`` -> ``x * x``, ``-(-x)`` -> ``x``, ...: arithmetic with one spelling."""

from __future__ import annotations

import math
from typing import Any

from tilewright.ir import DType, Op, Pattern, Rewriter, Value, ops
from tilewright.passes.match import Number, is_lossless, is_scalar, made_by, replace, same_shape, scalar

_COMMUTATIVE = (ops.Add, ops.Mul, ops.And, ops.Or, ops.Xor, ops.Maximum, ops.Minimum, ops.Eq, ops.Ne)
_OPPOSITE = {ops.Lt: ops.Ge, ops.Ge: ops.Lt, ops.Gt: ops.Le, ops.Le: ops.Gt, ops.Eq: ops.Ne, ops.Ne: ops.Eq}


def _keep(op: Op, rw: Rewriter, x: Value) -> None:
    """Replace ``op`` by its operand ``x``, broadcast to the shape of the result."""
    shape = op.result.shape
    replace(rw, op, x if same_shape(x.shape, shape) else ops.Broadcast(x, shape))


def _constant(rw: Rewriter, op: Op, value: Number, like: Value) -> Value:
    return rw.before(op).full(value, like)


def constants_second(op: ops.Binary, rw: Rewriter) -> None:
    """``2 * x`` -> ``x * 2``."""
    if isinstance(op, _COMMUTATIVE) and scalar(op.a) is not None and scalar(op.b) is None:
        rw.replace(op, type(op)(op.b, op.a))


def neutral_operand(op: ops.Binary, rw: Rewriter) -> None:
    """``x + 0``, ``x - 0``, ``x * 1``, ``x / 1``, ``x and true``, ``x or false`` -> ``x``."""
    number = scalar(op.b)
    if number is None:
        return
    is_bool = op.a.dtype is DType.bool
    zero = isinstance(op, (ops.Add, ops.Sub)) and number == 0
    one = isinstance(op, (ops.Mul, ops.Div, ops.Pow)) and number == 1
    logical = is_bool and ((isinstance(op, ops.And) and bool(number)) or (isinstance(op, ops.Or) and not number))
    if zero or one or logical:
        _keep(op, rw, op.a)


def absorbing_operand(op: ops.Binary, rw: Rewriter) -> None:
    """``x and false`` -> ``false``, ``x or true`` -> ``true``."""
    number = scalar(op.b) if op.a.dtype is DType.bool else None
    if number is None:
        return
    if (isinstance(op, ops.And) and not number) or (isinstance(op, ops.Or) and number):
        replace(rw, op, ops.Full(op.result.shape, bool(number), DType.bool))


def join_constants(op: ops.Binary, rw: Rewriter) -> None:
    """``(x + 1) + 2`` -> ``x + 3`` of integers, likewise ``*``, also of floats when nothing can overflow or vanish."""
    inner = op.a.owner
    number = scalar(op.b)
    if number is None or not isinstance(op, (ops.Add, ops.Mul)) or not isinstance(inner, type(op)):
        return
    first = scalar(inner.b)
    if first is None or isinstance(first, bool):
        return
    joined = first + number if isinstance(op, ops.Add) else first * number
    if op.a.dtype.is_float and (isinstance(op, ops.Add) or not all(map(_is_moderate, (first, number, joined)))):
        return  # adding floats in another order rounds differently
    replace(rw, op, type(op)(inner.a, _constant(rw, op, joined, op.b)))


def _is_moderate(number: Number) -> bool:
    return 1e-6 <= abs(number) <= 1e6


def subtraction(op: ops.Binary, rw: Rewriter) -> None:
    """``x - 2`` -> ``x + -2``, ``x - (-y)`` -> ``x + y``, ``x + (-y)`` -> ``x - y``."""
    number, negated = scalar(op.b), made_by(op.b, ops.Neg)
    if isinstance(op, ops.Sub) and number is not None and op.a.dtype is not DType.u8:
        replace(rw, op, ops.Add(op.a, _constant(rw, op, -number, op.b)))
    elif isinstance(op, ops.Sub) and negated is not None:
        replace(rw, op, ops.Add(op.a, negated.x))
    elif isinstance(op, ops.Add) and negated is not None:
        replace(rw, op, ops.Sub(op.a, negated.x))
    elif isinstance(op, ops.Add) and (first := made_by(op.a, ops.Neg)) is not None:
        replace(rw, op, ops.Sub(op.b, first.x))


def powers(op: ops.Binary, rw: Rewriter) -> None:
    """``x ** 2`` -> ``x * x``, ``x ** 0.5`` -> ``sqrt(x)``, ``x ** -0.5`` -> ``rsqrt(x)``, ``x ** -1`` -> ``1 / x``."""
    exponent = scalar(op.b)
    if not isinstance(op, ops.Pow) or exponent is None or not same_shape(op.a.shape, op.result.shape):
        return
    roots = {0.5: ops.Sqrt, -0.5: ops.Rsqrt, -1: ops.Reciprocal}
    if exponent == 2:
        replace(rw, op, ops.Mul(op.a, op.a))
    elif exponent == 3:
        replace(rw, op, ops.Mul(rw.before(op).add(ops.Mul(op.a, op.a)), op.a))
    elif exponent in roots and op.a.dtype.is_float:
        replace(rw, op, roots[exponent](op.a))


def division(op: ops.Binary, rw: Rewriter) -> None:
    """``x / 8`` -> ``x * 0.125`` (exact for 2**n), ``x / sqrt(y)`` -> ``x * rsqrt(y)``, ``1 / x`` -> reciprocal."""
    if not isinstance(op, ops.Div) or not op.a.dtype.is_float:
        return
    number, root = scalar(op.b), made_by(op.b, ops.Sqrt)
    if number is not None and number != 0 and abs(math.frexp(number)[0]) == 0.5:
        replace(rw, op, ops.Mul(op.a, _constant(rw, op, 1 / number, op.b)))
    elif root is not None:
        replace(rw, op, ops.Mul(op.a, rw.before(op).add(ops.Rsqrt(root.x))))
    elif is_scalar(op.a, 1) and same_shape(op.b.shape, op.result.shape):
        replace(rw, op, ops.Reciprocal(op.b))


def double_unary(op: ops.Unary, rw: Rewriter) -> None:
    """``-(-x)`` -> ``x``, ``reciprocal(sqrt(x))`` -> ``rsqrt(x)``, ``not (a < b)`` -> ``a >= b`` of integers."""
    inner: Any = op.x.owner
    if isinstance(op, (ops.Neg, ops.Not, ops.Reciprocal)) and isinstance(inner, type(op)):
        replace(rw, op, inner.x)
    elif isinstance(op, (ops.Abs, ops.Relu, ops.Floor, ops.Ceil, ops.Round)) and isinstance(inner, type(op)):
        replace(rw, op, op.x)
    elif isinstance(op, ops.Reciprocal) and isinstance(inner, ops.Sqrt):
        replace(rw, op, ops.Rsqrt(inner.x))
    elif isinstance(op, ops.Not) and isinstance(inner, ops.Compare) and not inner.a.dtype.is_float:
        replace(rw, op, _OPPOSITE[type(inner)](inner.a, inner.b))


def casts(op: ops.Cast, rw: Rewriter) -> None:
    """``cast(x)`` to its own type -> ``x``; two casts of which the first loses nothing -> the second alone."""
    inner, choice = made_by(op.x, ops.Cast), made_by(op.x, ops.Where)
    if op.dtype is op.x.dtype:
        replace(rw, op, op.x)
    elif choice is not None and scalar(choice.a) is not None and scalar(choice.b) is not None:
        a, b = (rw.before(op).add(ops.Cast(v, op.dtype)) for v in (choice.a, choice.b))
        replace(rw, op, ops.Where(choice.cond, a, b))
    elif inner is not None and is_lossless(inner.x.dtype, inner.dtype):
        replace(rw, op, ops.Cast(inner.x, op.dtype))


def choices(op: ops.Where, rw: Rewriter) -> None:
    """``where(true, a, b)`` -> ``a``, ``where(c, a, a)`` -> ``a``, ``where(not c, a, b)`` -> ``where(c, b, a)``."""
    known, negated = scalar(op.cond), made_by(op.cond, ops.Not)
    if known is not None or op.a is op.b:
        _keep(op, rw, op.b if known is not None and not known else op.a)
    elif negated is not None:
        replace(rw, op, ops.Where(negated.x, op.b, op.a))
    elif op.a.dtype is DType.bool and (scalar(op.a), scalar(op.b)) == (True, False):
        _keep(op, rw, op.cond)
    elif op.a.dtype is DType.bool and (scalar(op.a), scalar(op.b)) == (False, True):
        _keep(op, rw, rw.before(op).add(ops.Not(op.cond)))


PATTERNS: tuple[Pattern, ...] = (
    constants_second,
    neutral_operand,
    absorbing_operand,
    join_constants,
    subtraction,
    powers,
    division,
    double_unary,
    casts,
    choices,
)
