"""``add(mul(x, cos), mul(concat(neg(x[h:]), x[:h]), sin))`` -> ``nn.rope(x, cos, sin)``, in the spellings models use.

x arrives as ``[B, H, S, D]`` mostly; the transposes put around ``nn.rope`` cancel in canonicalize.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tilewright.ir import Module, Op, Pattern, Rewriter, Value, ops, rewrite, same_dim
from tilewright.passes import canonical_transpose
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.canonical_moves import adjoin, is_zero
from tilewright.passes.match import either, is_lossless, is_one, made_by, padded, replace, used_once

_HEADS_LAST = (0, 2, 1, 3)


@dataclass(frozen=True)
class FuseRope(Pass):
    """Finds rotary position embeddings: half, interleaved, split, and of the first elements only."""

    name: ClassVar[str] = "fuse-rope"

    def run(self, module: Module, ctx: PassContext) -> bool:
        # transposes meet in between: the passed part of a partial rotation stands before one, the rotated part behind
        patterns: tuple[Pattern, ...] = (*canonical_transpose.PATTERNS, rotation, split, partial, narrow)
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
            x, style = _turned(turned)
            cos = next((c for a, c in either(cosine) if a is x), None)
            if x is not None and cos is not None:
                _emit(op, rw, x, cos, sin, style)
                return


def _turned(value: Value) -> tuple[Value | None, str]:
    """x of ``concat(-x[h:], x[:h])`` ("half") or of the same on even and odd elements ("interleaved")."""
    flat = made_by(value, ops.Reshape)
    concat = made_by(flat.x if flat is not None else value, ops.Concat)
    if concat is None or len(concat.xs) != 2 or concat.axis != len(concat.result.shape) - 1:
        return None, ""
    if flat is not None and not (len(concat.result.shape) == 5 and is_one(concat.xs[0].shape[4])):
        return None, ""
    negated, second = (_flat(x) if flat is not None else x for x in concat.xs)
    minus = made_by(negated, ops.Neg)
    high, low = made_by(minus.x if minus is not None else None, ops.Slice), made_by(second, ops.Slice)
    if high is None or low is None or high.x is not low.x or len(high.x.shape) != 4:
        return None, ""
    style = "half" if flat is None else "interleaved"
    return (high.x, style) if _is_pair(low, high, style) else (None, "")


def _flat(value: Value) -> Value:
    reshape = made_by(value, ops.Reshape)
    return value if reshape is None else reshape.x


def _is_pair(low: ops.Slice, high: ops.Slice, style: str) -> bool:
    """Whether two slices are the halves, or the even and odd elements, of the last axis of one tensor."""
    size = low.x.shape[-1]
    whole = zip((*low.starts[:-1], *high.starts[:-1]), (*low.stops[:-1], *high.stops[:-1]), low.x.shape[:-1] * 2)
    if not isinstance(size, int) or size % 2 or not all(is_zero(a) and same_dim(b, n) for a, b, n in whole):
        return False
    if any(s != 1 for s in (*low.steps[:-1], *high.steps[:-1])):
        return False
    ends = [(s.starts[-1], s.stops[-1], s.steps[-1]) for s in (low, high)]
    if style == "half":
        return ends == [(0, size // 2, 1), (size // 2, size, 1)]
    starts, steps = [e[0] for e in ends], [e[2] for e in ends]
    return starts == [0, 1] and steps == [2, 2] and low.result.shape[-1] == high.result.shape[-1] == size // 2


def _emit(op: Op, rw: Rewriter, x: Value, cos: Value, sin: Value, style: str) -> None:
    """Replace ``op`` by a rope over x, transposed when its heads stand before its positions."""
    flip = _layout(x, cos)
    if flip is None or _layout(x, sin) != flip:
        rw.skip(op, f"cos and sin of shape {cos.type} and {sin.type} do not hold one row a position of {x.type}")
        return
    b = rw.before(op)
    tables = [b.add(ops.Reshape(t, _rows(t, flip))) for t in (cos, sin)]
    turned = b.add(ops.Rope(b.add(ops.Transpose(x, _HEADS_LAST)) if flip else x, *tables, style=style))
    replace(rw, op, ops.Transpose(turned, _HEADS_LAST) if flip else turned)


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
    """``concat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)`` with the halves x1 and x2 of x."""
    if len(op.xs) != 2 or op.axis != len(op.result.shape) - 1:
        return
    sub, add = made_by(op.xs[0], ops.Sub), made_by(op.xs[1], ops.Add)
    left = made_by(sub.a, ops.Mul) if sub is not None else None
    right = made_by(sub.b, ops.Mul) if sub is not None else None
    if add is None or left is None or right is None:
        return
    for x1, cos in either(left):
        for x2, sin in either(right):
            low, high = made_by(x1, ops.Slice), made_by(x2, ops.Slice)
            if low is None or high is None or low.x is not high.x or not _is_pair(low, high, "half"):
                continue
            if _is_sum(add, {(x2, cos), (x1, sin)}):
                b, n = rw.before(op), len(cos.shape) - 1
                whole = [b.add(ops.Concat((t, t), n)) for t in (cos, sin)]
                _emit(op, rw, low.x, whole[0], whole[1], "half")
                return


def _is_sum(add: ops.Binary, wanted: set[tuple[Value, Value]]) -> bool:
    """Whether ``add`` is the sum of the products of the wanted pairs."""
    products = [made_by(v, ops.Mul) for v in add.operands]
    pairs = [(p.a, p.b) for p in products if p is not None]
    found = {pair if pair in wanted else pair[::-1] for pair in pairs}
    return found == wanted


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
    if first is None or rest is None or first.x is not rest.x or rope.style != "half":
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
