"""What patterns share: looking through values, and replacing an operation together with what it leaves dead."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TypeVar

from tilewright.ir import Builder, Dim, DType, Op, Rewriter, Shape, Value, ops, same_dim

_OpT = TypeVar("_OpT", bound=Op)
Number = float | int | bool


def made_by(value: Value | None, kind: type[_OpT]) -> _OpT | None:
    """The operation of class ``kind`` that makes ``value``, if one does."""
    owner = value.owner if value is not None else None
    return owner if isinstance(owner, kind) else None


def scalar(value: Value) -> Number | None:
    """The number that every element of ``value`` is, when that is known."""
    owner = value.owner
    if isinstance(owner, (ops.Broadcast, ops.Reshape)):
        return scalar(owner.x)
    return owner.value if isinstance(owner, ops.Full) else None


def is_scalar(value: Value, *wanted: Number) -> bool:
    """Whether every element of ``value`` is known to be one of ``wanted``."""
    number = scalar(value)
    return number is not None and number in wanted


def used_once(value: Value) -> bool:
    """Whether one operation alone takes ``value`` (maybe in several places)."""
    return len(value.users) == 1


def only_user(value: Value) -> Op | None:
    """The operation that alone takes ``value``."""
    return next(iter(value.users)) if used_once(value) else None


def either(op: ops.Binary) -> tuple[tuple[Value, Value], tuple[Value, Value]]:
    """The operands of a commutative operation, both ways round."""
    return (op.a, op.b), (op.b, op.a)


def same_shape(a: Shape, b: Shape) -> bool:
    return len(a) == len(b) and all(map(same_dim, a, b))


def is_one(dim: Dim) -> bool:
    return isinstance(dim, int) and dim == 1


def padded(shape: Shape, rank: int) -> Shape:
    """``shape`` led by ones up to ``rank`` axes."""
    return (1,) * (rank - len(shape)) + tuple(shape)


def only_leads(op: ops.Reshape) -> bool:
    """Whether a reshape only adds axes of size one in front."""
    return len(op.x.shape) < len(op.shape) and same_shape(padded(op.x.shape, len(op.shape)), op.shape)


def is_lossless(source: DType, target: DType) -> bool:
    """Whether every value of ``source`` is a value of ``target``."""
    if source == target or source is DType.bool:
        return True
    if source.is_float:
        return target is DType.f64 or (target is DType.f32 and source.size == 2)
    if target.is_float:
        return source.size <= (1 if target is DType.f16 else {DType.f32: 2, DType.f64: 4}.get(target, 0))
    if (source is DType.u8) == (target is DType.u8):
        return source.size <= target.size
    return source is DType.u8 and target.size > 1


def through_widening(value: Value) -> Value:
    """``value`` before casts that lose nothing."""
    cast = made_by(value, ops.Cast)
    while cast is not None and is_lossless(cast.x.dtype, cast.dtype):
        value = cast.x
        cast = made_by(value, ops.Cast)
    return value


def joined(b: Builder, kind: type[Op], values: Sequence[Value | None]) -> Value | None:
    """The values that are there, put together by a binary operation; None when there is none."""
    found = [v for v in values if v is not None]
    return reduce(lambda x, y: b.add(kind(x, y)), found) if found else None


def replace(rw: Rewriter, op: Op, new: Value | Op | Sequence[Value]) -> None:
    """Replace ``op`` by ``new`` and erase the operands that nothing uses any more."""
    operands = op.operands
    rw.replace(op, new)
    erase_dead(operands)


def erase_dead(values: Sequence[Value]) -> None:
    """Erase the operations behind ``values`` that nothing uses, and theirs in turn."""
    work = list(values)
    while work:
        op = work.pop().owner
        if op is None or op.parent is None or op.has_effect or any(r.users for r in op.results):
            continue
        operands = op.operands
        op.drop()
        work.extend(operands)
