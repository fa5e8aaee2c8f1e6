"""Many spellings -> one: see the tables of the ``canonical_*`` files for what becomes what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tilewright.ir import Module, Op, Rewriter, rewrite
from tilewright.passes import (
    canonical_act,
    canonical_arith,
    canonical_attention,
    canonical_broadcast,
    canonical_heads,
    canonical_index,
    canonical_linear,
    canonical_moves,
    canonical_regroup,
    canonical_transpose,
)
from tilewright.passes.base import Pass, PassContext

_TABLES = (
    canonical_arith,
    canonical_moves,
    canonical_broadcast,
    canonical_index,
    canonical_act,
    canonical_linear,
    canonical_transpose,
    canonical_regroup,
    canonical_attention,
    canonical_heads,
)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Gives equal computations one form, which the other passes then match; kernels are left alone."""

    name: ClassVar[str] = "canonicalize"

    def run(self, module: Module, ctx: PassContext) -> bool:
        patterns = [p for table in _TABLES for p in table.PATTERNS]
        return ctx.take(rewrite(module, unused, *patterns, functions=module.entries()))


def unused(op: Op, rw: Rewriter) -> None:
    """Dead operations go first: they would count as users."""
    if not op.has_effect and not any(r.users for r in op.results):
        rw.erase(op)
