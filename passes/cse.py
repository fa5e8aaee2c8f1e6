"""``%1 = f(x)``, ``%2 = f(x)`` -> ``%1 = f(x)`` used twice."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

from tilewright.ir import Module, Op, ops
from tilewright.passes.base import Pass, PassContext

_COMMUTATIVE = (ops.Add, ops.Mul, ops.And, ops.Or, ops.Xor, ops.Maximum, ops.Minimum, ops.Eq, ops.Ne)


@dataclass(frozen=True)
class Cse(Pass):
    """Merges operations that are equal: same kind, operands and attributes. The first one's location stays."""

    name: ClassVar[str] = "cse"

    def run(self, module: Module, ctx: PassContext) -> bool:
        merged = 0
        for function in module.entries():
            known: dict[Hashable, Op] = {}
            for op in function.walk():
                if op.has_effect:
                    continue
                first = known.setdefault(_key(op), op)
                if first is not op:
                    for old, new in zip(op.results, first.results):
                        old.replace_all_uses(new)
                    op.drop()
                    merged += 1
        return merged > 0


def _key(op: Op) -> Hashable:
    operands = tuple(map(id, op.operand_slots()))
    if isinstance(op, _COMMUTATIVE):
        operands = tuple(sorted(operands))
    return type(op), operands, tuple(_exact(v) for v in op.attrs.values()), op.result_types


def _exact(value: Any) -> Hashable:
    """Tells apart what Python holds equal: ``1``, ``1.0`` and ``True``, ``0.0`` and ``-0.0``."""
    if isinstance(value, tuple):
        return tuple(map(_exact, value))
    return type(value), repr(value) if isinstance(value, float) else value
