"""Shape rules that several operations share."""

from __future__ import annotations

from collections.abc import Sequence

from tilewright.ir.core import Op, Value
from tilewright.ir.types import Dim, Shape, dim_text, same_dim


def shape_text(shape: Sequence[Dim]) -> str:
    return "[" + ", ".join(map(dim_text, shape)) + "]"


def broadcast(op: Op, a: Shape, b: Shape) -> Shape:
    """NumPy's broadcast of two shapes; fails in the name of ``op``."""
    rank = max(len(a), len(b))
    pa = (1,) * (rank - len(a)) + tuple(a)
    pb = (1,) * (rank - len(b)) + tuple(b)
    out: list[Dim] = []
    for x, y in zip(pa, pb):
        if x != 1 and y != 1 and not same_dim(x, y):
            op.fail(f"shapes {shape_text(a)} and {shape_text(b)} do not broadcast")
        out.append(y if x == 1 else x)
    return tuple(out)


def expect_broadcast(op: Op, what: str, shape: Shape, to: Shape) -> None:
    """Fail unless ``shape`` broadcasts to exactly ``to``."""
    got = broadcast(op, shape, to)
    if len(got) != len(to) or not all(map(same_dim, got, to)):
        op.fail(f"{what}: {shape_text(shape)} does not broadcast to {shape_text(to)}")


def axis_of(op: Op, axis: int, rank: int) -> int:
    """``axis`` checked to lie in ``[0, rank)``; negative axes are for the frontend to resolve."""
    if not 0 <= axis < rank:
        op.fail(f"axis {axis} is outside of rank {rank}")
    return axis


def expect_dim(op: Op, what: str, got: Dim, want: Dim) -> None:
    """Fail unless two dimensions are the same."""
    if not same_dim(got, want):
        op.fail(f"{what}: expected {dim_text(want)}, got {dim_text(got)}")


def expect_rank(op: Op, what: str, shape: Shape, rank: int) -> None:
    """Fail unless ``shape`` has ``rank`` axes."""
    if len(shape) != rank:
        op.fail(f"{what}: expected rank {rank}, got shape {shape_text(shape)}")


def expect_dtype(op: Op, a: Value, b: Value) -> None:
    """Fail unless two values have one element type."""
    if a.dtype != b.dtype:
        op.fail(f"element types differ: {a.dtype.value} and {b.dtype.value}")
