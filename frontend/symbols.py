"""torch's symbolic sizes as dimensions of the IR."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from tilewright.ir.types import Dim, DType, TensorType, as_dim

DTYPES: dict[torch.dtype, DType] = {
    torch.float64: DType.f64,
    torch.float32: DType.f32,
    torch.float16: DType.f16,
    torch.bfloat16: DType.bf16,
    torch.int64: DType.i64,
    torch.int32: DType.i32,
    torch.int16: DType.i16,
    torch.int8: DType.i8,
    torch.uint8: DType.u8,
    torch.bool: DType.bool,
}
COMPLEX: dict[torch.dtype, DType] = {torch.complex64: DType.f32, torch.complex128: DType.f64}


class NotADim(Exception):
    """A symbolic number that no dimension of the IR can express."""


def dtype_of(dtype: torch.dtype) -> DType:
    """The IR's element type; raises NotADim for complex, quantized and 8-bit float types."""
    if dtype not in DTYPES:
        raise NotADim(f"element type {dtype} is not supported; there are {', '.join(d.value for d in DType)}")
    return DTYPES[dtype]


def has_unbacked(value: Any) -> bool:
    """Whether a size in ``value`` (a tensor, a number or a list of them) depends on data."""
    if isinstance(value, (list, tuple)):
        return any(map(has_unbacked, value))
    if isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return bool(free_unbacked_symbols(value))
    return False


@dataclass(frozen=True)
class FloatSize:
    """A float that the model computes from sizes, as torch's expression: ``S ** -0.5``."""

    expr: Any


class SymbolTable:
    """Gives torch's symbols the names the user gave (``s77`` becomes ``B``), and knows their ranges."""

    def __init__(self, names: Mapping[sympy.Symbol, sympy.Symbol], ranges: Mapping[str, tuple[int, int]]) -> None:
        self.names, self.ranges = dict(names), dict(ranges)

    def dim(self, value: int | torch.SymInt) -> Dim:
        """A size; raises NotADim for one that depends on data or has no closed form."""
        if not isinstance(value, torch.SymInt):
            return int(value)
        return as_dim(self.rewrite(value.node.expr))

    def tensor(self, value: torch.Tensor) -> TensorType:
        """The type of a (fake) tensor. A complex one is pairs of real numbers, along one more axis."""
        shape = tuple(map(self.dim, value.shape))
        if value.dtype in COMPLEX:
            return TensorType((*shape, 2), COMPLEX[value.dtype])
        return TensorType(shape, dtype_of(value.dtype))

    def rewrite(self, e: Any) -> Any:
        """A torch expression with our symbols and plain sympy functions only."""
        if e.is_Symbol:
            if e not in self.names:
                raise NotADim(f"the size {e} is unknown until run time")
            return self.names[e]
        if e.is_Integer:
            return e
        if type(e).__name__ in ("TruncToInt", "FloorToInt", "CeilToInt") and (ratio := _ratio(e.args[0])) is not None:
            a, b = map(self.rewrite, ratio)
            return sympy.floor((a + b - 1) / b) if type(e).__name__ == "CeilToInt" else sympy.floor(a / b)
        args = [self.rewrite(a) for a in e.args]
        match type(e).__name__:
            case "FloorDiv" | "CleanDiv":
                return sympy.floor(args[0] / args[1])
            case "CeilDiv":
                return sympy.floor((args[0] + args[1] - 1) / args[1])
            case "Mod" | "PythonMod":
                return sympy.Mod(args[0], args[1])
            case "ModularIndexing":
                return sympy.Mod(sympy.floor(args[0] / args[1]), args[2])
            case "Max":
                return self._extreme(sympy.Max, args)
            case "Min":
                return self._extreme(sympy.Min, args)
            case "Identity" | "ToFloat":
                return args[0]
        if e.is_Add or e.is_Mul or (e.is_Pow and e.exp.is_Integer and e.exp > 0):
            return e.func(*args)
        raise NotADim(f"a size is computed as {e}, which has no integer form")

    def _extreme(self, kind: Any, args: list[Any]) -> Any:
        """A maximum or minimum; the operand itself where the ranges of the sizes decide."""
        first = args[0]
        for other in args[1:]:
            low, high = self._bounds(first - other)
            if low < 0 < high:
                first = kind(first, other)
            elif (kind is sympy.Max) == (high <= 0):
                first = other
        return first

    def _bounds(self, e: Any) -> tuple[Any, Any]:
        """Between which values a sum of multiples of sizes lies; infinite for anything else."""
        low = high = sympy.Integer(0)
        for term in sympy.Add.make_args(sympy.expand(e)):
            factor, symbol = term.as_coeff_Mul()
            if symbol != 1 and str(symbol) not in self.ranges:
                return -sympy.oo, sympy.oo
            ends = [factor * v for v in ((1, 1) if symbol == 1 else self.ranges[str(symbol)])]
            low, high = low + min(ends), high + max(ends)
        return low, high


def _ratio(e: Any) -> tuple[Any, Any] | None:
    """Numerator and denominator of a true division of integers."""
    return (e.args[0], e.args[1]) if type(e).__name__ in ("IntTrueDiv", "FloatTrueDiv") else None
