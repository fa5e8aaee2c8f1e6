"""Which operations leave every position, and every sequence of a batch, to itself.

``nn.linear(x[B, S, H])`` maps each position alone; ``core.reduce(x[B, S, H], axes=[1])`` mixes them. :func:`carry` says
where an axis of an operand ends up in the result, or raises :class:`Mixed` with the reason when positions (or the
sequences of a batch) meet. Anything not listed here mixes: an unknown operation is never taken for harmless.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import singledispatch
from typing import Any

from tilewright.ir import Dim, Op, Value, as_dim, ops, product, same_dim
from tilewright.passes.kv_axes import Axes, Mixed, Part, has


def named_operands(op: Op) -> Iterator[tuple[str, Value]]:
    """The operands that are present, with the names of their fields."""
    for f in op.fields:
        value = getattr(op, f.name)
        if f.kind == "variadic":
            yield from ((f.name, v) for v in value)
        elif f.is_operand and value is not None:
            yield f.name, value


def result_axes(op: Op, axes: Mapping[Value, Axes], batch: Any, seq: Any) -> Axes | None:
    """The axes of op's results, given those of its operands; None when no operand has any; raises Mixed."""
    found: Axes | None = None
    for slot, value in named_operands(op):
        if value not in axes:
            continue
        where = axes[value]
        got = Axes(carry(op, slot, value, where.batch, batch), carry(op, slot, value, where.seq, seq))
        if found is not None and got != found:
            raise Mixed("relates positions with positions: its operands have them on different axes" + _hint(op))
        found = got
    return found


def _hint(op: Op) -> str:
    return "; attention that is written out needs the pass fuse-attention first" if isinstance(op, ops.Matmul) else ""


def check_result(value: Value, axes: Axes, batch: Any, seq: Any) -> None:
    """Raise Mixed unless the symbols are where ``axes`` says, and nowhere else."""
    for symbol, part, what in ((seq, axes.seq, "sequence"), (batch, axes.batch, "batch")):
        for i, dim in enumerate(value.shape):
            if i == part.axis and not same_dim(dim, as_dim(part.outer * symbol * part.inner)):
                raise Mixed(f"changes the size of the {what} axis: {value.type}")
            if i != part.axis and has(dim, symbol):
                raise Mixed(f"gives two {what} axes: {value.type}")


def _over(part: Part, what: str) -> Mixed:
    return Mixed(f"{what} over an axis that holds positions or sequences (axis {part.axis})")


def _away(part: Part, axis: int, what: str) -> Part:
    if part.axis == axis:
        raise _over(part, what)
    return part


def _moved(part: Part, by: int) -> Part:
    return Part(part.axis + by, part.outer, part.inner)


@singledispatch
def carry(op: Op, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    """Where ``part`` of the operand in ``slot`` is in op's results; raises Mixed."""
    raise Mixed("this operation is not known to treat each position alone")


@carry.register
def _elementwise(op: ops.Elementwise, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    return _moved(part, op.result.tensor.rank - value.tensor.rank)


def divide(a: Dim, b: Dim) -> Dim | None:
    """``a / b`` when that has no remainder for any value of the symbols."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a % b == 0 else None
    quotient: Any = a / b  # of products, so sympy cancels common factors by itself
    return as_dim(quotient) if quotient.as_numer_denom()[1] == 1 else None


@carry.register
def _reshape(op: ops.Reshape, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    """The symbol keeps its stride; the axis that spans this stride holds it now."""
    stride = as_dim(part.inner * product(op.x.shape[part.axis + 1 :]))
    below: Dim = 1
    for axis in reversed(range(len(op.shape))):
        inner = divide(stride, below)
        outer = None if inner is None else divide(op.shape[axis], as_dim(inner * symbol))
        if inner is not None and outer is not None and not has(inner, symbol) and not has(outer, symbol):
            return Part(axis, outer, inner)
        below = as_dim(below * op.shape[axis])
    raise Mixed("splits the axis of positions or sequences, or moves other elements into it")


@carry.register
def _transpose(op: ops.Transpose, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    return Part(op.perm.index(part.axis), part.outer, part.inner)


@carry.register
def _broadcast(op: ops.Broadcast, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    return _moved(part, len(op.shape) - op.x.tensor.rank)


@carry.register
def _slice(op: ops.Slice, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    i = part.axis
    if op.starts[i] != 0 or op.steps[i] != 1 or not same_dim(op.stops[i], op.x.shape[i]):
        raise Mixed(f"takes a part of the axis that holds positions or sequences (axis {i})")
    return part


@carry.register
def _concat(op: ops.Concat, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    return _away(part, op.axis, "concatenates")


@carry.register
def _pad(op: ops.Pad, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    if op.low[part.axis] != 0 or op.high[part.axis] != 0:
        raise _over(part, "pads")
    return part


@carry.register
def _gather(op: ops.Gather, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    if slot == "indices":
        return _moved(part, op.axis)
    _away(part, op.axis, "picks")
    return _moved(part, op.indices.tensor.rank - 1 if part.axis > op.axis else 0)


@carry.register(ops.TakeAlong)
@carry.register(ops.ScatterAlong)
def _take_along(op: Any, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    if not all(same_dim(v.shape[part.axis], value.shape[part.axis]) for v in op.operands):
        raise Mixed(f"takes a part of an operand along the axis of positions or sequences (axis {part.axis})")
    return _away(part, op.axis, "picks")


@carry.register(ops.CumSum)
@carry.register(ops.Softmax)
@carry.register(ops.Sort)
@carry.register(ops.TopK)
def _along(op: Any, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    return _away(part, op.axis, "works")


@carry.register
def _gather_nd(op: ops.GatherND, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    lead = op.result.tensor.rank - (op.x.tensor.rank - len(op.indices))
    if slot == "indices":
        return _moved(part, lead - value.tensor.rank)
    if part.axis < len(op.indices):
        raise _over(part, "picks")
    return _moved(part, lead - len(op.indices))


@carry.register
def _reduce(op: ops.Reduce, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    if part.axis in op.axes:
        raise _over(part, f"reduces ({op.fn})")
    return part if op.keepdim else _moved(part, -sum(a < part.axis for a in op.axes))


@carry.register
def _argmax(op: ops.ArgMax, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    _away(part, op.axis, "reduces")
    return part if op.keepdim else _moved(part, -(op.axis < part.axis))


@carry.register(ops.Linear)
@carry.register(ops.GatedLinear)
@carry.register(ops.SparseLinear)
@carry.register(ops.LayerNorm)
@carry.register(ops.RmsNorm)
@carry.register(ops.Quantize)
def _last_axis(op: Any, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    if slot != "x":
        raise Mixed(f"its {slot} depends on the tokens")
    return _away(part, op.x.tensor.rank - 1, "works")


@carry.register
def _dequantize(op: ops.Dequantize, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    return _away(part, op.codes.tensor.rank - 1, "works")


@carry.register
def _embedding(op: ops.Embedding, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    if slot != "indices":
        raise Mixed("its table depends on the tokens")
    return part


@carry.register
def _matmul(op: ops.Matmul, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    contracted = value.tensor.rank - (1 if slot == "a" else 2)
    if part.axis == contracted:
        raise Mixed("sums over positions" + _hint(op))
    return _moved(part, op.result.tensor.rank - value.tensor.rank)


@carry.register
def _rope(op: ops.Rope, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    return _away(part, 3 if slot == "x" else 2, "works")


@carry.register
def _experts(op: ops.Experts, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    if slot not in ("x", "indices", "weights") or part.axis != 0:
        raise Mixed(f"its {slot} has positions on axis {part.axis}")
    return part


@carry.register(ops.Conv)
@carry.register(ops.MaxPool)
@carry.register(ops.AvgPool)
@carry.register(ops.AdaptiveAvgPool)
@carry.register(ops.Resize)
@carry.register(ops.GroupNorm)
def _images(op: Any, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    if slot != "x" or part.axis != 0:
        raise _over(part, "convolves, pools or normalises")
    return part


@carry.register
def _attention(op: ops.Attention, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    """Attention over keys that do not depend on the tokens, such as those of an image, is a map of its queries."""
    if slot != "q" or op.causal or part.axis > 1:
        raise Mixed("is an attention whose keys do not depend on the tokens, in a form that is not supported")
    return part


@carry.register
def _attend(op: ops.Attend, slot: str, value: Value, part: Part, symbol: Any) -> Part:
    if slot == "bias":
        return Part({0: 0, 2: 1}[part.axis], part.outer, part.inner)
    return part
