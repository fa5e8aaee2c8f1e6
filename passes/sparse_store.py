"""``nn.linear(x, @w)`` -> ``nn.linear(x, sparse.expand(@w.values, @w.mask, @w.starts))`` where ``@w`` has zeros enough."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from tilewright.ir import Module, Op, PassError, Rewriter, Value, Weight, ops
from tilewright.ir.ops.sparse_expand import STORED, MaskLayout
from tilewright.ir.sources import release
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.match import replace
from tilewright.passes.selection import check_patterns, left_out
from tilewright.passes.weights import as_weight, derive_together

_CLASSES = 16
"""Of density: weights of one shape in one class share their types, and with them a kernel."""
Parts = tuple[Weight, ...]


@dataclass(frozen=True)
class SparseStore(Pass):
    """Weights of linear layers, or their codes, without their zeros: values, and a mask that says where they belong.

    A bit stands for one number or for a word of 32 bits (neighbours along K that are zero together), whichever takes fewer
    bytes; a weight that would come to more than ``worth`` of its bytes stays dense. Bits for single codes of 4 bits are
    only with ``singles``: they take longer to expand than the bytes that they save. ``skip`` and ``only`` are patterns of
    weight names. Reads all weights once. Numbers are those of before, bit for bit; they are stored when the artifact is
    written, a weight at a time.
    """

    name: ClassVar[str] = "sparse-store"
    worth: float = 0.9
    singles: bool = False
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises PassError for a share of bytes that is none."""
        if not 0 < self.worth <= 1:
            raise PassError(f"worth is a share of a weight's bytes, above 0 and up to 1; got {self.worth}")

    def run(self, module: Module, ctx: PassContext) -> bool:
        check_patterns(self.name, module, self.skip, self.only)
        rw, counts = Rewriter(module, pattern=self.name), Counts()
        plans = {op: plan for op in linear_layers(module) if (plan := self.plan(op, rw, counts)) is not None}
        made: dict[tuple[Weight, MaskLayout, int], Parts] = {}
        for op, plan in plans.items():
            room = max(p.room for p in plans.values() if p.kind == plan.kind)
            changes: dict[str, Value] = {}
            for field, weight in plan.weights.items():
                if (key := (weight, plan.layout, room)) not in made:
                    made[key] = stored(module, weight, plan.layout, room)
                    ctx.note(line(weight, plan.layout, made[key], counts))
                changes[field] = expanded(rw, op, field, made[key], plan.layout)
            replace(rw, op, op.clone({}, **changes))
        before = sum(int(weight.tensor.bytes) for weight, _, _ in made)
        after = sum(int(part.tensor.bytes) for parts in made.values() for part in parts)
        ctx.note(f"{len(made)} weights of {before} bytes became {after} bytes; few rows expand them while they multiply, "
                 "many rows a block of them first")  # fmt: skip
        return ctx.take(rw)

    def plan(self, op: Op, rw: Rewriter, counts: Counts) -> Plan | None:
        """How the weights of a layer are stored, all of them or none."""
        weights: dict[str, Weight] = {}
        for field, value in factors(op):
            weight = weight_of(value)
            reason = self.unfit(value, weight)
            if weight is None or reason is not None:
                rw.skip(op, reason or "its weight is computed")
                return None
            weights[field] = weight
        split = not isinstance(op.operands[0].owner, ops.Dequantize)
        plan = counts.best(weights, split, self.singles)
        if plan.share <= self.worth:
            return plan
        names = ", ".join(f"@{w.name}" for w in weights.values())
        rw.skip(op, f"{names} would come to {plan.share:.0%} of the bytes")
        return None

    def unfit(self, value: Value, weight: Weight | None) -> str | None:
        """Why a weight stays as it is, whatever its numbers are."""
        op = value.owner
        op = op.codes.owner or op if isinstance(op, ops.Dequantize) else op
        if op is not None and not isinstance(op, ops.Dequantize):
            return f"a weight by way of {op.name}"
        if isinstance(op, ops.Dequantize) and (op.zero is not None or op.offset is not None):
            return f"codes of {op.codes.dtype.value} with zero points or offsets: 0 is not the same code everywhere"
        if weight is None:
            return "its weight is computed"
        if weight.dtype not in STORED:
            return f"@{weight.name} is {weight.dtype.value}; there are masks for {', '.join(d.value for d in STORED)}"
        if weight.source is None:
            return f"@{weight.name} has no numbers"
        if any(isinstance(user, ops.Embedding) for user in readers(weight)):
            return f"@{weight.name} is a table of embeddings too"
        return left_out(weight, self.skip, self.only)


@dataclass(frozen=True)
class Plan:
    """How the weights of one layer, by field, are stored: ``room`` values in each; ``share`` of the bytes."""

    weights: Mapping[str, Weight]
    layout: MaskLayout
    room: int
    share: float

    @property
    def kind(self) -> tuple[object, ...]:
        """What layers whose kernels are the same have in common."""
        return self.layout, next(iter(self.weights.values())).shape, math.ceil(_CLASSES * self.share)


class Counts:
    """How many values weights have in each layout; each is read once."""

    def __init__(self) -> None:
        self.known: dict[Weight, dict[int, int]] = {}

    def of(self, weight: Weight) -> Mapping[int, int]:
        """Elements of the values by unit."""
        if weight not in self.known:
            assert weight.source is not None
            array = weight.load()
            units = MaskLayout.units(weight.dtype)
            self.known[weight] = {unit: MaskLayout(weight.dtype, unit).count(array) for unit in units}
            release(weight.source)
        return self.known[weight]

    def best(self, weights: Mapping[str, Weight], split: bool, singles: bool) -> Plan:
        """The layout with the fewest bytes; codes for x in floats are ``split``, single ones of 4 bits are ``singles``."""
        first = next(iter(weights.values()))
        dense = int(first.tensor.bytes)
        plans = []
        for unit in MaskLayout.units(first.dtype):
            layout = MaskLayout(first.dtype, unit, split and first.dtype.bits <= 8)
            if layout.nibbles and not singles:
                continue
            room = max(self.of(weight)[unit] for weight in weights.values())
            plans.append(Plan(weights, layout, room, size(first, layout, room) / dense))
        return min(plans, key=lambda plan: plan.share)


def size(weight: Weight, layout: MaskLayout, room: int) -> int:
    """Bytes of ``weight`` with ``room`` values."""
    rows, columns = map(int, weight.shape)
    return sum(int(t.bytes) for t in layout.types(rows, columns, room))


def linear_layers(module: Module) -> list[Op]:
    """The linear and gated layers of all entries."""
    return [op for function in module.entries() for op in function.walk(ops.Linear, ops.GatedLinear)]


def factors(op: Op) -> Iterator[tuple[str, Value]]:
    """The weights of a layer by field."""
    for field in ("weight",) if isinstance(op, ops.Linear) else ("gate", "up"):
        yield field, getattr(op, field)


def weight_of(value: Value) -> Weight | None:
    """What is stored: the weight, or its codes."""
    return as_weight(value.owner.codes if isinstance(value.owner, ops.Dequantize) else value, 2)


def readers(weight: Weight) -> Iterator[Op]:
    """The operations that take a weight, or what it is dequantized to."""
    for user in weight.users:
        yield from user.result.users if isinstance(user, ops.Dequantize) else (user,)


def stored(module: Module, weight: Weight, layout: MaskLayout, room: int) -> Parts:
    """The operands of ``sparse.expand``."""
    rows, columns = map(int, weight.shape)
    names = (f"{weight.name}.{part}" for part in ("values", "mask", "starts"))
    types = dict(zip(names, layout.types(rows, columns, room), strict=True))
    return derive_together(module, types, weight, lambda array: layout.store(array, room))


def expanded(rw: Rewriter, op: Op, field: str, parts: Parts, layout: MaskLayout) -> Value:
    """What a layer multiplies in its ``field``, from ``parts``."""
    value: Value = getattr(op, field)
    rows, columns = map(int, value.shape)
    made = rw.before(op).add(ops.SparseExpand(*parts, rows=rows, columns=columns, dtype=layout.dtype, unit=layout.unit,
                                              split=layout.split))  # fmt: skip
    return made if value.owner is None else rw.before(op).add(value.owner.clone({}, codes=made))


def line(weight: Weight, layout: MaskLayout, parts: Parts, counts: Counts) -> str:
    """What became of a weight, for the report."""
    elements, after = int(weight.tensor.elements), sum(int(part.tensor.bytes) for part in parts)
    per = f"a word of {layout.unit}" if layout.unit > 1 else "a number"
    kept = 8 * layout.stored.size * counts.of(weight)[layout.unit]
    share = 1 - kept / (elements * weight.dtype.bits)
    return f"@{weight.name}: {share:.1%} zeros, a bit for {per}; {weight.tensor.bytes} bytes became {after}"
