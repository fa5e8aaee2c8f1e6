"""``add(@weight, full 1)`` -> ``@weight.add``: what depends on constants alone is computed at compile time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from tilewright.ir import Env, Module, Op, Rewriter, TensorType, Value, Weight, dim_symbols, ops, rewrite
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.match import replace
from tilewright.passes.weights import derive

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
        changed = sum(one_element(module, w) for w in list(module.weights.values()))
        return ctx.take(rewrite(module, self.constant, functions=module.entries())) or changed > 0

    def constant(self, op: Op, rw: Rewriter) -> None:
        if op.has_effect or len(op.results) != 1 or not op.operands or not all(map(is_constant, op.operands)):
            return
        size = static_bytes(op.result)
        if size is None or symbolic(op):
            return
        weights = [v for v in dict.fromkeys(op.operands) if isinstance(v, Weight)]
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
    first = array.reshape(-1)[:1]
    if array.size and (array.view(np.uint8).reshape(array.size, -1) == first.view(np.uint8)).all():
        return ops.Full(op.result.shape, first[0].item(), op.result.dtype)
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


def one_element(module: Module, weight: Weight) -> bool:
    """Elementwise users of a weight of one element take a ``core.full`` instead, which patterns can read."""
    users = [u for u in weight.users if isinstance(u, ops.Elementwise)]
    if weight.tensor.elements != 1 or weight.source is None or not users:
        return False
    number = weight.load().reshape(-1)[0].item()
    rw = Rewriter(module)
    for user in users:
        user.replace_operand(weight, rw.before(user).add(ops.Full(weight.shape, number, weight.dtype)))
    return True
