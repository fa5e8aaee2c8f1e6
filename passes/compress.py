"""``nn.linear(x, @w)`` of bf16 -> ``nn.linear(x, quant.decompress(@w.low, @w.planes, @w.escapes, @w.starts, @w.base))``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tilewright.ir import DType, Module, Op, Rewriter, TensorType, Value, Weight, ops
from tilewright.ir.ops.lossless import COLUMNS, ROWS, SPARE, WINDOW, to_blocks
from tilewright.ir.sources import release
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.match import replace
from tilewright.passes.selection import check_patterns, left_alone
from tilewright.passes.weights import derive_together, weights_of

_WORTH = 0.9
"""Of its bytes, at most, a weight must come to, to be worth the time that it takes to decompress."""
_BLOCKS_AT_ONCE = 64

Parts = tuple[Weight, ...]


@dataclass(frozen=True)
class Compress(Pass):
    """Weights of linear layers in about 0.7 of their bytes, without any loss: results are the same bit for bit.

    Reads all of them once. ``skip`` are patterns of weight names that stay as they are. Numbers are computed when the
    artifact is written, a weight at a time.
    """

    name: ClassVar[str] = "compress"
    skip: tuple[str, ...] = ()

    def run(self, module: Module, ctx: PassContext) -> bool:
        check_patterns(self.name, module, self.skip, ())
        rw = Rewriter(module, pattern=self.name)
        layers = [op for f in module.entries() for op in f.walk(ops.Linear, ops.GatedLinear)]
        weights = dict.fromkeys(w for op in layers for w in weights_of(op).values() if self.unfit(w) is None)
        plans = {w: plan(w) for w in weights if w is not None}
        made = {w: compressed(module, w, plans) for w in plans if plans[w].share <= _WORTH}
        for op in layers:
            self.layer(op, rw, plans, made)
        before, after = (sum(int(w.tensor.bytes) for w in ws) for ws in (made, [q for p in made.values() for q in p]))
        ctx.note(f"{len(made)} weights of {before} bytes became {after} bytes")
        return ctx.take(rw)

    def layer(self, op: Op, rw: Rewriter, plans: Mapping[Weight, Plan], made: Mapping[Weight, Parts]) -> None:
        """Compress the weights of one layer, all or none."""
        found = weights_of(op)
        for weight in found.values():
            reason = self.unfit(weight)
            if weight is not None and weight in plans and weight not in made:
                reason = f"@{weight.name} would come to {plans[weight].share:.0%} of its bytes"
            if reason is not None:
                rw.skip(op, reason)
                return
        changes: dict[str, Value] = {}
        for name, weight in found.items():
            assert weight is not None
            rows, columns = map(int, weight.shape)
            changes[name] = rw.before(op).add(ops.Decompress(*made[weight], rows=rows, columns=columns))
        replace(rw, op, op.clone({}, **changes))

    def unfit(self, weight: Weight | None) -> str | None:
        """Why a weight stays as it is, whatever its numbers are."""
        reason = left_alone(weight, self.skip, ())
        if weight is None or reason is not None:
            return reason
        if weight.dtype is not DType.bf16:
            return f"@{weight.name} is {weight.dtype.value}, not bf16"
        return f"@{weight.name} has no numbers" if weight.source is None else None


@dataclass(frozen=True)
class Plan:
    """What the exponents of one weight ask for."""

    base: int
    escapes: int
    share: float
    """Of its bytes, how much the weight comes to."""


def plan(weight: Weight) -> Plan:
    """Reads the weight."""
    base, escapes = choose_base(exponent_counts(weight.load()))
    release(weight.source)
    size = sum(int(t.bytes) for t in part_types(weight, escapes).values())
    return Plan(base, escapes, size / int(weight.tensor.bytes))


def compressed(module: Module, weight: Weight, plans: Mapping[Weight, Plan]) -> Parts:
    """The operands of ``quant.decompress``: of equal shapes for weights of one shape, so that they share a kernel."""
    alike = [p.escapes for w, p in plans.items() if w.shape == weight.shape and p.share <= _WORTH]
    types, base = part_types(weight, max(alike)), plans[weight].base
    return derive_together(module, types, weight, lambda array: compress(array, base, max(alike)))


def exponent_counts(weight: Any) -> Any:
    """How often each of the 256 exponents is there."""
    bits = np.ascontiguousarray(weight).view(np.uint16).reshape(-1)
    step = 1 << 22
    parts = (np.bincount(bits[i : i + step] >> 7 & 0xFF, minlength=256) for i in range(0, bits.size, step))
    return sum(parts, np.zeros(256, np.int64))


def choose_base(counts: Any) -> tuple[int, int]:
    """The first of the seven neighbouring exponents that cover most numbers, and how many are left over."""
    covered = np.convolve(counts, np.ones(WINDOW, np.int64), "valid")[: 256 - WINDOW]
    base = int(covered.argmax())
    return base, int(counts.sum() - covered[base])


def part_types(weight: Weight, escapes: int) -> dict[str, TensorType]:
    """Names and types of the operands of ``quant.decompress``."""
    name, (rows, columns) = weight.name, map(int, weight.shape)
    blocks, steps = -(-rows // ROWS), -(-columns // COLUMNS)
    return {
        f"{name}.low": TensorType((blocks, steps, ROWS * COLUMNS), DType.u8),
        f"{name}.planes": TensorType((blocks, steps, 3), DType.i64),
        f"{name}.escapes": TensorType((escapes + SPARE,), DType.u8),
        f"{name}.starts": TensorType((blocks,), DType.i32),
        f"{name}.base": TensorType((1,), DType.u8),
    }


def compress(weight: Any, base: int, room: int) -> tuple[Any, ...]:
    """``weight`` ``[rows, columns]`` of bf16 as low, planes, escapes (with ``room`` for so many), starts and base."""
    blocks, steps = -(-len(weight) // ROWS), -(-weight.shape[1] // COLUMNS)
    low, planes = np.empty((blocks, steps, ROWS * COLUMNS), np.uint8), np.empty((blocks, steps, 3), np.int64)
    escapes, begin = np.zeros(room + SPARE, np.uint8), 0
    counts: list[int] = []
    for first, bits in _blocks(weight, base):
        here = slice(first, first + len(bits))
        exponents = (bits >> 7 & 0xFF).astype(np.uint8)
        codes = exponents - np.uint8(base)  # wraps for smaller ones, which are then large
        escaped = codes >= WINDOW
        codes[escaped] = WINDOW
        low[here] = (bits >> 8 & 0x80 | bits & 0x7F).astype(np.uint8)
        shifted = codes[:, :, None] >> np.arange(3, dtype=np.uint8)[:, None] & 1
        planes[here] = np.packbits(shifted, axis=-1, bitorder="little").view(np.int64)[..., 0]
        found = exponents[escaped]
        escapes[begin : begin + len(found)] = found
        begin += len(found)
        counts += [int(np.count_nonzero(block)) for block in escaped]
    starts = np.cumsum([0, *counts[:-1]]).astype(np.int32)
    return low, planes, escapes, starts, np.array([base], np.uint8)


def _blocks(weight: Any, base: int) -> Iterator[tuple[int, Any]]:
    """The bits of some blocks at a time, ``[blocks, steps, 64]``; what is past the end has an exponent with a code."""
    step = ROWS * _BLOCKS_AT_ONCE
    for start in range(0, len(weight), step):
        bits = np.ascontiguousarray(weight[start : start + step]).view(np.uint16)
        pad = ((0, -len(bits) % ROWS), (0, -bits.shape[1] % COLUMNS))
        yield start // ROWS, to_blocks(np.pad(bits, pad, constant_values=base << 7))
