"""``%1 = core.add(..)`` that nothing uses -> nothing; weights that nothing uses -> nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tilewright.ir import Function, Module
from tilewright.passes.base import Pass, PassContext


@dataclass(frozen=True)
class Dce(Pass):
    """Drops operations and weights that nothing uses. States stay: they are part of the module's interface."""

    name: ClassVar[str] = "dce"

    def run(self, module: Module, ctx: PassContext) -> bool:
        dropped = sum(_sweep(f) for f in module.functions.values())
        unused = [name for name, w in module.weights.items() if not w.users]
        for name in unused:
            del module.weights[name]
        return dropped + len(unused) > 0


def _sweep(function: Function) -> int:
    """One pass from the end suffices: an operation stands after those it uses."""
    before = len(function.body)
    for op in reversed(list(function.body)):
        if not op.has_effect and not any(r.users for r in op.results):
            op.drop()
    return before - len(function.body)
