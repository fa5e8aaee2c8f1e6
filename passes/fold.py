"""``add(@weight, full 1)`` -> ``@weight.add``: what depends on constants alone is computed at compile time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from tilewright.ir import DType, Env, Module, Op, Rewriter, TensorType, Value, Weight, dim_symbols, ops, rewrite
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.match import replace, same_shape
from tilewright.passes.weights import derive

_MOVES = (ops.Slice, ops.Reshape, ops.Broadcast, ops.Gather, ops.TakeAlong, ops.Embedding, ops.Transpose)
_MADE = (ops.Full, ops.Iota, ops.SizeOf)


@dataclass(frozen=True)
class Fold(Pass):
    """Computes operations on constants of static shape through the interpreter.

    A result of at most ``max_bytes`` is always folded, a larger one when it is no larger than the weights that it
    makes unnecessary. Weights are not loaded for that: large results are computed when the artifact is written.
    """

    name: ClassVar[str] = "fold"
    max_bytes: int = 65536

    def run(self, module: Module, ctx: PassContext) -> bool:
        changed = sum(readable(module, w, self.max_bytes) for w in list(module.weights.values()))
        return ctx.take(rewrite(module, self.constant, functions=module.entries())) or changed > 0

    def constant(self, op: Op, rw: Rewriter) -> None:
        if op.has_effect or len(op.results) != 1 or not op.operands or not all(map(is_constant, op.operands)):
            return
        if isinstance(op, (ops.Dequantize, ops.Lookup, ops.Expand, ops.Decompress, ops.SparseExpand)):
            return  # it is there to keep the weight small
        size = static_bytes(op.result)
        weights = [v for v in dict.fromkeys(op.operands) if isinstance(v, Weight)]
        if size is None or symbolic(op) or (not weights and isinstance(op, _MOVES)):
            return  # moved constants are canonicalize's
        freed = sum(static_bytes(w) or 0 for w in weights if len(w.users) == 1)
        if size > max(self.max_bytes, freed):
            rw.skip(op, f"the result has {size} bytes, more than the {freed} it would free and max_bytes")
            return
        loads = sum(static_bytes(w) or 0 for w in weights)
        if loads <= self.max_bytes >= size and all(w.source is not None for w in weights):
            replace(rw, op, computed(rw, op))
        elif weights:
            name = f"{weights[0].name}.{op.name.rpartition('.')[2]}"
            replace(rw, op, derive(rw.module, name, op.result.tensor, weights, partial(evaluate_with, op, weights)))


def is_constant(value: Value) -> bool:
    return isinstance(value, Weight) or isinstance(value.owner, _MADE)


def static_bytes(value: Value) -> int | None:
    size = value.tensor.bytes if isinstance(value.type, TensorType) else None
    return size if isinstance(size, int) else None


def symbolic(op: Op) -> bool:
    """Whether the operation, or a constant it takes, depends on a symbolic dim."""
    made = [v.owner for v in op.operands if v.owner is not None]
    attrs = [a for o in (op, *made) for a in o.attrs.values()]
    dims = [d for a in attrs for d in (a if isinstance(a, tuple) else (a,)) if hasattr(d, "free_symbols")]
    return bool(dim_symbols(dims))


def computed(rw: Rewriter, op: Op) -> Value | Op:
    """The result as a new weight, or as a ``core.full`` when all elements are equal."""
    array = np.asarray(evaluate(op, {v: v.load() for v in op.operands if isinstance(v, Weight)}))
    rows = np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8)
    if array.size and (rows == rows[0]).all():  # bit by bit: NaN is equal to itself, 0.0 is not to -0.0
        return ops.Full(op.result.shape, array.reshape(-1)[0].item(), op.result.dtype)
    weights = [v for v in op.operands if isinstance(v, Weight)]
    base = weights[0].name if weights else op.loc.module or "constant"
    return rw.module.constant(array, f"{base}.{op.name.rpartition('.')[2]}")


def evaluate(op: Op, known: dict[Value, Any]) -> Any:
    """The value of ``op`` in the interpreter; ``known`` holds the arrays of weights."""

    def array(value: Value | None) -> Any:
        if value is None or value in known:
            return value and known[value]
        assert value.owner is not None
        return value.owner.evaluate(Env({}))

    with np.errstate(all="ignore"):
        return op.evaluate(Env({}), *map(array, op.operand_slots()))


def evaluate_with(op: Op, weights: list[Weight], *arrays: Any) -> Any:
    return np.ascontiguousarray(evaluate(op, dict(zip(weights, arrays))))


def readable(module: Module, weight: Weight, max_bytes: int) -> bool:
    """Where a small weight of equal elements, or of consecutive integers, is used, an operation makes it.

    Patterns can read numbers from operations; a layer's own weights stay as they are.
    """
    users = [u for u in weight.users if isinstance(u, (ops.Elementwise, *_MOVES))]
    size = static_bytes(weight)
    if size is None or size > max_bytes or weight.source is None or not users or weight.tensor.elements == 0:
        return False
    if weight.dtype.is_float and weight.tensor.elements != 1:
        return False
    array = weight.load()
    if _as_operation(array) is None:
        return False
    for user in users:
        b = Rewriter(module).before(user)
        made = _as_operation(array)
        assert made is not None
        value: Value = b.add(made)
        if not same_shape(value.shape, weight.shape):
            value = b.add(ops.Reshape(value, weight.shape))
        user.replace_operand(weight, value)
    return True


def _as_operation(array: Any) -> Op | None:
    flat, dtype = array.reshape(-1), DType.of(array.dtype)
    if (flat == flat[0]).all():
        return ops.Full(array.shape, flat[0].item(), dtype)
    if dtype.is_int and (np.diff(flat.astype(np.int64)) == 1).all() and array.size == max(array.shape):
        return ops.Iota(array.size, dtype, int(flat[0]))
    return None
