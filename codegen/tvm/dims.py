"""IR sizes and element types in TVM's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
from tvm import te, tirx

from tilewright.ir import Dim, DType, Value

_STORED = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "uint16", "bool": "int8"}


def stored(dtype: DType) -> str:
    """TVM's type for the bytes in memory. TVM has no code for bf16, so it travels as its 16 bits."""
    return _STORED.get(dtype.value) or dtype.value.replace("i", "int").replace("u", "uint").replace("uintint", "uint")


def computed(dtype: DType) -> str:
    """TVM's type for arithmetic: narrow floats widen."""
    return "float32" if dtype in (DType.bf16, DType.f16) else stored(dtype)


def size(dim: Dim, names: Mapping[str, Any]) -> Any:
    """``dim`` over the TVM variables ``names``; int64 throughout, so that no index overflows."""
    if isinstance(dim, int):
        return tirx.const(dim, "int64")
    return _expr(dim, names)


def _expr(e: Any, names: Mapping[str, Any]) -> Any:
    if e.is_Integer:
        return tirx.const(int(e), "int64")
    if e.is_Symbol:
        return names[str(e)]
    if isinstance(e, sympy.floor) or (e.is_Mul and any(f.is_Rational and not f.is_Integer for f in e.args)):
        num, den = sympy.fraction(sympy.together(e.args[0] if isinstance(e, sympy.floor) else e))
        return te.floordiv(_expr(num, names), _expr(den, names))
    parts = [_expr(a, names) for a in e.args]
    combine = {
        "Add": lambda a, b: a + b,
        "Mul": lambda a, b: a * b,
        "Mod": te.floormod,
        "Max": te.max,
        "Min": te.min,
    }
    if e.is_Pow:
        parts, kind = [parts[0]] * int(e.exp), "Mul"
    else:
        kind = type(e).__name__
    total = parts[0]
    for part in parts[1:]:
        total = combine[kind](total, part)
    return total


def placeholder(value: Value, name: str, names: Mapping[str, Any]) -> Any:
    """A TE input of a tensor's type."""
    shape = [size(d, names) for d in value.shape] or [tirx.const(1, "int64")]
    return te.placeholder(shape, stored(value.dtype), name)


def widened(tensor: Any, dtype: DType) -> Any:
    """``tensor`` in its arithmetic type; a stage that scheduling inlines."""
    if dtype is DType.bf16:
        return te.compute(tensor.shape, lambda *i: from_bf16(tensor(*i)), name=f"{tensor.op.name}_wide")
    if dtype is DType.f16:
        return te.compute(tensor.shape, lambda *i: tensor(*i).astype("float32"), name=f"{tensor.op.name}_wide")
    return tensor


def narrowed(tensor: Any, dtype: DType) -> Any:
    """``tensor`` as it is stored; the same tensor when nothing changes."""
    if dtype is DType.bf16:
        return te.compute(tensor.shape, lambda *i: to_bf16(tensor(*i)), name="stored")
    if tensor.dtype != stored(dtype):
        return te.compute(tensor.shape, lambda *i: tensor(*i).astype(stored(dtype)), name="stored")
    return tensor


def from_bf16(bits: Any) -> Any:
    return tirx.reinterpret("float32", bits.astype("uint32") << tirx.const(16, "uint32"))


def to_bf16(x: Any) -> Any:
    """The nearest bf16, ties to even; NaN stays NaN."""
    bits = tirx.reinterpret("uint32", x)
    odd = (bits >> tirx.const(16, "uint32")) & tirx.const(1, "uint32")
    rounded = (bits + tirx.const(0x7FFF, "uint32") + odd) >> tirx.const(16, "uint32")
    return tirx.Select(x == x, rounded, tirx.const(0x7FC0, "uint32")).astype("uint16")
