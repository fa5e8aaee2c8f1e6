"""``core.add(x, f(x))`` -> ``x``, for the branches that change x least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import ClassVar, Literal

from tilewright.ir import Function, Module, PassError, Rewriter
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.calibration.data import calibration
from tilewright.passes.match import erase_dead
from tilewright.passes.selection import check_patterns
from tilewright.passes.structured.branches import Block, Influence, find_branches, influences, layers_of


@dataclass(frozen=True)
class PruneLayers(Pass):
    """Take whole layers out: those that turn the hidden state least (ShortGPT, arXiv:2403.03853).

    A residual branch is what stands between x and ``x + f(x)``. ``blocks``: ``layers`` are attention with what follows up
    to the next one, ``attention`` and ``feedforward`` branches alone (arXiv:2406.15786), ``branches`` any of them.
    ``ratio`` is the part of them that goes, ``count`` how many do; one is given. ``skip`` are patterns of names of weights
    whose blocks stay. Needs calibration data.
    """

    name: ClassVar[str] = "prune-layers"
    ratio: float | None = None
    count: int | None = None
    blocks: Literal["layers", "attention", "feedforward", "branches"] = "layers"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises PassError for a part that is none."""
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise PassError(f"{self.name} takes a ratio above 0 and below 1, got {self.ratio}")
        if self.count is not None and self.count < 1:
            raise PassError(f"{self.name} takes a count of 1 or more, got {self.count}")
        if self.ratio is not None and self.count is not None:
            raise PassError(f"{self.name} takes a ratio or a count, not both")

    def run(self, module: Module, ctx: PassContext) -> bool:
        if self.ratio is None and self.count is None:
            raise PassError(f"{self.name} needs to know how much: ratio=0.2, or count=4")
        check_patterns(self.name, module, self.skip, ())
        function, batches = calibration(module, ctx, self.name)
        rw = Rewriter(module, pattern=self.name)
        blocks = self.candidates(function, rw)
        if not blocks:
            ctx.note(f"there are no {self.blocks}: no x + f(x) with a layer in f that nothing else reads")
            return ctx.take(rw)
        count = self.count if self.count is not None else round((self.ratio or 0) * len(blocks))
        if count >= len(blocks):
            raise PassError(f"{self.name}: {count} of {len(blocks)} {self.blocks} cannot go, one stays; ask for less")
        seen = influences(function, blocks, batches) if count else []
        order = sorted(range(len(seen)), key=lambda i: seen[i].turn)[:count]
        for i in sorted(order):
            remove(blocks[i])
            rw.changed += 1
        self.note(ctx, blocks, seen, order)
        return ctx.take(rw)

    def candidates(self, function: Function, rw: Rewriter) -> list[Block]:
        """The blocks that may go."""
        branches = find_branches(function)
        found: list[Block] = layers_of(branches) if self.blocks == "layers" else [
            (b,) for b in branches if self.blocks == "branches" or b.attends == (self.blocks == "attention")
        ]  # fmt: skip
        for block in list(found):
            names = sorted(w.name for b in block for w in b.weights() if any(fnmatch(w.name, p) for p in self.skip))
            if names:
                rw.skip(block[0].add, f"the option skip names @{names[0]}")
                found.remove(block)
        return found

    def note(self, ctx: PassContext, blocks: Sequence[Block], seen: Sequence[Influence], order: Sequence[int]) -> None:
        for i in order:
            ctx.note(f"{blocks[i][0].name} and what follows, influence {seen[i].turn:.4f}")
        ctx.note(f"{len(order)} of {len(blocks)} {self.blocks} are gone")


def remove(block: Block) -> None:
    """Let x pass by."""
    for branch in block:
        end = branch.body[-1].results[0]
        trunk = next(v for v in branch.add.operands if v is not end)
        branch.add.result.replace_all_uses(trunk)
        operands = branch.add.operands
        branch.add.drop()
        erase_dead(operands)
