"""``core``: elementwise operations with NumPy broadcasting. Operands of one op have one element type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from tilewright.ir.core import Env, Op, Value
from tilewright.ir.ops import numerics as num
from tilewright.ir.ops.shapes import broadcast, expect_dtype
from tilewright.ir.types import Dim, DType, TensorType, Type

__all__ = [
    "Abs",
    "Add",
    "And",
    "Binary",
    "Cast",
    "Ceil",
    "Compare",
    "Cos",
    "Div",
    "Elementwise",
    "Eq",
    "Erf",
    "Exp",
    "Floor",
    "FloorDiv",
    "Ge",
    "Gelu",
    "GeluTanh",
    "Gt",
    "Le",
    "Log",
    "Log1p",
    "Lt",
    "Maximum",
    "Minimum",
    "Mod",
    "Mul",
    "Ne",
    "Neg",
    "Not",
    "Or",
    "Pow",
    "Reciprocal",
    "Relu",
    "Round",
    "Rsqrt",
    "Sigmoid",
    "Sign",
    "Silu",
    "Sin",
    "Softplus",
    "Sqrt",
    "Sub",
    "Tanh",
    "Unary",
    "Where",
    "Xor",
]


class Elementwise(Op):
    """Base of the operations that map each element alone."""

    def flops(self) -> Dim:
        return self.result.tensor.elements


class Unary(Elementwise):
    """``fn`` of each element; keeps shape and type."""

    fn: ClassVar[Callable[[Any], Any]]
    x: Value

    def infer(self) -> tuple[Type, ...]:
        return (self.x.tensor,)

    def evaluate(self, env: Env, x: Any) -> Any:
        return num.rounded(type(self).fn, x)


class Binary(Elementwise):
    """``fn`` of two broadcast operands of one element type."""

    fn: ClassVar[Callable[[Any, Any], Any]]
    a: Value
    b: Value

    def infer(self) -> tuple[Type, ...]:
        expect_dtype(self, self.a, self.b)
        return (TensorType(broadcast(self, self.a.shape, self.b.shape), self.a.dtype),)

    def evaluate(self, env: Env, a: Any, b: Any) -> Any:
        return num.rounded(type(self).fn, a, b)


class Compare(Binary):
    """A comparison: bool result."""

    def infer(self) -> tuple[Type, ...]:
        return (super().infer()[0].with_dtype(DType.bool),)  # type: ignore[union-attr]

    def evaluate(self, env: Env, a: Any, b: Any) -> Any:
        return num.rounded(type(self).fn, a, b, dtype=DType.bool)


def _declare(base: type[Op], name: str, fn: Callable[..., Any], doc: str) -> Any:
    """A new operation ``core.<name>`` below ``base`` that computes ``fn``."""
    title = "".join(part.capitalize() for part in name.split("_"))
    space = {"name": f"core.{name}", "fn": staticmethod(fn), "__doc__": doc, "__module__": __name__}
    return type(title, (base,), space)


def _div(a: Any, b: Any) -> Any:
    if a.dtype.kind == "f":
        return np.divide(a, b)
    down = np.floor_divide(a, b)  # not through f64, which has 53 bits only
    return down + ((down * b != a) & ((a < 0) != (b < 0)))


Neg = _declare(Unary, "neg", np.negative, "``-x``")
Abs = _declare(Unary, "abs", np.abs, "``|x|``")
Sign = _declare(Unary, "sign", np.sign, "-1, 0 or 1")
Not = _declare(Unary, "not", np.invert, "bitwise not; logical not of bool")
Exp = _declare(Unary, "exp", np.exp, "``e**x``")
Log = _declare(Unary, "log", np.log, "natural logarithm")
Log1p = _declare(Unary, "log1p", np.log1p, "``log(1 + x)``")
Sqrt = _declare(Unary, "sqrt", np.sqrt, "square root")
Rsqrt = _declare(Unary, "rsqrt", lambda x: 1 / np.sqrt(x), "``1 / sqrt(x)``")
Reciprocal = _declare(Unary, "reciprocal", lambda x: 1 / x, "``1 / x``")
Sin = _declare(Unary, "sin", np.sin, "sine")
Cos = _declare(Unary, "cos", np.cos, "cosine")
Tanh = _declare(Unary, "tanh", np.tanh, "hyperbolic tangent")
Sigmoid = _declare(Unary, "sigmoid", num.sigmoid, "``1 / (1 + exp(-x))``")
Erf = _declare(Unary, "erf", num.erf, "error function")
Floor = _declare(Unary, "floor", np.floor, "largest integer not above x")
Ceil = _declare(Unary, "ceil", np.ceil, "smallest integer not below x")
Round = _declare(Unary, "round", np.rint, "nearest integer, ties to even")
Relu = _declare(Unary, "relu", num.ACTIVATIONS["relu"], "``max(x, 0)``")
Silu = _declare(Unary, "silu", num.ACTIVATIONS["silu"], "``x * sigmoid(x)``")
Gelu = _declare(Unary, "gelu", num.gelu, "Gaussian error linear unit (Hendrycks & Gimpel 2016), exact form")
GeluTanh = _declare(Unary, "gelu_tanh", num.gelu_tanh, "Gaussian error linear unit, tanh form")
Softplus = _declare(Unary, "softplus", num.softplus, "``log(1 + exp(x))``")

Add = _declare(Binary, "add", np.add, "``a + b``")
Sub = _declare(Binary, "sub", np.subtract, "``a - b``")
Mul = _declare(Binary, "mul", np.multiply, "``a * b``")
Div = _declare(Binary, "div", _div, "``a / b``; integers truncate")
FloorDiv = _declare(Binary, "floor_div", np.floor_divide, "``floor(a / b)``")
Mod = _declare(Binary, "mod", np.mod, "remainder with the sign of b")
Pow = _declare(Binary, "pow", np.power, "``a ** b``")
Maximum = _declare(Binary, "maximum", np.maximum, "the larger one")
Minimum = _declare(Binary, "minimum", np.minimum, "the smaller one")
And = _declare(Binary, "and", np.bitwise_and, "bitwise and; logical and of bool")
Or = _declare(Binary, "or", np.bitwise_or, "bitwise or; logical or of bool")
Xor = _declare(Binary, "xor", np.bitwise_xor, "bitwise exclusive or")

Eq = _declare(Compare, "eq", np.equal, "``a == b``")
Ne = _declare(Compare, "ne", np.not_equal, "``a != b``")
Lt = _declare(Compare, "lt", np.less, "``a < b``")
Le = _declare(Compare, "le", np.less_equal, "``a <= b``")
Gt = _declare(Compare, "gt", np.greater, "``a > b``")
Ge = _declare(Compare, "ge", np.greater_equal, "``a >= b``")


class Where(Elementwise):
    """``a`` where ``cond`` is true, else ``b``; all three broadcast."""

    name = "core.where"
    cond: Value
    a: Value
    b: Value

    def infer(self) -> tuple[Type, ...]:
        self.expect(self.cond.dtype is DType.bool, f"the condition must be bool, got {self.cond.dtype.value}")
        expect_dtype(self, self.a, self.b)
        shape = broadcast(self, broadcast(self, self.cond.shape, self.a.shape), self.b.shape)
        return (TensorType(shape, self.a.dtype),)

    def evaluate(self, env: Env, cond: Any, a: Any, b: Any) -> Any:
        return np.where(cond, a, b).astype(a.dtype)


class Cast(Elementwise):
    """``x`` as element type ``dtype``; floats become integers by truncation, anything non-zero is true."""

    name = "core.cast"
    x: Value
    dtype: DType

    def infer(self) -> tuple[Type, ...]:
        return (self.x.tensor.with_dtype(self.dtype),)

    def evaluate(self, env: Env, x: Any) -> Any:
        with np.errstate(all="ignore"):
            return (num.wide(x) != 0) if self.dtype is DType.bool else num.wide(x).astype(self.dtype.np)

    def flops(self) -> Dim:
        return 0
