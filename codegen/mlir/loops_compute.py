"""Arithmetic of loop kernels beyond single operations of the builder: integers, f64, remainders, powers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch_mlir.dialects import arith
from torch_mlir.dialects import math as mlir_math

from tilewright.codegen.mlir import math
from tilewright.codegen.mlir.elementwise import apply, compute_dtype, lowers
from tilewright.codegen.mlir.value import Number, Val, constant, shuffle
from tilewright.ir import DType, Op, Value, ops

_FLOAT_ONLY = (
    ops.Exp, ops.Log, ops.Log1p, ops.Sqrt, ops.Rsqrt, ops.Reciprocal, ops.Sin, ops.Cos, ops.Tanh, ops.Sigmoid, ops.Erf,
    ops.Silu, ops.Gelu, ops.GeluTanh, ops.Softplus, ops.Pow,
)  # fmt: skip


def _libm(name: str) -> Callable[[Val], Val]:
    return lambda x: Val(getattr(mlir_math, name)(x.ir), x.dtype, x.lanes)


def _sigmoid64(x: Val) -> Val:
    return 1.0 / (_libm("exp")(-x) + 1.0)


def _log1p64(x: Val) -> Val:
    u = x + 1.0
    small = u.eq(1.0)
    return small.select(x, _libm("log")(u) * x / small.select(constant(1.0, "f64", x.lanes), u - 1.0))


_F64: dict[type[Op], Callable[[Val], Val]] = {
    ops.Exp: _libm("exp"),
    ops.Log: _libm("log"),
    ops.Log1p: _log1p64,
    ops.Sin: _libm("sin"),
    ops.Cos: _libm("cos"),
    ops.Tanh: _libm("tanh"),
    ops.Sigmoid: _sigmoid64,
    ops.Silu: lambda x: x * _sigmoid64(x),
    ops.Softplus: lambda x: x.maximum(constant(0.0, "f64", x.lanes)) + _log1p64(_libm("exp")(-x.abs())),
}
"""f64 goes through libm, lane by lane: rare, and then exact."""
_NOT_F64 = (ops.Erf, ops.Gelu, ops.GeluTanh)


def refusal(op: Op) -> str | None:
    """Why an elementwise operation cannot be computed here, or None."""
    if not lowers(op):
        return f"{op.name} has no loop form"
    dtype = op.operands[0].dtype
    if isinstance(op, ops.Pow) and dtype.is_int:
        return None if _whole_power(op.b) is not None else "core.pow of integers needs a small constant exponent"
    if isinstance(op, _FLOAT_ONLY) and not dtype.is_float:
        return f"{op.name} of {dtype.value}"
    if isinstance(op, _NOT_F64) and dtype is DType.f64:
        return f"{op.name} of f64"
    if dtype is DType.bool and isinstance(op, (ops.Sub, ops.Div, ops.FloorDiv, ops.Mod, ops.Neg)):
        return f"{op.name} of bool"
    return None


def compute(op: Op, values: Sequence[Val]) -> Val:
    """The result of an elementwise operation on values in their compute types."""
    lanes = max(v.lanes for v in values)
    dtype = values[0].dtype
    if isinstance(op, ops.Cast):
        return values[0].to(compute_dtype(op.dtype))  # a narrow float is rounded where it is stored, and only there
    if isinstance(op, ops.Pow):
        return _power(op, values)
    if isinstance(op, ops.Unary):
        return _unary(op, values[0])
    if isinstance(op, ops.Binary):
        a, b = (v.splat(lanes) for v in values)
        if dtype == "bool":
            return _logical(op, a, b)
        if isinstance(op, (ops.Div, ops.FloorDiv, ops.Mod)) and not (a.is_float and isinstance(op, ops.Div)):
            return _float_division(op, a, b) if a.is_float else _int_division(op, a, b)
        return apply(op, [a, b])
    if isinstance(op, ops.Where):
        # A scalar condition picks whole vectors; the branches must agree.
        cond, a, b = values
        return cond.splat(lanes if cond.lanes else 0).select(a.splat(lanes), b.splat(lanes))
    return apply(op, [v.splat(lanes) for v in values])


def _unary(op: Op, x: Val) -> Val:
    if isinstance(op, ops.Sign):
        return _sign(x)
    if x.dtype == "bool" and not isinstance(op, ops.Not):
        return x  # abs, relu, floor, ...
    if x.dtype == "f64" and type(op) in _F64:
        return _F64[type(op)](x)
    if isinstance(op, ops.Relu):
        return x.maximum(constant(0, x.dtype, x.lanes))
    return apply(op, [x])


def _sign(x: Val) -> Val:
    one, zero = constant(1, x.dtype, x.lanes), constant(0, x.dtype, x.lanes)
    if x.dtype == "bool":
        return x
    positive = (x > zero).select(one, zero)
    if x.dtype == "u8":
        return positive
    signed = (x < zero).select(-one, positive)
    return x.ne(x).select(x, signed) if x.is_float else signed


def _logical(op: Op, a: Val, b: Val) -> Val:
    if isinstance(op, (ops.Eq, ops.Ne)):
        return ~(a ^ b) if isinstance(op, ops.Eq) else a ^ b
    if isinstance(op, (ops.Lt, ops.Ge)):
        return ~a & b if isinstance(op, ops.Lt) else a | ~b
    if isinstance(op, (ops.Gt, ops.Le)):
        return a & ~b if isinstance(op, ops.Gt) else ~a | b
    if isinstance(op, (ops.Add, ops.Maximum, ops.Or)):
        return a | b
    return a ^ b if isinstance(op, ops.Xor) else a & b


# --- division -----------------------------------------------------------------------------------------------------


def _int_division(op: Op, a: Val, b: Val) -> Val:
    """Quotient or remainder as in numpy, where dividing by 0 gives 0. The processor traps on it, and on MIN / -1."""
    zero, one = constant(0, a.dtype, a.lanes), constant(1, a.dtype, a.lanes)
    invalid = b.eq(zero)
    if a.dtype == "u8":
        safe = invalid.select(one, b)
        return invalid.select(zero, a % safe if isinstance(op, ops.Mod) else a // safe)
    flip = b.eq(-one)
    safe = (invalid | flip).select(one, b)
    if isinstance(op, ops.Mod):
        return (invalid | flip).select(zero, a % safe)
    quotient = a // safe if isinstance(op, ops.FloorDiv) else Val(arith.divsi(a.ir, safe.ir), a.dtype, a.lanes)
    return invalid.select(zero, flip.select(-a, quotient))


def _float_division(op: Op, a: Val, b: Val) -> Val:
    """numpy.floor_divide and numpy.mod: through fmod, which is exact."""
    rest = Val(arith.remf(a.ir, b.ir), a.dtype, a.lanes)
    zero = constant(0.0, a.dtype, a.lanes)
    crosses = rest.ne(zero) & ((rest < zero) ^ (b < zero))
    if isinstance(op, ops.Mod):
        return crosses.select(rest + b, rest.eq(zero).select(zero.copysign(b), rest))
    quotient = (a - rest) / b
    quotient = crosses.select(quotient - 1.0, quotient)
    down = quotient.floor()
    down = (quotient - down > 0.5).select(down + 1.0, down)
    return b.eq(zero).select(a / b, down)


# --- powers -------------------------------------------------------------------------------------------------------


def constant_of(value: Value) -> Number | None:
    """The number that all elements of ``value`` are, when the graph says so."""
    op = value.owner
    while isinstance(op, (ops.Broadcast, ops.Reshape, ops.Cast)):
        op = op.x.owner
    return op.value if isinstance(op, ops.Full) else None


def _whole_power(value: Value) -> int | None:
    number = constant_of(value)
    return int(number) if number is not None and number in (0, 1, 2, 3, 4) else None


def _power(op: ops.Pow, values: Sequence[Val]) -> Val:
    x, number = values[0], constant_of(op.b)
    whole = _whole_power(op.b)
    if whole is not None:
        total = constant(1, x.dtype, x.lanes)
        for _ in range(whole):
            total = total * x
        return total
    if number in (0.5, -0.5, -1):
        base = x if number == -1 else x.sqrt()
        return base if number == 0.5 else 1.0 / base
    lanes = max(v.lanes for v in values)
    a, b = (v.splat(lanes) for v in values)
    return Val(mlir_math.powf(a.ir, b.ir), a.dtype, lanes) if a.dtype == "f64" else math.power(a, b)


# --- folding lanes ------------------------------------------------------------------------------------------------


def combine(fn: str, a: Val, b: Val) -> Val:
    """One step of a reduction ``sum``, ``prod``, ``max`` or ``min`` (of bools: or, and)."""
    if a.dtype == "bool":
        return a | b if fn in ("sum", "max", "any", "mean") else a & b
    if fn in ("sum", "mean"):
        return a + b
    if fn == "prod":
        return a * b
    return a.maximum(b) if fn == "max" else a.minimum(b)


def identity(fn: str, dtype: str, lanes: int) -> Val:
    """What ``combine`` leaves unchanged."""
    if dtype == "bool":
        return constant(0 if fn in ("sum", "max", "any", "mean") else 1, "bool", lanes)
    if fn in ("sum", "mean", "prod"):
        return constant(1 if fn == "prod" else 0, dtype, lanes)
    if dtype[0] in "fb":
        return constant(float("-inf") if fn == "max" else float("inf"), dtype, lanes)
    low, high = (0, 255) if dtype == "u8" else (-(1 << int(dtype[1:]) - 1), (1 << int(dtype[1:]) - 1) - 1)
    return constant(low if fn == "max" else high, dtype, lanes)


def fold_lanes(group: list[Val], step: Callable[[list[Val], list[Val]], list[Val]]) -> list[Val]:
    """Vectors folded to scalars by halves; ``step`` combines two groups."""
    lanes = group[0].lanes
    while lanes > 1:
        lanes //= 2
        low = [shuffle(v, v, range(lanes)) for v in group]
        high = [shuffle(v, v, range(lanes, 2 * lanes)) for v in group]
        group = step(low, high)
    return [v.lane(0) for v in group]


__all__ = ["combine", "compute", "compute_dtype", "constant_of", "fold_lanes", "identity", "refusal"]
