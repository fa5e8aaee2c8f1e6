"""The parts that a rotation is made of: ``concat(neg(x[h:]), x[:h])`` is the pair of halves of x, turned."""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.ir import Value, ops, same_dim
from tilewright.passes.canonical_moves import is_zero
from tilewright.passes.match import either, is_one, made_by


@dataclass
class Pair:
    """The two halves, or the even and odd elements, of the elements ``[start, stop)`` along the last axis of x."""

    x: Value
    start: int
    stop: int
    style: str

    def is_part(self, value: Value) -> bool:
        """Whether ``value`` is these elements."""
        if value is self.x:
            return self.start == 0 and same_dim(self.x.shape[-1], self.stop)
        part = made_by(value, ops.Slice)
        whole = part is not None and part.x is self.x and whole_lead(part) and part.steps[-1] == 1
        return whole and part is not None and (part.starts[-1], part.stops[-1]) == (self.start, self.stop)


def turned_pair(value: Value) -> Pair | None:
    """x of ``concat(-x[h:], x[:h])`` ("half") or of the same on even and odd elements ("interleaved")."""
    flat = made_by(value, ops.Reshape)
    concat = made_by(flat.x if flat is not None else value, ops.Concat)
    if concat is None or len(concat.xs) != 2 or concat.axis != len(concat.result.shape) - 1:
        return None
    if flat is not None and not (len(concat.result.shape) == 5 and is_one(concat.xs[0].shape[4])):
        return None
    negated, second = (_flat(x) if flat is not None else x for x in concat.xs)
    minus = made_by(negated, ops.Neg)
    high, low = made_by(minus.x if minus is not None else None, ops.Slice), made_by(second, ops.Slice)
    if high is None or low is None or high.x is not low.x or len(high.x.shape) != 4:
        return None
    return _pair(low, high, "half" if flat is None else "interleaved")


def _flat(value: Value) -> Value:
    reshape = made_by(value, ops.Reshape)
    return value if reshape is None else reshape.x


def whole_lead(op: ops.Slice) -> bool:
    """Whether a slice cuts the last axis alone."""
    lead = zip(op.starts[:-1], op.stops[:-1], op.steps[:-1], op.x.shape[:-1])
    return all(is_zero(a) and same_dim(b, n) and s == 1 for a, b, s, n in lead)


def _pair(low: ops.Slice, high: ops.Slice, style: str) -> Pair | None:
    start, half = low.starts[-1], low.result.shape[-1]
    if not isinstance(start, int) or not isinstance(half, int) or high.result.shape[-1] != half:
        return None
    apart, step = (half, 1) if style == "half" else (1, 2)
    fits = low.steps[-1] == high.steps[-1] == step and high.starts[-1] == start + apart
    fits = fits and whole_lead(low) and whole_lead(high)
    return Pair(low.x, start, start + 2 * half, style) if fits else None


def split_halves(first: Value, second: Value) -> tuple[Value, Value, Value, Value] | None:
    """x1, x2, cos and sin of the two parts of a rotation."""
    sub, add = made_by(first, ops.Sub), made_by(second, ops.Add)
    left = made_by(sub.a, ops.Mul) if sub is not None else None
    right = made_by(sub.b, ops.Mul) if sub is not None else None
    if add is None or left is None or right is None:
        return None
    for x1, cos in either(left):
        for x2, sin in either(right):
            if _is_sum(add, {(x2, cos), (x1, sin)}):
                return x1, x2, cos, sin
    return None


def _is_sum(add: ops.Binary, wanted: set[tuple[Value, Value]]) -> bool:
    """Whether ``add`` is the sum of the products of the wanted pairs."""
    products = [made_by(v, ops.Mul) for v in add.operands]
    pairs = [(p.a, p.b) for p in products if p is not None]
    found = {pair if pair in wanted else pair[::-1] for pair in pairs}
    return found == wanted
