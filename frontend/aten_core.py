"""ATen: elementwise arithmetic, element types, comparison, selection."""

from __future__ import annotations

import math
from typing import Any

import torch

from tilewright.frontend.table import Context, is_exact, lowers
from tilewright.ir import ops
from tilewright.ir.core import Op, Value
from tilewright.ir.types import DType

aten = torch.ops.aten

# ---- one operand ---------------------------------------------------------------------------------------------------

_UNARY: dict[Any, type[Op]] = {
    aten.neg.default: ops.Neg,
    aten.abs.default: ops.Abs,
    aten.sign.default: ops.Sign,
    aten.exp.default: ops.Exp,
    aten.log.default: ops.Log,
    aten.log1p.default: ops.Log1p,
    aten.sqrt.default: ops.Sqrt,
    aten.rsqrt.default: ops.Rsqrt,
    aten.reciprocal.default: ops.Reciprocal,
    aten.sin.default: ops.Sin,
    aten.cos.default: ops.Cos,
    aten.tanh.default: ops.Tanh,
    aten.sigmoid.default: ops.Sigmoid,
    aten.erf.default: ops.Erf,
    aten.floor.default: ops.Floor,
    aten.ceil.default: ops.Ceil,
    aten.round.default: ops.Round,
    aten.relu.default: ops.Relu,
    aten.silu.default: ops.Silu,
    aten.bitwise_not.default: ops.Not,
}


@lowers(*_UNARY)
def unary(c: Context, x: Value) -> Value:
    return c(_UNARY[c.node.target], c.cast(x, c.out.dtype))


@lowers(aten.gelu.default)
def gelu(c: Context, x: Value, approximate: str = "none") -> Value:
    return c(ops.GeluTanh if approximate == "tanh" else ops.Gelu, x)


@lowers(aten.softplus.default)
def softplus(c: Context, x: Value, beta: float = 1, threshold: float = 20) -> Value:
    if beta == 1:
        return c(ops.Softplus, x)
    return binary(c, ops.Div, c(ops.Softplus, binary(c, ops.Mul, x, beta)), beta)


@lowers(aten.expm1.default)
def expm1(c: Context, x: Value) -> Value:
    x = c.cast(x, c.out.dtype)
    return c(ops.Sub, c(ops.Exp, x), c.value(1, x.dtype))


@lowers(aten.log2.default, aten.log10.default)
def log_of_base(c: Context, x: Value) -> Value:
    base = 2.0 if c.node.target is aten.log2.default else 10.0
    return binary(c, ops.Mul, c(ops.Log, c.cast(x, c.out.dtype)), 1 / math.log(base))


@lowers(aten.exp2.default)
def exp2(c: Context, x: Value) -> Value:
    return c(ops.Exp, binary(c, ops.Mul, x, math.log(2.0)))


@lowers(aten.tan.default)
def tan(c: Context, x: Value) -> Value:
    x = c.cast(x, c.out.dtype)
    return c(ops.Div, c(ops.Sin, x), c(ops.Cos, x))


@lowers(aten.sinh.default, aten.cosh.default)
def hyperbolic(c: Context, x: Value) -> Value:
    x = c.cast(x, c.out.dtype)
    up, down = c(ops.Exp, x), c(ops.Exp, c(ops.Neg, x))
    return binary(c, ops.Mul, c(ops.Sub if c.node.target is aten.sinh.default else ops.Add, up, down), 0.5)


@lowers(aten.hardtanh.default)
def hardtanh(c: Context, x: Value, low: Any = -1, high: Any = 1) -> Value:
    return clamp(c, x, low, high)


@lowers(aten.leaky_relu.default)
def leaky_relu(c: Context, x: Value, slope: Any = 0.01) -> Value:
    return c(ops.Where, c(ops.Gt, x, c.value(0, x.dtype)), x, binary(c, ops.Mul, x, slope))


@lowers(aten.elu.default)
def elu(c: Context, x: Value, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> Value:
    below = c(ops.Exp, x if input_scale == 1 else binary(c, ops.Mul, x, input_scale))
    below = binary(c, ops.Mul, c(ops.Sub, below, c.value(1, x.dtype)), alpha * scale)
    above = x if scale == 1 else binary(c, ops.Mul, x, scale)
    return c(ops.Where, c(ops.Gt, x, c.value(0, x.dtype)), above, below)


@lowers(aten.logical_not.default)
def logical_not(c: Context, x: Value) -> Value:
    return c(ops.Not, c.cast(x, DType.bool))


@lowers(aten.square.default)
def square(c: Context, x: Value) -> Value:
    return c(ops.Mul, x, x)


@lowers(aten.trunc.default)
def trunc(c: Context, x: Value) -> Value:
    return _toward_zero(c, x) if x.dtype.is_float else x


@lowers(aten.isnan.default)
def isnan(c: Context, x: Value) -> Value:
    return c(ops.Ne, x, x)


@lowers(aten.isinf.default)
def isinf(c: Context, x: Value) -> Value:
    return c(ops.Eq, c(ops.Abs, x), c.value(math.inf, x.dtype))


@lowers(aten.nan_to_num.default)
def nan_to_num(
    c: Context, x: Value, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> Value:
    info = torch.finfo(c.node.meta["val"].dtype)
    low, high = c.value(neginf or info.min, x.dtype), c.value(posinf or info.max, x.dtype)
    known = c(ops.Where, c(ops.Ne, x, x), c.value(nan or 0.0, x.dtype), x)
    known = c(ops.Where, c(ops.Eq, known, c.value(math.inf, x.dtype)), high, known)
    return c(ops.Where, c(ops.Eq, known, c.value(-math.inf, x.dtype)), low, known)


# ---- element types -------------------------------------------------------------------------------------------------


@lowers(
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
    aten._conj.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
)
def as_type(c: Context, x: Value, *_: Any, **__: Any) -> Value:
    """Copies and moves between devices mean nothing here; what is left is the element type."""
    return c.cast(x, c.out.dtype)


@lowers(aten.dropout.default, aten.native_dropout.default)
def dropout(c: Context, x: Value, p: float, train: bool | None) -> Any:
    if train and p:
        c.fail("draws random numbers; call model.eval(), or pass dropout only when training")
    if c.node.target is aten.dropout.default:
        return x
    return x, c.full(x.shape, True, DType.bool)


# ---- two operands --------------------------------------------------------------------------------------------------


def binary(c: Context, kind: type[Op], x: Any, y: Any, dtype: DType | None = None) -> Value:
    """``kind`` of two operands in ``dtype`` (the node's own when None).

    torch does not round a plain number to a narrow float before it multiplies or divides with it; where that shows, the
    operation is done in f32.
    """
    dtype = dtype or c.out.dtype
    plain = [v for v in (x, y) if isinstance(v, (int, float))]
    if kind not in (ops.Mul, ops.Div) or all(is_exact(v, dtype) for v in plain):
        return c(kind, c.value(x, dtype), c.value(y, dtype))
    return c.cast(c(kind, c.value(x, DType.f32), c.value(y, DType.f32)), dtype)


def _scaled(c: Context, y: Any, alpha: Any) -> Any:
    if alpha == 1:
        return y
    return binary(c, ops.Mul, y, alpha) if isinstance(y, Value) else y * alpha


@lowers(aten.add.Tensor, aten.add.Scalar)
def add(c: Context, x: Any, y: Any, alpha: Any = 1) -> Value:
    if isinstance(y, (int, float)) and y == 0:
        return c.cast(x, c.out.dtype)
    return binary(c, ops.Or if c.out.dtype is DType.bool else ops.Add, x, _scaled(c, y, alpha))


@lowers(aten.sub.Tensor, aten.sub.Scalar)
def sub(c: Context, x: Any, y: Any, alpha: Any = 1) -> Value:
    return binary(c, ops.Sub, x, _scaled(c, y, alpha))


@lowers(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(c: Context, x: Any, y: Any, alpha: Any = 1) -> Value:
    return binary(c, ops.Sub, y, _scaled(c, x, alpha))


@lowers(aten.mul.Tensor, aten.mul.Scalar)
def mul(c: Context, x: Any, y: Any) -> Value:
    if isinstance(y, (int, float)) and y == 1:
        return c.cast(x, c.out.dtype)
    return binary(c, ops.And if c.out.dtype is DType.bool else ops.Mul, x, y)


@lowers(aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor)
def div(c: Context, x: Any, y: Any) -> Value:
    return binary(c, ops.Div, x, y)


@lowers(aten.div.Tensor_mode, aten.div.Scalar_mode)
def div_mode(c: Context, x: Any, y: Any, rounding_mode: str | None = None) -> Value:
    if rounding_mode == "floor":
        return binary(c, ops.FloorDiv, x, y)
    quotient = binary(c, ops.Div, x, y)  # of integers, this truncates
    return _toward_zero(c, quotient) if rounding_mode == "trunc" and quotient.dtype.is_float else quotient


def _toward_zero(c: Context, x: Value) -> Value:
    return c(ops.Where, c(ops.Lt, x, c.value(0, x.dtype)), c(ops.Ceil, x), c(ops.Floor, x))


@lowers(aten.fmod.Tensor, aten.fmod.Scalar)
def fmod(c: Context, x: Any, y: Any) -> Value:
    dtype = c.out.dtype
    a, b = c.value(x, dtype), c.value(y, dtype)
    quotient = c(ops.Div, a, b)
    whole = _toward_zero(c, quotient) if dtype.is_float else quotient
    return c(ops.Sub, a, c(ops.Mul, whole, b))


_BINARY: dict[Any, type[Op]] = {
    aten.floor_divide.default: ops.FloorDiv,
    aten.floor_divide.Scalar: ops.FloorDiv,
    aten.remainder.Tensor: ops.Mod,
    aten.remainder.Scalar: ops.Mod,
    aten.remainder.Scalar_Tensor: ops.Mod,
    aten.maximum.default: ops.Maximum,
    aten.max.other: ops.Maximum,
    aten.minimum.default: ops.Minimum,
    aten.min.other: ops.Minimum,
    aten.bitwise_and.Tensor: ops.And,
    aten.bitwise_and.Scalar: ops.And,
    aten.__and__.Tensor: ops.And,
    aten.__and__.Scalar: ops.And,
    aten.bitwise_or.Tensor: ops.Or,
    aten.bitwise_or.Scalar: ops.Or,
    aten.__or__.Tensor: ops.Or,
    aten.__or__.Scalar: ops.Or,
    aten.bitwise_xor.Tensor: ops.Xor,
    aten.bitwise_xor.Scalar: ops.Xor,
    aten.__xor__.Tensor: ops.Xor,
}


@lowers(*_BINARY)
def two_operands(c: Context, x: Any, y: Any) -> Value:
    return binary(c, _BINARY[c.node.target], x, y)


_LOGICAL: dict[Any, type[Op]] = {
    aten.logical_and.default: ops.And,
    aten.logical_or.default: ops.Or,
    aten.logical_xor.default: ops.Xor,
}


@lowers(*_LOGICAL)
def logical(c: Context, x: Value, y: Value) -> Value:
    return c(_LOGICAL[c.node.target], c.cast(x, DType.bool), c.cast(y, DType.bool))


_COMPARE: dict[Any, type[Op]] = {
    getattr(getattr(aten, name), overload): kind
    for name, kind in {
        "eq": ops.Eq,
        "ne": ops.Ne,
        "lt": ops.Lt,
        "le": ops.Le,
        "gt": ops.Gt,
        "ge": ops.Ge,
    }.items()
    for overload in ("Tensor", "Scalar")
}


@lowers(*_COMPARE)
def compare(c: Context, x: Any, y: Any) -> Value:
    return binary(c, _COMPARE[c.node.target], x, y, c.promoted(0, 1))


@lowers(aten.pow.Tensor_Scalar)
def pow_scalar(c: Context, x: Value, exponent: Any) -> Value:
    """Small powers as what they are: a pattern that looks for a square finds ``mul(x, x)``."""
    x = c.cast(x, c.out.dtype)
    match exponent:
        case 0.5:
            return c(ops.Sqrt, x)
        case -0.5:
            return c(ops.Rsqrt, x)
        case 1:
            return x
        case -1:
            return c(ops.Reciprocal, x)
        case 2:
            return c(ops.Mul, x, x)
        case 3:
            return c(ops.Mul, c(ops.Mul, x, x), x)
    return binary(c, ops.Pow, x, exponent)


@lowers(aten.pow.Tensor_Tensor, aten.pow.Scalar)
def pow_tensor(c: Context, x: Any, exponent: Any) -> Value:
    return binary(c, ops.Pow, x, exponent)


@lowers(aten.clamp.default, aten.clamp.Tensor)
def clamp(c: Context, x: Value, min: Any = None, max: Any = None) -> Value:
    x = c.cast(x, c.out.dtype)
    x = x if min is None else binary(c, ops.Maximum, x, min)
    return x if max is None else binary(c, ops.Minimum, x, max)


@lowers(aten.clamp_min.default, aten.clamp_min.Tensor)
def clamp_min(c: Context, x: Value, low: Any) -> Value:
    return clamp(c, x, min=low)


@lowers(aten.clamp_max.default, aten.clamp_max.Tensor)
def clamp_max(c: Context, x: Value, high: Any) -> Value:
    return clamp(c, x, max=high)


@lowers(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def where(c: Context, condition: Value, a: Any, b: Any) -> Value:
    dtype = c.out.dtype
    return c(ops.Where, c.cast(condition, DType.bool), c.value(a, dtype), c.value(b, dtype))


@lowers(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(c: Context, x: Value, mask: Value, value: Any) -> Value:
    return c(ops.Where, mask, c.value(value, x.dtype), x)
