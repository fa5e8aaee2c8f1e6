"""``kv.attend(q, cache, start)`` of a prompt -> the same over blocks of keys that ``kv.choose`` finds for it.

    %1 = kv.choose(%q, %cache, %start) {patterns=["flex"]}
    %2 = kv.attend(%q, %cache, %start, ..., %1)

MInference (arXiv:2407.02490), FlexPrefill (arXiv:2502.20766); heads may differ (:mod:`head_patterns`). Only prompts:
decoding, and what has one query, stays exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tilewright.ir import Function, Module, Op, PassError, Rewriter, Ring, VerifyError, ops, rewrite
from tilewright.ir.ops.kv_choose import SIZES, unfit
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.head_patterns import Text, best_patterns

_LOCAL = _LINES = 1024


@dataclass(frozen=True)
class SparsePrefill(Pass):
    """Attention of long prompts to some blocks of keys alone; what ``pattern`` means is in kv.choose.

    Queries before position ``dense`` see all. ``block`` keys and ``queries`` are chosen together; always seen are the first
    ``sinks`` positions and the last ``local`` (1024 with a-shape, which has nothing else, else none but the block's own).
    ``tokens`` makes lists of one length of all but flex; ``columns`` and ``slashes`` then share what is left of it beside
    what is always seen, else they are 1024 unless given.

    ``auto`` gives each head of keys that of a-shape, vertical-slash and block-sparse which changes least what its layer
    gives, all with lists of ``tokens`` (2048), over ``calibration`` data or ``repeated`` random tokens, as ``text`` says.
    """

    name: ClassVar[str] = "sparse-prefill"
    pattern: Literal["a-shape", "vertical-slash", "block-sparse", "flex", "auto"] = "flex"
    dense: int = 2048
    block: int = 64
    queries: int = 64
    sinks: int = 1
    local: int | None = None
    tokens: int | None = None
    columns: int | None = None
    slashes: int | None = None
    share: float = 0.25
    gamma: float = 0.9
    tau: float = 0.1
    sample: int = 64
    text: Text = "calibration"

    def __post_init__(self) -> None:
        if reason := unfit(**self.sizes):
            raise ValueError(reason)
        if self.tokens == 0:
            raise ValueError("lists are of 1 token or more, got tokens=0")
        if self.tokens is not None and self.pattern == "flex":
            raise ValueError("tokens make lists of one length, and flex decides how long they are; give gamma")

    @property
    def sizes(self) -> dict[str, Any]:
        """The attributes of ``kv.choose``."""
        local = _LOCAL * (self.pattern == "a-shape" and self.tokens is None) if self.local is None else self.local
        tokens = (2 * _LINES if self.pattern == "auto" else 0) if self.tokens is None else self.tokens
        found = {name: getattr(self, name) for name in SIZES} | {"local": local, "tokens": tokens}
        return {name: self._lines(tokens) if size is None else size for name, size in found.items()}

    def _lines(self, tokens: int) -> int:
        """Tokens of columns, and of diagonals: with those that are always seen no more than ``tokens``."""
        always = -(-self.sinks // self.block) + max(self.queries // self.block, 1)
        return max(-(-tokens // self.block) - always, 0) // 2 * self.block if tokens else _LINES

    def inapplicable(self, module: Module) -> str | None:
        return None if "prefill" in module.functions else "the module has no function @prefill: give it after kv-layout"

    def run(self, module: Module, ctx: PassContext) -> bool:
        prefill = module.functions["prefill"]
        patterns = self._patterns(module, prefill, ctx)

        def choose(op: ops.Attend, rw: Rewriter) -> None:
            self._choose(op, rw, patterns.get(op, (self.pattern,)))

        done = rewrite(module, choose, functions=[prefill])
        if not done.changed:
            why = "; ".join(dict.fromkeys(skip.reason for skip in done.skips)) or "none is there"
            raise PassError(f"sparse-prefill: no attention of @prefill can leave keys out: {why}")
        return ctx.take(done)

    def _patterns(self, module: Module, prefill: Function, ctx: PassContext) -> dict[Op, tuple[str, ...]]:
        """Those of attentions whose heads are told apart."""
        found = [op for op in prefill.walk(ops.Attend) if isinstance(op, ops.Attend)]
        fit = [op for op in found if op.blocks is None and _refusal(op) is None]
        return best_patterns(module, ctx, fit, self.text, self.sizes) if fit and self.pattern == "auto" else {}

    def _choose(self, op: ops.Attend, rw: Rewriter, patterns: tuple[str, ...]) -> None:
        if op.blocks is not None:
            return
        if reason := _refusal(op):
            rw.skip(op, reason)
            return
        try:
            blocks = rw.before(op)(
                ops.Choose, op.q, op.cache, op.start, op.table, patterns=patterns, scale=op.scale, **self.sizes
            )
        except VerifyError as error:
            raise PassError(f"sparse-prefill: {error.message}", op.loc) from error
        rw.replace(op, op.clone({}, blocks=blocks, block=self.block, queries=self.queries))


def _refusal(op: ops.Attend) -> str | None:
    """Why ``op`` cannot leave keys out, or None."""
    kv = op.cache.cache
    if type(op) is not ops.Attend:
        return f"{op.name} weighs all the keys that it keeps"
    if op.q.shape[1] == 1:
        return "it has one query"
    if isinstance(kv.layout, Ring):
        return "a ring overwrites what blocks are chosen of; give kv-layout another kind"
    if op.window > 0 or op.chunk > 0:
        return f"it has a window of {max(op.window, op.chunk)} tokens"
    if op.bias is not None:
        return "it adds a bias, for which no kernel leaves keys out"
    if op.softcap > 0:
        return "its scores are capped, which estimates leave out"
    if kv.keeps_recent:
        return f"its cache keeps recent tokens apart: {kv}; give kv-layout keys=token and no recent"
    return None
