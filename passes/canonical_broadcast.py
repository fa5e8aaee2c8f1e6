"""``add(broadcast(a), b)`` -> ``add(a, b)``, ``exp(reshape(x))`` -> ``reshape(exp(x))``: regroup elements late."""

from __future__ import annotations

from typing import Any

from tilewright.ir import Op, Pattern, Rewriter, Shape, Value, ops
from tilewright.passes.match import is_one, made_by, padded, replace, same_shape, used_once


def _joined(shapes: list[Shape]) -> Shape:
    """NumPy's broadcast of shapes that are known to fit."""
    rank = max(map(len, shapes))
    columns = zip(*(padded(s, rank) for s in shapes))
    return tuple(next((d for d in column if not is_one(d)), 1) for column in columns)


def _source(value: Value) -> Value:
    """What ``value`` repeats, or regroups by axes of size one in front."""
    owner = value.owner
    if isinstance(owner, ops.Broadcast):
        return owner.x
    if isinstance(owner, ops.Reshape) and same_shape(padded(owner.x.shape, len(owner.shape)), owner.shape):
        return owner.x
    return value


def _with_operands(op: Op, operands: list[Value]) -> Op:
    """A copy of an elementwise operation on other operands."""
    names = [f.name for f in op.fields if f.is_operand]
    given: dict[str, Any] = {f.name: getattr(op, f.name) for f in op.fields}
    return type(op)(**(given | dict(zip(names, operands))))


def scalar_operands(op: ops.Elementwise, rw: Rewriter) -> None:
    """A tensor of equal elements whose shape another operand gives anyway -> a scalar."""
    for value in op.operands:
        full = made_by(value, ops.Full)
        if full is None or not full.shape:
            continue
        others = [v.shape for v in op.operands if v is not value]
        if others and same_shape(_joined(others), op.result.shape):
            small = rw.before(op).add(ops.Full((), full.value, full.dtype))
            op.replace_operand(value, small)
            rw.changed += 1
            if not value.users:
                rw.erase(full)


def implicit_broadcast(op: ops.Elementwise, rw: Rewriter) -> None:
    """An operand that the operation would repeat by itself is not repeated before."""
    for i, value in enumerate(op.operands):
        source = _source(value)
        if source is value:
            continue
        operands = [source if j == i else v for j, v in enumerate(op.operands)]
        if same_shape(_joined([v.shape for v in operands]), op.result.shape):
            replace(rw, op, _with_operands(op, operands))
            return


def late_broadcast(op: ops.Elementwise, rw: Rewriter) -> None:
    """``exp(broadcast(x))`` -> ``broadcast(exp(x))``: compute before repeating."""
    operands = [v.owner.x if isinstance(v.owner, ops.Broadcast) else v for v in op.operands]
    if all(a is b for a, b in zip(operands, op.operands)):
        return
    if same_shape(_joined([v.shape for v in operands]), op.result.shape):
        return  # implicit_broadcast's
    small = rw.before(op).add(_with_operands(op, operands))
    replace(rw, op, ops.Broadcast(small, op.result.shape))


def late_reshape(op: ops.Elementwise, rw: Rewriter) -> None:
    """``exp(reshape(x))`` -> ``reshape(exp(x))``; other operands are scalars or reshapes from the same shape."""
    sources = [made_by(v, ops.Reshape) for v in op.operands]
    first = next((s for s in sources if s is not None), None)
    if first is None or not same_shape(first.shape, op.result.shape):
        return
    operands: list[Value] = []
    for value, source in zip(op.operands, sources):
        same = source is not None and same_shape(source.shape, first.shape) and used_once(value)
        if source is not None and same and same_shape(source.x.shape, first.x.shape):
            operands.append(source.x)
        elif not value.shape:
            operands.append(value)
        else:
            return
    early = rw.before(op).add(_with_operands(op, operands))
    replace(rw, op, ops.Reshape(early, op.result.shape))


def matmul_operands(op: ops.Matmul, rw: Rewriter) -> None:
    """A batch axis that the product would repeat by itself is not repeated before."""
    for value in op.operands:
        repeat = made_by(value, ops.Broadcast)
        if repeat is None or repeat.x.tensor.rank < 2:
            continue
        if not same_shape(repeat.x.shape[-2:], repeat.shape[-2:]):
            continue
        a, b = (repeat.x if v is value else v for v in (op.a, op.b))
        if same_shape(_joined([a.shape[:-2], b.shape[:-2]]), op.result.shape[:-2]):
            replace(rw, op, ops.Matmul(a, b))
            return


def outer_product(op: ops.Matmul, rw: Rewriter) -> None:
    """``matmul(a[.., M, 1], b[.., 1, N])`` -> ``a * b``."""
    if is_one(op.a.shape[-1]):
        replace(rw, op, ops.Mul(op.a, op.b))


PATTERNS: tuple[Pattern, ...] = (
    scalar_operands,
    implicit_broadcast,
    late_broadcast,
    late_reshape,
    matmul_operands,
    outer_product,
)
