"""``nn.linear(act(nn.linear(x, @up)), @down)`` -> the same with fewer channels; attention with fewer heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import ClassVar, Literal

import numpy as np

from tilewright.ir import Function, Module, PassError, Rewriter
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.calibration.data import Array, Batch, calibration, runnable
from tilewright.passes.selection import check_patterns
from tilewright.passes.structured.axes import Axis
from tilewright.passes.structured.compensate import add_means, correct, follow
from tilewright.passes.structured.groups import Group, Kind, find_groups
from tilewright.passes.structured.ladder import Cost, bytes_of, cheapest, evenly, fixed_cost, lowest
from tilewright.passes.structured.planning import Scored, by_saliency, lost, scored, shares, size_of
from tilewright.passes.structured.shrink import shrink

COSTS = "layer_costs"
"""The option of a compilation that knows the times of layers."""


@dataclass(frozen=True)
class PruneStructured(Pass):
    """Take channels and heads out of the graph that its results need least; what is left is smaller and dense.

    ``ratio`` is the part of the bytes of what can be pruned that goes; ``speedup`` how many times less all linear layers
    are to cost. ``units``: ``channels`` between layers, ``heads`` of queries (where they share keys, as many of each head
    of keys), ``groups``, heads of keys with all of their queries; none given are channels and heads.

    ``method``: ``flap``, ``wanda`` and ``magnitude`` give each unit a score, ``ziplm`` corrects the layer after each
    removal and chooses sizes by the errors that add up. ``budget``: ``global`` compares standardised scores of all layers,
    ``uniform`` takes the same part of each, ``layers`` less of those that turn the hidden state far; ``auto`` is
    ``global`` for flap, else ``uniform``. ``compensate``: ``bias`` adds the means of what goes to the biases of what read
    it, ``weights`` also corrects the columns that stay; ``auto`` is ``bias`` for flap, ``weights`` for ziplm, else
    ``none``. Channels that stay are a multiple of ``multiple``. ``cost``: ``bytes`` of weights, or seconds ``measured`` of
    layers that are stored as the scheme ``stored`` says. ``skip`` are patterns of weight names.

    Needs calibration data, but for ``magnitude`` with neither compensation nor ``budget=layers``.
    """

    name: ClassVar[str] = "prune-structured"
    ratio: float | None = None
    speedup: float | None = None
    method: Literal["flap", "wanda", "magnitude", "ziplm"] = "flap"
    units: tuple[Literal["channels", "heads", "groups"], ...] = ()
    budget: Literal["auto", "global", "uniform", "layers"] = "auto"
    compensate: Literal["auto", "none", "bias", "weights"] = "auto"
    multiple: int = 32
    damping: float = 0.01
    cost: Literal["bytes", "measured"] = "bytes"
    stored: str | None = None
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises PassError for options that make no sense, alone or together."""
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise PassError(f"{self.name} takes a ratio above 0 and below 1, got {self.ratio}")
        if self.speedup is not None and not self.speedup > 1:
            raise PassError(f"{self.name} takes a speedup above 1, got {self.speedup}")
        if self.ratio is not None and self.speedup is not None:
            raise PassError(f"{self.name} takes a ratio or a speedup, not both")
        if {"heads", "groups"} <= set(self.units):
            raise PassError(f"units of {self.name} are channels, and heads or groups, not both")
        if self.multiple < 1 or not self.damping > 0:
            raise PassError(f"{self.name}: multiple is 1 or more and damping above 0")
        if self.method == "ziplm" and self.budget != "auto":
            raise PassError("ziplm chooses the sizes of all layers together; leave budget out")

    @property
    def how(self) -> str:
        """The budget, ``auto`` resolved."""
        return self.budget if self.budget != "auto" else "global" if self.method == "flap" else "uniform"

    @property
    def remedy(self) -> str:
        """What makes up for what goes, ``auto`` resolved."""
        if self.compensate != "auto":
            return self.compensate
        return {"flap": "bias", "ziplm": "weights"}.get(self.method, "none")

    def run(self, module: Module, ctx: PassContext) -> bool:
        if self.ratio is None and self.speedup is None:
            raise PassError(f"{self.name} needs to know how much: ratio=0.2, of what can be pruned, or speedup=1.3")
        check_patterns(self.name, module, self.skip, ())
        cost = self.costs(ctx)
        function, batches = self.data(module, ctx)
        rw = Rewriter(module, pattern=self.name)
        groups = self.groups(function, rw)
        note_left(ctx, rw)
        ctx.take(rw)
        if not groups:
            return False
        plan = self.plan(function, groups, batches, cost)
        fixed = fixed_cost(function, plan.ladders, cost)
        taken = self.taken(function, batches, plan, fixed)
        self.note(ctx, plan, taken, fixed)
        self.prune(module, function, batches, plan, {lad.group: lad.gone(n) for lad, n in zip(plan.ladders, taken)})
        return any(taken)

    def data(self, module: Module, ctx: PassContext) -> tuple[Function, Sequence[Batch]]:
        """The function and calibration data; none where nothing asks for them."""
        if self.method == "magnitude" and self.remedy == "none" and self.how != "layers":
            return runnable(module, self.name), []
        return calibration(module, ctx, f"{self.name} with method={self.method}")

    def costs(self, ctx: PassContext) -> Cost:
        if self.cost == "bytes":
            return bytes_of
        given = ctx.options.get(COSTS)
        if given is None:
            raise PassError(f"{self.name}: nothing here times layers; tilewright.compile does. Or take cost=bytes")
        found: Cost = given(self.stored)
        return found

    def groups(self, function: Function, rw: Rewriter) -> list[Group]:
        """The groups that may become smaller; ``rw`` hears why others may not."""
        kinds: Sequence[Kind] = self.units or ("channels", "heads")
        found = []
        for group in find_groups(function, kinds, rw.skip):
            reason = self.unfit(group)
            if reason is None:
                found.append(group)
            else:
                rw.skip(group.readers[0], reason)
        return found

    def unfit(self, group: Group) -> str | None:
        """Why a group stays as it is, if it does."""
        for weight in group.weights():
            if any(fnmatch(weight.name, pattern) for pattern in self.skip):
                return f"the option skip names @{weight.name}"
        least = int(np.bincount(group.parties).min())
        if least <= size_of(group, self.multiple):
            return f"it has {least} {group.kind}, and {size_of(group, self.multiple)} are the least that stay"
        one = self.method == "ziplm" or self.remedy == "weights"
        if one and len({op.x for op in group.readers}) > 1:
            return "layers with different inputs read what would go; corrections are for one input"
        if one and any(len(w.users) > 1 for w in group.weights()):
            return "it shares a weight with another layer; corrections are for one"
        return None

    def plan(self, function: Function, groups: Sequence[Group], batches: Sequence[Batch], cost: Cost) -> Scored:
        if self.method == "ziplm":
            return by_saliency(function, groups, batches, self.damping, self.multiple, cost)
        return scored(function, groups, batches, self.method, self.how == "global", self.multiple, cost)

    def taken(self, function: Function, batches: Sequence[Batch], plan: Scored, fixed: float) -> list[int]:
        """How many steps of each ladder are taken."""
        whole = sum(float(lad.costs[0]) for lad in plan.ladders)
        left = (whole + fixed) / self.speedup - fixed if self.speedup else (1 - (self.ratio or 0)) * whole
        if self.method == "ziplm":
            return cheapest(plan.ladders, left)
        if self.how == "global":
            return lowest(plan.ladders, left)
        parts = shares(function, plan.ladders, batches) if self.how == "layers" else [1.0] * len(plan.ladders)
        return evenly(plan.ladders, parts, left)

    def prune(self, module: Module, function: Function, batches: Sequence[Batch], plan: Scored,
              units: dict[Group, Array]) -> None:  # fmt: skip
        """Take ``units`` out of the graph, compensate for them."""
        kept: dict[Axis, Array] = {}
        for group, gone in units.items():
            for axis, mask in group.kept(gone).items() if gone.size else ():
                kept[axis] = kept[axis] & mask if axis in kept else mask
        columns = lost(list(units), units)
        if self.remedy == "bias":
            add_means(module, columns, {op: seen.mean for op, seen in plan.seen.items()})
        elif self.remedy == "weights" and columns:
            correct(module, function, batches, columns, self.damping)
        follow(kept, columns)
        shrink(module, function, kept)

    def note(self, ctx: PassContext, plan: Scored, taken: Sequence[int], fixed: float) -> None:
        for lad, count in zip(plan.ladders, taken):
            if count:
                before, after = lad.group.count, lad.group.count - len(lad.gone(count))
                ctx.note(f"{lad.group.name}: {before} {lad.group.kind} became {after}")
        whole = sum(float(lad.costs[0]) for lad in plan.ladders)
        left = sum(float(lad.costs[n]) for lad, n in zip(plan.ladders, taken))
        unit = "bytes" if self.cost == "bytes" else "measured seconds"
        ctx.note(f"{1 - left / whole:.1%} of the {unit} of what can be pruned; all linear layers cost "
                 f"{(whole + fixed) / (left + fixed):.3f} times less")  # fmt: skip


def note_left(ctx: PassContext, rw: Rewriter) -> None:
    """Say in the report what stays, and why, one line a reason."""
    reasons: dict[str, list[str]] = {}
    for skip in rw.skips:
        reasons.setdefault(skip.reason.partition(" at ")[0], []).append(skip.loc.module or skip.op)
    for reason, places in reasons.items():
        ctx.note(f"{len(places)} layers read all of their inputs still, {places[0]} first: {reason}")
