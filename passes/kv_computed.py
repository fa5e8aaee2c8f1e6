"""``value[1, S, D]`` of the first S positions -> the same operations on ``positions[B, S]``, where tokens stand.

    core.cos(core.mul(core.cast(core.iota()), @f))   ->   core.cos(core.mul(core.cast(core.reshape(%positions)), @f))

No table bounds the positions then. All B * S positions are one axis meanwhile, in the place of the S first ones.
"""

from __future__ import annotations

from typing import Any

from tilewright.ir import Builder, Op, Value, as_dim, ops
from tilewright.passes.kv_axes import has
from tilewright.passes.kv_clone import clone_op
from tilewright.passes.kv_shapes import ShapeValues, cone, refuse


def compute_rows(value: Value, positions: Value, shapes: ShapeValues, builder: Builder) -> Value:
    """``[B, S, *rest]``: the rows of the tokens at hand, axes of size one left out. Raises UnsupportedError."""
    count = as_dim(shapes.batch * shapes.seq)
    sizes = {shapes.batch: 1, shapes.seq: count}
    flat = builder(ops.Reshape, positions, (count,))
    mapping: dict[Value, Value] = {}
    for op in cone(value):
        if not _depends(op, mapping, shapes):
            continue
        if isinstance(op, ops.Iota) and has(op.length, shapes.seq):
            mapping[op.result] = _counted(op, flat, shapes, builder)
            continue
        _check(op, shapes)
        copy = builder.insert(clone_op(op, mapping, sizes))
        mapping.update(zip(op.results, copy.results))
    return _in_rows(mapping[value], shapes.seq_axes(value)[0], shapes, builder)


def _depends(op: Op, mapping: dict[Value, Value], shapes: ShapeValues) -> bool:
    sized = any(has(d, s) for r in op.results for d in r.shape for s in (shapes.seq, shapes.batch))
    return sized or isinstance(op, ops.SizeOf) or any(v in mapping for v in op.operands)


def _check(op: Op, shapes: ShapeValues) -> None:
    if isinstance(op, ops.SizeOf) and has(op.value, shapes.seq):
        raise refuse(op, "takes the number of tokens as data, so it cannot be computed token by token")
    rows = [d for r in op.results for d in r.shape if has(d, shapes.seq)]
    if any(d != shapes.seq for d in rows) or len(rows) > len(op.results):
        raise refuse(op, f"gives {op.result.type}, which cannot be computed token by token; give kv-layout a length")


def _counted(op: ops.Iota, flat: Value, shapes: ShapeValues, builder: Builder) -> Value:
    """Position numbers as ``op`` counts them."""
    if op.length != shapes.seq or not isinstance(op.start, int) or not isinstance(op.step, int):
        raise refuse(op, "counts something other than positions; give kv-layout a length")
    found = flat if op.dtype is flat.dtype else builder(ops.Cast, flat, op.dtype)
    found = found if op.step == 1 else builder(ops.Mul, found, builder.full(op.step, found))
    return found if op.start == 0 else builder(ops.Add, found, builder.full(op.start, found))


def _in_rows(value: Value, axis: int, shapes: ShapeValues, builder: Builder) -> Value:
    rank = value.tensor.rank
    if axis:
        value = builder(ops.Transpose, value, [axis, *(i for i in range(rank) if i != axis)])
    rest: list[Any] = [d for d in value.shape[1:] if d != 1]
    return builder(ops.Reshape, value, (shapes.batch, shapes.seq, *rest))
