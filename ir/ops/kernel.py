"""``kernel``: calls of fused regions."""

from __future__ import annotations

from typing import Any

from tilewright.ir.core import Env, Op, Value
from tilewright.ir.types import Type


class Call(Op):
    """Run the kernel function ``callee`` on the operands; results have ``types``, in the kernel's order.

    A result that is a cache is the operand cache, changed in place. ``slots`` is where memory planning puts each
    result: ``n >= 0`` is slot n of the arena, ``-1 - i`` output i of the function, ``()`` is not planned yet.
    """

    name = "kernel.call"
    has_effect = True
    args: tuple[Value, ...]
    callee: str
    types: tuple[Type, ...]
    slots: tuple[int, ...] = ()

    def infer(self) -> tuple[Type, ...]:
        self.expect(len(self.slots) in (0, len(self.types)), f"{len(self.slots)} slots for {len(self.types)} results")
        return self.types

    def evaluate(self, env: Env, *args: Any) -> Any:
        if env.call is None:
            self.fail("no functions to call")
        return tuple(env.call(self.callee, args))
