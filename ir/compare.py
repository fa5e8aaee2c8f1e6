"""Structural comparison of modules: same functions, operations, operands, attributes, types and locations."""

from __future__ import annotations

from typing import Any

from tilewright.ir.core import Function, Module, State, Value, Weight
from tilewright.ir.types import KVType, TensorType, Type, same_dim


def same_type(a: Type, b: Type) -> bool:
    """Whether two types are equal for all values of their symbols."""
    if isinstance(a, KVType) or isinstance(b, KVType):
        return a == b
    return a.dtype == b.dtype and a.rank == b.rank and all(map(same_dim, a.shape, b.shape))


def difference(a: Module, b: Module) -> str | None:
    """The first difference in words, or None when the modules are the same (data of weights is not compared)."""
    if a.name != b.name or a.dims != b.dims or a.meta != b.meta:
        return "the modules' names, dims or meta differ"
    for kind in ("weights", "states"):
        x: dict[str, Value] = getattr(a, kind)
        y: dict[str, Value] = getattr(b, kind)
        if list(x) != list(y):
            return f"{kind} differ: {sorted(set(x) ^ set(y)) or 'another order'}"
        for name in x:
            if not same_type(x[name].type, y[name].type):
                return f"@{name} is {x[name].type} in one, {y[name].type} in the other"
    if list(a.functions) != list(b.functions):
        return "functions differ"
    for name in a.functions:
        found = _function_difference(a.functions[name], b.functions[name])
        if found:
            return f"function @{name}: {found}"
    return None


def _function_difference(a: Function, b: Function) -> str | None:
    if a.kind != b.kind or len(a.args) != len(b.args) or len(a.body) != len(b.body):
        return "kind, number of arguments or number of operations differ"
    pairs: dict[Value, Value] = {}
    for i, (x, y) in enumerate(zip(a.args, b.args)):
        if (x.name or f"arg{i}") != (y.name or f"arg{i}") or not same_type(x.type, y.type):
            return f"argument {x} differs from {y}"
        pairs[x] = y

    def same(x: Value | None, y: Value | None) -> bool:
        if isinstance(x, (Weight, State)):
            return isinstance(y, type(x)) and x.name == y.name
        return x is None and y is None if x is None or y is None else pairs.get(x) is y

    for i, (p, q) in enumerate(zip(a.body, b.body)):
        if p.name != q.name or p.loc != q.loc:
            return f"operation {i} is {p} in one, {q} in the other"
        if len(p.operand_slots()) != len(q.operand_slots()) or not all(map(same, p.operand_slots(), q.operand_slots())):
            return f"operation {i} ({p}) has other operands"
        for key, value in p.attrs.items():
            if not same_attr(value, q.attrs[key]):
                return f"operation {i} ({p}): {key} is {value} in one, {q.attrs[key]} in the other"
        if not all(map(same_type, p.result_types, q.result_types)):
            return f"operation {i} ({p}) has other result types"
        pairs.update(zip(p.results, q.results))
    return None


def same_attr(a: Any, b: Any) -> bool:
    """Whether two values of an attribute mean the same (nan equals nan, dimensions by value)."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same_attr, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (a != a and b != b)
    if isinstance(a, (TensorType, KVType)):
        return same_type(a, b)
    if hasattr(a, "free_symbols") or hasattr(b, "free_symbols"):
        return same_dim(a, b)
    return bool(a == b)
