"""``mul(x, sigmoid(x))`` -> ``silu(x)``, ``0.5 * x * (1 + tanh(..))`` -> ``gelu_tanh(x)``: activations by name."""

from __future__ import annotations

import math

from tilewright.ir import Pattern, Rewriter, Value, ops
from tilewright.passes.match import Number, either, is_scalar, made_by, replace, scalar

_ROOT_2_OVER_PI = math.sqrt(2 / math.pi)


def _near(number: Number | None, wanted: float) -> bool:
    """Equal up to the rounding of a narrow float."""
    return number is not None and abs(float(number) - wanted) <= 4e-3 * abs(wanted)


def _factors(value: Value) -> list[Value]:
    """What is multiplied to make ``value``."""
    product = made_by(value, ops.Mul)
    return [*_factors(product.a), *_factors(product.b)] if product is not None else [value]


def silu(op: ops.Binary, rw: Rewriter) -> None:
    if not isinstance(op, ops.Mul):
        return
    for x, gate in either(op):
        sigmoid = made_by(gate, ops.Sigmoid)
        if sigmoid is not None and sigmoid.x is x:
            replace(rw, op, ops.Silu(x))
            return


def relu(op: ops.Binary, rw: Rewriter) -> None:
    """``maximum(x, 0)`` -> ``relu(x)``."""
    if isinstance(op, ops.Maximum) and is_scalar(op.b, 0) and op.a.shape == op.result.shape:
        replace(rw, op, ops.Relu(op.a))


def sigmoid(op: ops.Unary, rw: Rewriter) -> None:
    """``1 / (1 + exp(-x))`` -> ``sigmoid(x)``."""
    add = made_by(op.x, ops.Add) if isinstance(op, ops.Reciprocal) else None
    exp = made_by(add.a, ops.Exp) if add is not None and is_scalar(add.b, 1) else None
    neg = made_by(exp.x, ops.Neg) if exp is not None else None
    if neg is not None:
        replace(rw, op, ops.Sigmoid(neg.x))


def gelu(op: ops.Binary, rw: Rewriter) -> None:
    """``x * 0.5 * (1 + erf(x / sqrt(2)))`` and the tanh form of the same, in any order of factors."""
    factors = _factors(op.result) if isinstance(op, ops.Mul) else []
    if len(factors) != 3 or sum(_near(scalar(f), 0.5) for f in factors) != 1:
        return
    rest = [f for f in factors if scalar(f) is None]
    for x, gate in (rest, reversed(rest)):
        add = made_by(gate, ops.Add)
        if add is None or not is_scalar(add.b, 1):
            continue
        kind = _gate(add.a, x)
        if kind is not None:
            replace(rw, op, kind(x))
            return


def _gate(value: Value, x: Value) -> type[ops.Unary] | None:
    """Which Gelu has ``x * 0.5 * (1 + value)``."""
    owner = value.owner
    if isinstance(owner, ops.Erf):
        return ops.Gelu if _is_scaled(owner.x, x, math.sqrt(0.5)) else None
    if not isinstance(owner, ops.Tanh):
        return None
    factors = _factors(owner.x)
    numbers = [f for f in factors if _near(scalar(f), _ROOT_2_OVER_PI)]
    rest = [f for f in factors if scalar(f) is None]
    if len(numbers) != 1 or len(factors) != len(rest) + 1 or not 1 <= len(rest) <= 2:
        return None
    add = made_by(next((f for f in rest if f is not x), None), ops.Add)
    if add is None:
        return None
    if len(rest) == 1:  # x + 0.044715 * x ** 3
        return ops.GeluTanh if any(a is x and _is_power(b, x, 3) for a, b in either(add)) else None
    fits = rest.count(x) == 1 and is_scalar(add.b, 1) and _is_power(add.a, x, 2)  # x * (1 + 0.044715 * x ** 2)
    return ops.GeluTanh if fits else None


def _is_scaled(value: Value, x: Value, by: float) -> bool:
    owner = value.owner
    if isinstance(owner, ops.Mul):
        return owner.a is x and _near(scalar(owner.b), by)
    return isinstance(owner, ops.Div) and owner.a is x and _near(scalar(owner.b), 1 / by)


def _is_power(value: Value, x: Value, power: int) -> bool:
    """``0.044715 * x ** power``."""
    factors = _factors(value)
    numbers = [n for n in map(scalar, factors) if n is not None]
    fits = sum(f is x for f in factors) == power and len(factors) == power + 1
    return fits and len(numbers) == 1 and _near(numbers[0], 0.044715)


PATTERNS: tuple[Pattern, ...] = (silu, relu, sigmoid, gelu)
