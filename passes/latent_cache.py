"""``nn.attention`` over keys and values that follow from something smaller -> over that, with one head of keys.

    %kv = nn.linear(%latent, @kv_b)                    a token: 512 + 64 numbers, not heads * (192 + 128)
    %k, %v = slices of %kv; %k with the shared %rope
    %o = nn.attention(%q, %k, %v)
    ->
    %1 = nn.attention(%q x @kv_b.absorbed + .., concat(%latent, %rope), %latent)
    %o = %1 x @kv_b.absorbed.1

Attention then reads what is stored once for all heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy

from tilewright.ir import Module, PassError, Rewriter, dim_symbols, ops
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.calibration.data import runnable
from tilewright.passes.latent_absorb import Absorbed
from tilewright.passes.latent_cut import bytes_of, stored_for
from tilewright.passes.match import replace


@dataclass(frozen=True)
class LatentCache(Pass):
    """Store of each token what keys and values are linear in and is smallest, found as a minimum cut: the latent and the
    shared rotated key of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434).

    Queries take in the matrices of keys and results those of values (absorption), so that all heads read one head of keys:
    the same tokens, but for rounding. An attention stays as it is unless its cache gets ``gain`` times smaller or more:
    scores over the latent of all heads are longer than those over keys of one.
    """

    name: ClassVar[str] = "latent-cache"
    gain: float = 2.0

    def __post_init__(self) -> None:
        """Raises PassError for options that make no sense."""
        if not self.gain >= 1:
            raise PassError(f"{self.name} takes a gain of 1 or more, got {self.gain}")

    def run(self, module: Module, ctx: PassContext) -> bool:
        function = runnable(module, self.name)
        rw = Rewriter(module, pattern=self.name)
        for op in function.walk(ops.Attention):
            assert isinstance(op, ops.Attention)
            reason = self._absorb(rw, op, ctx)
            if reason is not None:
                rw.skip(op, reason)
        return ctx.take(rw)

    def _absorb(self, rw: Rewriter, op: ops.Attention, ctx: PassContext) -> str | None:
        """Rewrite one attention, or say why it stays."""
        if not all(isinstance(d, sympy.Symbol) for d in op.k.shape[:2]) or op.q.shape[:2] != op.k.shape[:2]:
            return "queries and keys are not those of the same tokens, of any number"
        if dim_symbols([*op.q.shape[2:], *op.k.shape[2:], *op.v.shape[2:]]):
            return "heads of symbolic number or size"
        whole = bytes_of([op.k, op.v])
        stored = stored_for([op.k, op.v])
        if op.k in stored or op.v in stored:
            return f"keys and values, {whole} bytes a token, follow from nothing smaller"
        least = bytes_of(stored)
        if len({v.dtype for v in (*stored, op.k)}) > 1:
            return "keys and values follow from what has another element type"
        made = Absorbed(rw.module, rw.before(op), op, stored)
        kept = made.bytes
        if kept * self.gain > whole:
            return f"keys and values take {whole} bytes a token, what they follow from {kept}: not {self.gain:g} times less"
        ctx.note(f"{op.loc.module or op.name}: {kept} bytes a token instead of {whole}, by the cut {least}")
        replace(rw, op, made.result())
        return None
