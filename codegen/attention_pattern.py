"""Attention kernels in the IR: the one attention operation, and where its operands come from.

An operand may be a slice of whole columns of a wider tensor (a fused QKV projection). Queries, and keys that are
appended, may come through ``nn.rope``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tilewright.ir import Argument, Dim, Function, Op, Return, Value, ops, same_dim

DTYPES = ("f32", "bf16", "f16")
"""Element types of queries, keys and values."""
KINDS = (ops.Attention, ops.Attend, ops.Append, ops.Select, ops.Choose)  # kv.retain is an Attend


@dataclass(frozen=True)
class Slice:
    """Where rows of heads lie: elements from token to token (0 = dense) and to the first element."""

    stride: int = 0
    offset: int = 0


DENSE = Slice()


@dataclass(frozen=True)
class View:
    """Where an operand lies: an argument of the kernel, seen through a slice of columns."""

    source: Value
    place: Slice


def view_of(value: Value) -> View | str:
    """The argument behind ``value``, or why there is none that a kernel can read directly."""
    if isinstance(value, Argument):
        return View(value, DENSE)
    op = value.owner
    if isinstance(op, ops.Reshape):
        inner = view_of(op.x)
        return inner if isinstance(inner, str) or keeps_rows(op) else "a reshape changes rows"
    if not isinstance(op, ops.Slice) or not isinstance(op.x, Argument) or op.x.tensor.rank != 3:
        return f"operand {value!r} is computed in the kernel"
    width, start = op.x.shape[-1], op.starts[-1]
    if not (isinstance(width, int) and isinstance(start, int)) or any(s != 1 for s in op.steps):
        return "a slice that is not of whole columns"
    if not all(a == 0 and same_dim(b, n) for a, b, n in zip(op.starts[:-1], op.stops[:-1], op.x.shape[:-1])):
        return "a slice of rows"
    return View(op.x, Slice(width, start))


def rope_before(value: Value) -> ops.Rope | None:
    """The rotation that gives ``value``, if one does."""
    return value.owner if isinstance(value.owner, ops.Rope) else None


def unrotated(value: Value) -> Value:
    """``value`` before its rotation."""
    rope = rope_before(value)
    return value if rope is None else rope.x


def rotated_operand(op: Op) -> Value:
    """The operand that may come through a rotation."""
    return op.k if isinstance(op, ops.Append) else op.q  # type: ignore[attr-defined]


def refusal_of_rope(op: Op) -> str | None:
    """Why the rotations around ``op`` cannot be done on the way, or None."""
    ropes = [rope for v in op.operands if (rope := rope_before(v))]
    if any(rope is not rope_before(rotated_operand(op)) for rope in ropes):
        return "a rotation of keys or values that are not appended"
    for value in (v for rope in ropes for v in (rope.cos, rope.sin)):
        if isinstance(view := view_of(value), str) or view.place != DENSE or value.dtype.value not in DTYPES:
            return f"no rotation by {value!r}"
    return None


def keeps_rows(op: ops.Reshape) -> bool:
    """Whether a reshape only splits the last axis."""
    lead = op.x.shape[:-1]
    return len(op.shape) >= len(lead) and all(map(same_dim, lead, op.shape))


def axes_of(value: Value | None) -> str | None:
    """The axes of ``[B, Hq, S, T]`` that a broadcast operand has."""
    if value is None:
        return None
    shape = (1,) * (4 - value.tensor.rank) + value.shape
    return "".join(name for name, d in zip("bhst", shape) if d != 1)


def is_view(op: Op) -> bool:
    """What `view_of` and a rotation on the way can follow."""
    return isinstance(op, (ops.Slice, ops.Reshape, ops.Rope))


def find(kernel: Function, inside: Callable[[Op], bool] = is_view) -> Op | str:
    """The attention operation of ``kernel``, or why it has none; ``inside`` says what may compute its operands."""
    anchors = [op for op in kernel.body if isinstance(op, KINDS)]
    if len(anchors) != 1:
        return "not one attention operation"
    others = [op for op in kernel.body if op is not anchors[0] and not isinstance(op, Return) and not inside(op)]
    if others:
        return f"{others[0].name} does not run in an attention kernel"
    return anchors[0] if kernel.returns == anchors[0].results else "the attention's result is used in the kernel"


def tensors(op: Op) -> list[Value]:
    """The operands that hold queries, keys and values."""
    return [getattr(op, f.name) for f in op.fields if f.name in ("q", "k", "v", "q_sinks") and getattr(op, f.name)]


def static(dim: Dim) -> int | None:
    """A size when it is known while compiling: decode has one query, and gets tiles for that."""
    return dim if isinstance(dim, int) else None
