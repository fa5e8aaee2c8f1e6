"""``add(mul(x, cos), mul(concat(neg(x[h:]), x[:h]), sin))`` -> ``nn.rope(x, cos, sin)``, in the spellings models use.

x arrives as ``[B, H, S, D]`` mostly; the transposes put around ``nn.rope`` cancel in canonicalize.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from tilewright.ir import Module, Op, Pattern, Rewriter, Value, ops, rewrite, same_dim
from tilewright.passes import canonical_regroup, canonical_transpose
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.canonical_moves import adjoin
from tilewright.passes.match import either, is_lossless, is_one, made_by, padded, replace, used_once
from tilewright.passes.rope_parts import split_halves, turned_pair

_HEADS_LAST = (0, 2, 1, 3)


@dataclass(frozen=True)
class FuseRope(Pass):
    """Finds rotary position embeddings: half, interleaved, split, and of the first elements only."""

    name: ClassVar[str] = "fuse-rope"

    def run(self, module: Module, ctx: PassContext) -> bool:
        # transposes meet in between: the passed part of a partial rotation stands before one, the rotated part behind
        patterns: tuple[Pattern, ...] = (
            *canonical_transpose.PATTERNS,
            *canonical_regroup.PATTERNS,
            rotation,
            split,
            partial,
            narrow,
        )
        return ctx.take(rewrite(module, *patterns, functions=module.entries()))


def rotation(op: ops.Binary, rw: Rewriter) -> None:
    """``x * cos + turned(x) * sin``."""
    if not isinstance(op, ops.Add):
        return
    for straight, across in either(op):
        sine, cosine = made_by(across, ops.Mul), made_by(straight, ops.Mul)
        if sine is None or cosine is None:
            continue
        for turned, sin in either(sine):
            pair = turned_pair(turned)
            found = next(((x, c) for x, c in either(cosine) if pair is not None and pair.is_part(x)), None)
            if pair is not None and found is not None:
                _emit(op, rw, found[0], found[1], sin, pair.style)
                return


def _emit(op: Op, rw: Rewriter, x: Value, cos: Value, sin: Value, style: str) -> None:
    turned = _rope(op, rw, x, cos, sin, style)
    if turned is not None:
        replace(rw, op, turned)


def _rope(op: Op, rw: Rewriter, x: Value, cos: Value, sin: Value, style: str) -> Value | None:
    """A rope over x, transposed when its heads stand before its positions."""
    flip = _layout(x, cos)
    if flip is None or _layout(x, sin) != flip:
        rw.skip(op, f"cos and sin of shape {cos.type} and {sin.type} do not hold one row a position of {x.type}")
        return None
    b = rw.before(op)
    tables = [b.add(ops.Reshape(t, _rows(t, flip))) for t in (cos, sin)]
    turned = b.add(ops.Rope(b.add(ops.Transpose(x, _HEADS_LAST)) if flip else x, *tables, style=style))
    return b.add(ops.Transpose(turned, _HEADS_LAST)) if flip else turned


def _layout(x: Value, table: Value) -> bool | None:
    """True for x ``[B, H, S, D]``, False for ``[B, S, H, D]``, None when ``table`` fits neither."""
    if len(table.shape) > 4 or len(x.shape) != 4:
        return None
    rows = padded(table.shape, 4)
    if not same_dim(rows[3], x.shape[3]) or not (is_one(rows[0]) or same_dim(rows[0], x.shape[0])):
        return None
    if is_one(rows[1]) and same_dim(rows[2], x.shape[2]):
        return True
    return False if is_one(rows[2]) and same_dim(rows[1], x.shape[1]) else None


def _rows(table: Value, flip: bool) -> tuple[object, ...]:
    b, s, h, r = padded(table.shape, 4)
    return (b, h if flip else s, r)


def split(op: ops.Concat, rw: Rewriter) -> None:
    """Neighbours ``x1 * cos - x2 * sin`` and ``x2 * cos + x1 * sin`` -> the rotation of ``concat(x1, x2)``."""
    if op.axis != len(op.result.shape) - 1:
        return
    for i, (first, second) in enumerate(pairwise(op.xs)):
        found = split_halves(first, second)
        if found is None:
            continue
        x1, x2, cos, sin = found
        b, last = rw.before(op), op.axis
        tables = [b.add(ops.Concat((t, t), len(t.shape) - 1)) for t in (cos, sin)]
        turned = _rope(op, rw, b.add(ops.Concat((x1, x2), last)), tables[0], tables[1], "half")
        if turned is not None:
            replace(rw, op, ops.Concat((*op.xs[:i], turned, *op.xs[i + 2 :]), last))
            return


def partial(op: ops.Concat, rw: Rewriter) -> None:
    """``concat(rope(x[:r]), x[r:])`` -> ``rope(x)`` that leaves the elements from r on alone."""
    if len(op.xs) != 2 or op.axis != 3 or len(op.result.shape) != 4:
        return
    flip = made_by(op.xs[0], ops.Transpose)
    rope = made_by(flip.x if flip is not None else op.xs[0], ops.Rope)
    if rope is None or (flip is not None and flip.perm != _HEADS_LAST) or not used_once(rope.result):
        return
    before = made_by(rope.x, ops.Transpose) if flip is not None else None
    first, rest = made_by(before.x if before is not None else rope.x, ops.Slice), made_by(op.xs[1], ops.Slice)
    if first is None or rest is None or first.x is not rest.x:
        return
    if (before is None) != (flip is None) or not adjoin(first, rest, 3):
        rw.skip(op, "the passed part does not follow the rotated part in one tensor")
        return
    b = rw.before(op)
    x: Value = b.add(ops.Slice(first.x, first.starts, (*first.stops[:3], rest.stops[3]), first.steps))
    x = x if flip is None else b.add(ops.Transpose(x, _HEADS_LAST))
    turned = b.add(ops.Rope(x, rope.cos, rope.sin, rope.style))
    replace(rw, op, turned if flip is None else ops.Transpose(turned, _HEADS_LAST))


def narrow(op: ops.Cast, rw: Rewriter) -> None:
    """``cast(rope(cast(x)))`` back to the type of x -> ``rope(x)``, which computes in f32 anyway."""
    flip = made_by(op.x, ops.Transpose)
    rope = made_by(flip.x if flip is not None else op.x, ops.Rope)
    inside = made_by(rope.x, ops.Transpose) if rope is not None else None
    if rope is None or not used_once(rope.result) or not used_once(op.x):
        return
    wide = made_by(inside.x if inside is not None else rope.x, ops.Cast)
    if wide is None or wide.x.dtype is not op.dtype or not is_lossless(op.dtype, wide.dtype):
        return
    b = rw.before(op)
    x = wide.x if inside is None else b.add(ops.Transpose(wide.x, inside.perm))
    turned = b.add(ops.Rope(x, rope.cos, rope.sin, rope.style))
    replace(rw, op, turned if flip is None else ops.Transpose(turned, flip.perm))
