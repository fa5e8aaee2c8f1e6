"""``kernel.call`` -> ``kernel.call {slots=[...]}``: results whose lifetimes do not meet share a slot of the arena.

Greedy best fit over lifetimes, as in Pisarchyk & Lee, "Efficient memory management for deep neural net inference" (2020),
on the sizes that typical dims give; a slot is as large as the largest of its tenants for any dims.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tilewright.ir import Function, Module, TensorType, Value, eval_dim, ops
from tilewright.passes.base import Pass, PassContext


@dataclass(frozen=True)
class PlanMemory(Pass):
    """Assign every kernel result an arena slot or, when the function returns it, an output."""

    name: ClassVar[str] = "plan-memory"

    def run(self, module: Module, ctx: PassContext) -> bool:
        typical = {name: min(max(low, 8), high) for name, (low, high) in module.dims.items()}
        for function in module.entries():
            plan_function(function, typical)
        return True


def root(value: Value) -> Value:
    """The value whose memory ``value`` shares: reshapes are views."""
    while isinstance(value.owner, ops.Reshape):
        value = value.owner.x
    return value


def last_uses(function: Function) -> dict[Value, int]:
    """Index of the last operation that reads the memory of each value."""
    last: dict[Value, int] = {}
    for i, op in enumerate(function.body):
        if not isinstance(op, ops.Reshape):
            last.update({root(v): i for v in op.operands})
    return last


def plan_function(function: Function, typical: Mapping[str, int]) -> None:
    """Give each call of ``function`` its slots."""
    last = last_uses(function)
    outputs: dict[Value, int] = {}
    for i, value in enumerate(function.returns):
        outputs.setdefault(root(value), i)
    sizes: list[int] = []
    free: list[int] = []
    ending: dict[int, list[int]] = {}
    for i, op in enumerate(function.body):
        if isinstance(op, ops.Call):
            slots = []
            for value in op.results:
                if value in outputs or not isinstance(value.type, TensorType):
                    slots.append(-1 - outputs.get(value, 0))
                    continue
                slot = take(sizes, free, eval_dim(value.type.bytes, typical))
                ending.setdefault(last.get(value, i), []).append(slot)
                slots.append(slot)
            op.slots = tuple(slots)
        free += ending.pop(i, [])


def take(sizes: list[int], free: list[int], size: int) -> int:
    """The free slot that fits best (the smallest large enough, else the largest grown), or a new one."""
    if not free:
        sizes.append(size)
        return len(sizes) - 1
    enough = [s for s in free if sizes[s] >= size]
    slot = min(enough, key=sizes.__getitem__) if enough else max(free, key=sizes.__getitem__)
    sizes[slot] = max(sizes[slot], size)
    free.remove(slot)
    return slot
