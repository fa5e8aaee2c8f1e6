"""Which cache a cache comes from. Backends change caches in place, so each has one line of descent."""

from __future__ import annotations

from tilewright.ir.core import Argument, Module, Op, Result, Value
from tilewright.ir.errors import VerifyError
from tilewright.ir.ops.kernel import Call
from tilewright.ir.types import KVType


def source(module: Module, op: Op, index: int) -> Value:
    """The operand cache that the op's ``index``-th result, a cache too, is made from."""
    if not isinstance(op, Call):
        return _one(op, [v for v in op.operands if isinstance(v.type, KVType)])
    kernel = module.functions[op.callee]
    inner = origin(module, kernel.returns[index])
    return op.args[kernel.args.index(inner)] if isinstance(inner, Argument) else inner


def origin(module: Module, value: Value) -> Value:
    """The state or argument that a cache started as."""
    while isinstance(value, Result):
        value = source(module, value.op, value.index)
    return value


def overwritten(module: Module, op: Op) -> list[Value]:
    """The operand caches whose place the op's results take."""
    return [source(module, op, r.index) for r in op.results if isinstance(r.type, KVType)]


def _one(op: Op, caches: list[Value]) -> Value:
    if len(caches) != 1:
        raise VerifyError(f"{op.name} makes a cache from {len(caches)} caches, not from one", op.loc)
    return caches[0]
