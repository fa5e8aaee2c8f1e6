"""Values of a kernel under construction: scalars and vectors with Python operators.

A `Val` wraps one MLIR value, its dtype and its lane count (0 = scalar). Operators emit operations at the current
insertion point. Python numbers and scalars meet vectors by broadcasting; dtypes never mix silently: cast with ``.to``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from torch_mlir import ir
from torch_mlir.dialects import arith, llvm, math, vector

FLOATS = frozenset({"f64", "f32", "f16", "bf16"})
UNSIGNED = frozenset({"u8", "bool", "index"})
BITS = {"f64": 64, "f32": 32, "f16": 16, "bf16": 16, "i64": 64, "i32": 32, "i16": 16, "i8": 8, "u8": 8, "bool": 1}
SIZES = {dtype: max(1, bits // 8) for dtype, bits in BITS.items()}
"""Bytes of one element in memory (a bool is a byte)."""

Number = int | float


def mlir_type(dtype: str, lanes: int = 0) -> ir.Type:
    """The MLIR type of ``lanes`` elements of ``dtype`` (0 lanes = scalar).

    A bf16 is carried as its 16 bits: LLVM's own bfloat turns plain shuffles and loads into conversion calls on targets
    without bf16 instructions.
    """
    floats = {"f64": ir.F64Type, "f32": ir.F32Type, "f16": ir.F16Type}
    if dtype in floats:
        element = floats[dtype].get()
    elif dtype == "index":
        element = ir.IndexType.get()
    else:
        element = ir.IntegerType.get_signless(BITS[dtype])
    return ir.VectorType.get([lanes], element) if lanes else element


def constant(value: Number, dtype: str = "index", lanes: int = 0) -> Val:
    """A literal, splat over ``lanes``."""
    element = mlir_type(dtype)
    attribute = _literal(value, dtype)
    if not lanes:
        return Val(arith.constant(element, attribute), dtype)
    kind = mlir_type(dtype, lanes)
    return Val(arith.constant(kind, ir.DenseElementsAttr.get_splat(kind, attribute)), dtype, lanes)


def _literal(value: Number, dtype: str) -> ir.Attribute:
    if dtype == "bf16":
        bits = struct.unpack("<I", struct.pack("<f", value))[0]
        return ir.IntegerAttr.get(mlir_type(dtype), bits + 0x7FFF + (bits >> 16 & 1) >> 16)
    make = ir.FloatAttr.get if dtype in FLOATS else ir.IntegerAttr.get
    return make(mlir_type(dtype), float(value) if dtype in FLOATS else int(value))


def intrinsic(name: str, dtype: str, lanes: int, *args: Val) -> Val:
    """Call an LLVM intrinsic by its full name, e.g. ``llvm.x86.avx512bf16.dpbf16ps.512``."""
    result = llvm.call_intrinsic(mlir_type(dtype, lanes), name, [_as_argument(arg) for arg in args], [], [])
    return Val(result, dtype, lanes)


def in_register(vector: Val) -> Val:
    """``vector``, which is loaded by an instruction of its own: nothing that takes it reads memory itself."""
    text = {"asm_string": ir.StringAttr.get(""), "constraints": ir.StringAttr.get("=v,0")}
    op = ir.Operation.create("llvm.inline_asm", [vector.ir.type], [vector.ir], text)
    return Val(op.result, vector.dtype, vector.lanes)


def _as_argument(value: Val) -> ir.Value:
    if value.dtype != "bf16":
        return value.ir
    return vector.bitcast(ir.VectorType.get([value.lanes], ir.BF16Type.get()), value.ir)


class Val:
    """A scalar (``lanes == 0``) or vector value."""

    __slots__ = ("dtype", "ir", "lanes")

    def __init__(self, value: ir.Value, dtype: str, lanes: int = 0) -> None:
        self.ir, self.dtype, self.lanes = value, dtype, lanes

    def __repr__(self) -> str:
        return f"<{self.dtype}{f' x {self.lanes}' if self.lanes else ''}>"

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    # --- arithmetic -------------------------------------------------------------------------------------------------

    def __add__(self, other: Val | Number) -> Val:
        return self if _is_zero(other, self) else self._binary(other, arith.addf, arith.addi)

    def __sub__(self, other: Val | Number) -> Val:
        return self if _is_zero(other, self) else self._binary(other, arith.subf, arith.subi)

    def __mul__(self, other: Val | Number) -> Val:
        return self if isinstance(other, int) and other == 1 else self._binary(other, arith.mulf, arith.muli)

    def __truediv__(self, other: Val | Number) -> Val:
        return self._binary(other, arith.divf, None)

    def __floordiv__(self, other: Val | Number) -> Val:
        """Rounds down; on ``index`` both sides must be non-negative."""
        if isinstance(other, int) and other == 1:
            return self
        if self.is_float:
            return (self / other).floor()
        if self.dtype in UNSIGNED:
            return self._binary(other, None, arith.divui)
        left, right = _unify(self, other)
        quotient = left._binary(right, None, arith.divsi)
        return quotient - left._crosses_zero(right).select(constant(1, left.dtype, left.lanes), 0)

    def __mod__(self, other: Val | Number) -> Val:
        """The remainder with the sign of the divisor (Python's rule)."""
        if self.is_float:
            left, right = _unify(self, other)
            return left - (left // right) * right
        if self.dtype in UNSIGNED:
            return self._binary(other, None, arith.remui)
        left, right = _unify(self, other)
        remainder = left._binary(right, None, arith.remsi)
        return remainder + left._crosses_zero(right).select(right, 0)

    def _crosses_zero(self, other: Val) -> Val:
        remainder = self._binary(other, None, arith.remsi)
        return remainder.ne(0) & ((remainder ^ other) < 0)

    def __neg__(self) -> Val:
        if self.is_float:
            return Val(arith.negf(self.ir), self.dtype, self.lanes)
        return constant(0, self.dtype, self.lanes) - self

    def __radd__(self, other: Number) -> Val:
        return self + other

    def __rmul__(self, other: Number) -> Val:
        return self * other

    def __rsub__(self, other: Number) -> Val:
        return constant(other, self.dtype, self.lanes) - self

    def __rtruediv__(self, other: Number) -> Val:
        return constant(other, self.dtype, self.lanes) / self

    def fma(self, factor: Val | Number, addend: Val | Number) -> Val:
        """``self * factor + addend`` rounded once."""
        a, b = _unify(self, factor)
        a, c = _unify(a, addend)
        a, b = _unify(a, b)
        return Val(math.fma(a.ir, b.ir, c.ir), a.dtype, a.lanes)

    def sqrt(self) -> Val:
        return self._unary(math.sqrt)

    def floor(self) -> Val:
        return self._unary(math.floor)

    def ceil(self) -> Val:
        return self._unary(math.ceil)

    def round_even(self) -> Val:
        """Nearest integer, ties to even."""
        return self._unary(math.roundeven)

    def abs(self) -> Val:
        if self.is_float:
            return self._unary(math.absf)
        return self if self.dtype in UNSIGNED else (self < 0).select(-self, self)

    def copysign(self, sign: Val) -> Val:
        return Val(math.copysign(self.ir, sign.ir), self.dtype, self.lanes)

    # --- bits -------------------------------------------------------------------------------------------------------

    def __and__(self, other: Val | Number) -> Val:
        return self._binary(other, None, arith.andi)

    def __or__(self, other: Val | Number) -> Val:
        return self._binary(other, None, arith.ori)

    def __xor__(self, other: Val | Number) -> Val:
        return self._binary(other, None, arith.xori)

    def __invert__(self) -> Val:
        return self ^ (1 if self.dtype == "bool" else -1)

    def __lshift__(self, other: Val | Number) -> Val:
        return self._binary(other, None, arith.shli)

    def __rshift__(self, other: Val | Number) -> Val:
        """Arithmetic shift of signed, logical shift of unsigned integers."""
        return self._binary(other, None, arith.shrui if self.dtype in UNSIGNED else arith.shrsi)

    def shift_right_logical(self, other: Val | Number) -> Val:
        return self._binary(other, None, arith.shrui)

    # --- comparisons and selection ----------------------------------------------------------------------------------

    def __lt__(self, other: Val | Number) -> Val:
        return self._compare(other, "olt", "lt")

    def __le__(self, other: Val | Number) -> Val:
        return self._compare(other, "ole", "le")

    def __gt__(self, other: Val | Number) -> Val:
        return self._compare(other, "ogt", "gt")

    def __ge__(self, other: Val | Number) -> Val:
        return self._compare(other, "oge", "ge")

    def eq(self, other: Val | Number) -> Val:
        return self._compare(other, "oeq", "eq")

    def ne(self, other: Val | Number) -> Val:
        """Not equal; true when either side is NaN."""
        return self._compare(other, "une", "ne")

    def select(self, yes: Val | Number, no: Val | Number) -> Val:
        """``yes`` where this bool is true, else ``no`` (at most one of them a Python number)."""
        yes, no = _unify(yes, no) if isinstance(yes, Val) else _unify(no, yes)[::-1]
        condition = self
        if yes.lanes and not self.lanes:
            return Val(arith.select(self.ir, yes.ir, no.ir), yes.dtype, yes.lanes)
        if self.lanes and not yes.lanes:
            yes, no = yes.splat(self.lanes), no.splat(self.lanes)
        return Val(arith.select(condition.ir, yes.ir, no.ir), yes.dtype, yes.lanes)

    def max(self, other: Val | Number) -> Val:
        """The greater; ``other`` when either is NaN (one instruction). For NaN-propagating use ``maximum``."""
        left, right = _unify(self, other)
        return (left > right).select(left, right)

    def min(self, other: Val | Number) -> Val:
        """The smaller; ``other`` when either is NaN (one instruction). For NaN-propagating use ``minimum``."""
        left, right = _unify(self, other)
        return (left < right).select(left, right)

    def maximum(self, other: Val | Number) -> Val:
        """The greater, NaN when either is NaN (numpy.maximum)."""
        left, right = _unify(self, other)
        return left.max(right) if not left.is_float else left.ne(left).select(left, left.max(right))

    def minimum(self, other: Val | Number) -> Val:
        """The smaller, NaN when either is NaN (numpy.minimum)."""
        left, right = _unify(self, other)
        return left.min(right) if not left.is_float else left.ne(left).select(left, left.min(right))

    # --- shapes of vectors ------------------------------------------------------------------------------------------

    def splat(self, lanes: int) -> Val:
        """This scalar in every lane (0 lanes: unchanged)."""
        if self.lanes == lanes:
            return self
        if self.lanes:
            raise ValueError(f"cannot splat {self!r} to {lanes} lanes")
        return Val(vector.broadcast(mlir_type(self.dtype, lanes), self.ir), self.dtype, lanes)

    def lane(self, index: int) -> Val:
        """One lane as a scalar."""
        return Val(vector.extract(self.ir, [], [index]), self.dtype)

    def slice(self, start: int, count: int) -> Val:
        """Lanes ``start .. start + count``."""
        return shuffle(self, self, range(start, start + count))

    def reduce(self, fn: str) -> Val:
        """All lanes combined by ``sum``, ``prod``, ``max`` or ``min`` into a scalar, halving the vector each time.

        The order is fixed; ``max`` and ``min`` treat a NaN as the methods of that name do.
        """
        combine = {"sum": Val.__add__, "prod": Val.__mul__, "max": Val.max, "min": Val.min}[fn]
        value = self
        while value.lanes > 1:
            half = value.lanes // 2
            value = combine(value.slice(0, half), value.slice(half, half))
        return value.lane(0)

    # --- casts ------------------------------------------------------------------------------------------------------

    def bitcast(self, dtype: str) -> Val:
        """The same bits as ``dtype``; the lane count changes when the widths differ."""
        lanes = self.lanes * BITS[self.dtype] // BITS[dtype]
        if mlir_type(dtype, lanes) == self.ir.type:
            return Val(self.ir, dtype, lanes)
        if not lanes:
            return Val(arith.bitcast(mlir_type(dtype), self.ir), dtype)
        return Val(vector.bitcast(mlir_type(dtype, lanes), self.ir), dtype, lanes)

    def to(self, dtype: str) -> Val:
        """Convert: to a narrower float to nearest even, float to integer truncating, anything to bool by ``!= 0``."""
        from tilewright.codegen.mlir.cast import convert

        return convert(self, dtype)

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _unary(self, op) -> Val:
        return Val(op(self.ir), self.dtype, self.lanes)

    def _binary(self, other: Val | Number, float_op, int_op) -> Val:
        left, right = _unify(self, other)
        op = float_op if left.is_float else int_op
        if op is None:
            raise TypeError(f"operator not defined on {left!r}")
        return Val(op(left.ir, right.ir), left.dtype, left.lanes)

    def _compare(self, other: Val | Number, float_predicate: str, int_predicate: str) -> Val:
        left, right = _unify(self, other)
        if left.is_float:
            predicate = getattr(arith.CmpFPredicate, float_predicate.upper())
            return Val(arith.cmpf(predicate, left.ir, right.ir), "bool", left.lanes)
        # An index is compared as signed: loop arithmetic such as ``end - 3`` may dip below zero.
        unsigned = left.dtype in UNSIGNED and left.dtype != "index" and int_predicate not in ("eq", "ne")
        predicate = getattr(arith.CmpIPredicate, f"{'u' if unsigned else 's'}{int_predicate}"
                            if int_predicate not in ("eq", "ne") else int_predicate)
        return Val(arith.cmpi(predicate, left.ir, right.ir), "bool", left.lanes)


def fma(a: Val, b: Val, c: Val) -> Val:
    """``a * b + c`` rounded once; operands of equal type."""
    return Val(math.fma(a.ir, b.ir, c.ir), a.dtype, a.lanes)


def shuffle(a: Val, b: Val, lanes: Sequence[int]) -> Val:
    """Lanes picked from ``a`` followed by ``b``."""
    picked = list(lanes)
    return Val(vector.shuffle(a.ir, b.ir, picked), a.dtype, len(picked))


def iota(lanes: int, dtype: str = "i32") -> Val:
    """The vector 0, 1, 2, ..."""
    return literals(range(lanes), dtype)


def literals(values: Sequence[Number], dtype: str) -> Val:
    """The vector of these numbers."""
    kind = mlir_type(dtype, len(values))
    numbers = [_literal(value, dtype) for value in values]
    return Val(arith.constant(kind, ir.DenseElementsAttr.get(numbers, kind)), dtype, len(values))


def float_from_bits(bits: int) -> float:
    """The f32 with these bits, for constants given exactly."""
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def _is_zero(other: Val | Number, like: Val) -> bool:
    return isinstance(other, int) and other == 0 and not like.is_float


def _unify(left: Val, right: Val | Number) -> tuple[Val, Val]:
    """Both operands with one dtype and lane count."""
    if not isinstance(right, Val):
        return left, constant(right, left.dtype, left.lanes)
    if left.dtype != right.dtype:
        raise TypeError(f"operands differ: {left!r} and {right!r}; cast one of them with .to(...)")
    lanes = max(left.lanes, right.lanes)
    return left.splat(lanes), right.splat(lanes)
