"""Conversions between dtypes, cheap on every target.

bf16 needs care: LLVM turns ``fptrunc`` to bfloat into a call per lane when the target has no vcvtneps2bf16, so there it
is written with integers (round to nearest even; a NaN stays a NaN). There is no arithmetic on f16 and bf16: values are
loaded, converted to f32, and converted back before they are stored.
"""

from torch_mlir import ir
from torch_mlir.dialects import arith, vector

from tilewright.codegen.mlir.value import BITS, FLOATS, UNSIGNED, Val, constant, mlir_type, shuffle


def convert(value: Val, dtype: str) -> Val:
    """``value`` as ``dtype`` (see `Val.to`)."""
    if value.dtype == dtype:
        return value
    if dtype == "bool":
        return value.ne(0)
    if value.dtype == "bf16" or dtype == "bf16":
        return _through_f32(value, dtype)
    if value.is_float:
        return _float_to_float(value, dtype) if dtype in FLOATS else _float_to_int(value, dtype)
    if dtype in FLOATS:
        op = arith.uitofp if value.dtype in UNSIGNED else arith.sitofp
        value = value.to("i64") if value.dtype == "index" else value
        return Val(op(mlir_type(dtype, value.lanes), value.ir), dtype, value.lanes)
    return _int_to_int(value, dtype)


def _through_f32(value: Val, dtype: str) -> Val:
    if value.dtype == "bf16":
        return widen_bf16(value).to(dtype)
    return round_to_bf16(value.to("f32"))


def widen_bf16(value: Val) -> Val:
    """bf16 to f32: its bits are the upper half."""
    from tilewright.codegen.mlir.builder import Kernel

    bits = value.bitcast("i16")
    if value.lanes and Kernel.current().target.vector_bits == 512:  # one permutation; a conversion and a shift are two
        pairs = [i // 2 + (value.lanes if i % 2 else 0) for i in range(2 * value.lanes)]
        return shuffle(constant(0, "i16", value.lanes), bits, pairs).bitcast("f32")
    wide = Val(arith.extui(mlir_type("i32", value.lanes), bits.ir), "i32", value.lanes)
    return (wide << 16).bitcast("f32")


def round_to_bf16(value: Val) -> Val:
    """f32 to bf16, to nearest even."""
    from tilewright.codegen.mlir.builder import Kernel

    if Kernel.current().target.has_bf16_dot and value.lanes:
        bfloat = ir.VectorType.get([value.lanes], ir.BF16Type.get())
        return Val(vector.bitcast(mlir_type("bf16", value.lanes), arith.truncf(bfloat, value.ir)), "bf16", value.lanes)
    bits = value.bitcast("i32")
    odd = bits.shift_right_logical(16) & 1
    rounded = (bits + odd + 0x7FFF).shift_right_logical(16)
    rounded = value.ne(value).select(constant(0x7FC0, "i32", value.lanes), rounded)
    return Val(arith.trunci(mlir_type("i16", value.lanes), rounded.ir), "i16", value.lanes).bitcast("bf16")


def _float_to_float(value: Val, dtype: str) -> Val:
    op = arith.extf if BITS[dtype] > BITS[value.dtype] else arith.truncf
    return Val(op(mlir_type(dtype, value.lanes), value.ir), dtype, value.lanes)


def _float_to_int(value: Val, dtype: str) -> Val:
    if value.dtype == "f16":
        value = value.to("f32")
    # Narrow integers go through i32, which has an instruction; out-of-range values are the caller's concern.
    wide = "i64" if dtype in ("i64", "index") else "i32"
    result = Val(arith.fptosi(mlir_type(wide, value.lanes), value.ir), wide, value.lanes)
    return _int_to_int(result, dtype)


def _int_to_int(value: Val, dtype: str) -> Val:
    if value.dtype == dtype:
        return value
    kind = mlir_type(dtype, value.lanes)
    if dtype == "index" or value.dtype == "index":
        op = arith.index_castui if value.dtype in UNSIGNED and value.dtype != "index" else arith.index_cast
        return Val(op(kind, value.ir), dtype, value.lanes)
    if BITS[dtype] == BITS[value.dtype]:
        return Val(value.ir, dtype, value.lanes)
    if BITS[dtype] < BITS[value.dtype]:
        return Val(arith.trunci(kind, value.ir), dtype, value.lanes)
    op = arith.extui if value.dtype in UNSIGNED else arith.extsi
    return Val(op(kind, value.ir), dtype, value.lanes)
