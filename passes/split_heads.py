"""``nn.attention`` of all heads -> one of the heads that need all of the text, one of those that stream.

    %o = nn.attention(%q, %k, %v) {causal=true}
    ->
    %a = nn.attention(%q0, %k0, %v0) {causal=true}
    %b = nn.attention(%q1, %k1, %v1) {causal=true window=1024 first=4}
    %o = core.concat([%a, %b])

Weights are put in order beforehand, so that each part is a run of heads: nothing is gathered at run time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tilewright.ir import Env, Function, Module, Op, PassError, Rewriter, Value, dim_symbols, ops
from tilewright.ir.interpreter import evaluate
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.calibration.data import Array, Batch, calibration, runnable
from tilewright.passes.calibration.stream import Stream
from tilewright.passes.head_order import reorder, unfit
from tilewright.passes.head_parts import HEADS, heads_of
from tilewright.passes.head_profile import errors, repeated
from tilewright.passes.structured.groups import Group, find_groups

Head = tuple[int, int]
"""The number of an attention, and of a head of its keys."""


@dataclass(frozen=True)
class SplitHeads(Pass):
    """Let the heads of keys that need it least see only the ``sinks`` first tokens and the last ``window`` (DuoAttention,
    arXiv:2410.10819), with all queries that share them. ``kv-layout{kind=ring}`` then keeps no more of them.

    The ``share`` of all heads that lose most when they stream keep all of the text. ``text`` to measure on: ``calibration``
    data, or ``repeated`` random tokens, which need none. ``full`` names the heads to keep instead, as ``attention.head``,
    both counted from 0: what an earlier run reported.

    Positions are those of the text: unlike kv-layout's own sinks, these are as far away as they are.
    """

    name: ClassVar[str] = "split-heads"
    window: int | None = None
    sinks: int = 4
    share: float = 0.5
    text: Literal["calibration", "repeated"] = "calibration"
    full: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises PassError for options that make no sense."""
        if self.window is not None and self.window < 1:
            raise PassError(f"{self.name} takes a window of 1 token or more, got {self.window}")
        if self.sinks < 0 or not 0 <= self.share <= 1:
            raise PassError(f"{self.name} takes sinks of 0 or more and a share from 0 to 1")
        wrong = [name for name in self.full if not re.fullmatch(r"\d{1,6}\.\d{1,6}", name, re.ASCII)]
        if wrong:
            raise PassError(f"{self.name}: full names heads as attention.head, such as 0.1, got {', '.join(wrong)}")

    def run(self, module: Module, ctx: PassContext) -> bool:
        if self.window is None:
            raise PassError(f"{self.name} needs to know what streaming heads see: window=1024, and sinks")
        function = runnable(module, self.name)
        rw = Rewriter(module, pattern=self.name)
        found = [op for op in function.walk(ops.Attention) if isinstance(op, ops.Attention)]
        reasons = {op: self._unfit(op) for op in found}
        for op, reason in reasons.items():
            if reason is not None:
                rw.skip(op, reason)
        fit = {i: op for i, op in enumerate(found) if reasons[op] is None}
        kept = self._named(fit) if self.full else self._chosen(module, function, fit, ctx)
        groups = {g.attention: g for g in find_groups(function, ("groups",), lambda op, reason: None)}
        for i, op in fit.items():
            heads = [h for h in range(int(op.k.shape[HEADS])) if (i, h) in kept]
            self._split(rw, op, heads, groups.get(op), ctx)
        return ctx.take(rw)

    def _unfit(self, op: ops.Attention) -> str | None:
        """Why an attention stays as it is, if it does."""
        if not op.causal or op.mask is not None or op.bias is not None or op.padding is not None:
            return "it is not plainly causal: it has a mask, a bias or padding"
        if op.window > 0 or op.chunk > 0:
            return "it has a window of its own"
        return "heads of symbolic number" if dim_symbols([op.q.shape[HEADS], op.k.shape[HEADS]]) else None

    def _named(self, fit: Mapping[int, ops.Attention]) -> set[Head]:
        named = {(int(a), int(h)) for a, h in (name.split(".") for name in self.full)}
        known = {(i, h) for i, op in fit.items() for h in range(int(op.k.shape[HEADS]))}
        if missing := sorted(named - known):
            shown = ", ".join(f"{i}.{h}" for i, h in missing)
            raise PassError(f"{self.name}: no head {shown} that can stream or stay; attentions that can: {sorted(fit)}")
        return named

    def _chosen(self, module: Module, function: Function, fit: Mapping[int, ops.Attention], ctx: PassContext) -> set[Head]:
        """The heads that lose most when they stream."""
        if not fit:
            return set()
        assert self.window is not None
        batches: list[Batch]
        if self.text == "repeated":
            [ids] = function.args
            batches = [{ids.name or "": text} for text in repeated(module, ids, self.window)]
        else:
            function, batches = calibration(module, ctx, f"{self.name} with text=calibration")
        found = errors(Stream(function, batches, fit.values()), fit.values(), self._streamed)
        lost = {op: losses[0] for op, losses in found.items()}
        ranked = sorted(((float(e), i, h) for i, op in fit.items() for h, e in enumerate(lost[op])), reverse=True)
        if not ranked[0][0]:
            raise PassError(f"{self.name}: no text is longer than sinks and window, {self.sinks + self.window} tokens: "
                            "nothing tells heads apart; give longer texts, or a smaller window")  # fmt: skip
        kept = {(i, h) for _, i, h in ranked[: round(self.share * len(ranked))]}
        for i, op in fit.items():
            shown = ", ".join(f"{i}.{h} {e:.2g}{'' if (i, h) in kept else ' streams'}" for h, e in enumerate(lost[op]))
            ctx.note(f"part of the output that streaming changes: {shown}")
        ctx.note(f"full=[{','.join(f'{i}.{h}' for i, h in sorted(kept))}]")
        return kept

    def _streaming(self, op: ops.Attention, operands: Mapping[Value, Value] | None = None) -> Op:
        return op.clone(operands or {}, window=self.window, first=self.sinks)

    def _streamed(self, op: Op, env: Env, args: Sequence[Any]) -> list[Array]:
        """What ``op`` gives where all its heads stream."""
        assert isinstance(op, ops.Attention)
        less = self._streaming(op)
        found = evaluate(less, env, args)
        less.drop()
        return found

    def _split(self, rw: Rewriter, op: ops.Attention, full: list[int], group: Group | None, ctx: PassContext) -> None:
        count = int(op.k.shape[HEADS])
        order = [*full, *(h for h in range(count) if h not in full)]
        if len(full) == count:
            return
        if order != list(range(count)):
            reason = "its heads cannot change places" if group is None else unfit(group)
            if group is None or reason is not None:
                rw.skip(op, str(reason))
                return
            reorder(rw.module, group, order)
        ctx.note(f"{op.loc.module or op.name}: {len(full)} of {count} heads of keys see all of the text")
        rw.replace(op, self._parts(rw, op, len(full)) if full else self._streaming(op))

    def _parts(self, rw: Rewriter, op: ops.Attention, full: int) -> Op:
        b, count = rw.before(op), int(op.k.shape[HEADS])
        shared = int(op.q.shape[HEADS]) // count
        made = []
        for start, stop in ((0, full), (full, count)):
            mine = {op.q: heads_of(b, op.q, start * shared, stop * shared)}
            mine |= {value: heads_of(b, value, start, stop) for value in (op.k, op.v)}
            if op.sinks is not None:
                first = (start * shared,)
                mine[op.sinks] = b(ops.Slice, op.sinks, first, (stop * shared,), (1,))
            made.append(b.insert(op.clone(mine) if start == 0 else self._streaming(op, mine)).results[0])
        return ops.Concat(tuple(made), HEADS, loc=op.loc)
