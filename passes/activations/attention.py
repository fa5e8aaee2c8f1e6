"""The layers at attention that CHESS makes sparse: those of queries and of outputs (arXiv:2409.01366, section 3.3).

    q, k, v = slices of linear(x, @qkv)   ->   q = linear(x, @qkv.0_64), k, v = slices of linear(x, @qkv.64_96)

Keys and values stay whole: errors in them would stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.ir import Op, Rewriter, Value, ops
from tilewright.passes.calibration.stream import Layer
from tilewright.passes.match import replace
from tilewright.passes.stored import cut, cut_bias

AnyAttention = ops.Attention | ops.Attend
_PASSED = (ops.Reshape, ops.Transpose, ops.Rope, ops.RmsNorm, ops.LayerNorm, ops.Mul, ops.Cast)
"""What may stand between a projection and attention."""


def queries_and_outputs(rw: Rewriter, layers: Sequence[Layer]) -> list[Layer]:
    """The layers among ``layers``, or the parts of them, that make queries, and those that read what attention gives."""
    functions = {op.parent for op in layers if op.parent is not None}
    found: list[Layer] = []
    for attention in [op for function in functions for op in function.walk(ops.Attention)]:
        assert isinstance(attention, ops.Attention)
        linear, part = maker(attention.q)
        if isinstance(linear, ops.Linear) and linear in layers:
            found += [linear] if part is None else alone(rw, linear, part)
        found += [op for op in layers if op.x is joined_heads(attention)]
    return list(dict.fromkeys(found))


def maker(value: Value) -> tuple[Op | None, ops.Slice | None]:
    """The layer that makes the heads ``value``, and the slice that takes them from its result."""
    op, part = value.owner, None
    while isinstance(op, (*_PASSED, ops.Slice)):
        part = op if isinstance(op, ops.Slice) and isinstance(op.x.owner, ops.Linear) else part
        op = op.operands[0].owner
    return op, part


def joined_heads(attention: AnyAttention) -> Value:
    """The result of ``attention``, or its heads joined."""
    users = list(attention.result.users)
    return users[0].results[0] if len(users) == 1 and isinstance(users[0], ops.Reshape) else attention.result


@dataclass(frozen=True)
class Rows:
    """Of a result cut along its last axis."""

    start: int
    stop: int

    @classmethod
    def of(cls, part: Op, linear: ops.Linear) -> Rows | None:
        """Those that ``part`` takes; None when it is no such slice."""
        if not isinstance(part, ops.Slice) or any(step != 1 for step in part.steps):
            return None
        start, stop = part.starts[-1], part.stops[-1]
        return cls(start, stop) if isinstance(start, int) and isinstance(stop, int) else None


def alone(rw: Rewriter, linear: ops.Linear, wanted: ops.Slice) -> list[Layer]:
    """A layer that makes what ``wanted`` takes, at the beginning or the end of the rows of ``linear``, beside the rest."""
    n, rows = int(linear.weight.shape[0]), Rows.of(wanted, linear)
    others = {part: Rows.of(part, linear) for part in linear.result.users if part is not wanted}
    if rows is None or (rows.start != 0 and rows.stop != n) or None in others.values():
        rw.skip(linear, "queries cannot be taken from it")
        return []
    rest = Rows(rows.stop, n) if rows.start == 0 else Rows(0, rows.start)
    if any(o is None or o.start < rest.start or o.stop > rest.stop for o in others.values()):
        rw.skip(linear, "others read its queries too")
        return []
    first, second = (_part(rw, linear, r) for r in (rows, rest))
    for part, its in others.items():
        assert isinstance(part, ops.Slice)
        assert its is not None
        starts = (*part.starts[:-1], its.start - rest.start)
        stops = (*part.stops[:-1], its.stop - rest.start)
        rw.replace(part, ops.Slice(second.result, starts, stops, part.steps))
    replace(rw, wanted, first.result)
    return [first]


def _part(rw: Rewriter, linear: ops.Linear, rows: Rows) -> ops.Linear:
    b = rw.before(linear)
    weight = cut(b, rw.module, linear.weight, rows.start, rows.stop)
    part = ops.Linear(linear.x, weight, cut_bias(rw.module, linear.bias, rows.start, rows.stop))
    b.insert(part)
    return part
