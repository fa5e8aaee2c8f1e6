"""What a mask of comparisons between positions means: ``le(iota[T], iota[S, 1])`` -> causal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

from tilewright.ir import DType, Op, Shape, Value, as_dim, ops, same_dim
from tilewright.passes.masks_constant import constant_window
from tilewright.passes.match import is_one, only_leads, padded

_MIRRORED: dict[Any, Any] = {ops.Le: ops.Ge, ops.Ge: ops.Le, ops.Lt: ops.Gt, ops.Gt: ops.Lt}
_QUERY, _KEY = -2, -1


@dataclass(frozen=True)
class Affine:
    """``(sum(coefficient * index along axis) + offset) // divisor``; axes count from the end, as broadcasting does."""

    axes: dict[int, int] = field(default_factory=dict)
    offset: Any = 0
    divisor: int = 1

    def plus(self, other: Affine, sign: int) -> Affine | None:
        if self.divisor != 1 or other.divisor != 1:
            return None
        joined = {a: self.axes.get(a, 0) + sign * other.axes.get(a, 0) for a in {*self.axes, *other.axes}}
        return Affine({a: c for a, c in joined.items() if c}, as_dim(self.offset + sign * other.offset))

    def moved(self, places: dict[int, int]) -> Affine:
        """With each axis at its new place; the others are gone."""
        return replace(self, axes={places[a]: c for a, c in self.axes.items() if a in places})

    def over(self, number: Affine) -> Affine | None:
        """Divided by a positive constant."""
        size = number.offset
        whole = self.divisor == 1 and not number.axes and isinstance(size, int) and size > 0
        return replace(self, divisor=size) if whole else None


@dataclass(frozen=True)
class Meaning:
    """Attributes of nn.attention that say what a mask says; ``rest`` are the parts that none of them can say."""

    causal: bool = False
    window: int = -1
    window_right: int = -1
    chunk: int = 0
    padding: tuple[Value, ...] = ()
    rest: tuple[Value, ...] = ()


def affine(value: Value) -> Affine | None:
    """``value`` as a linear function of indices, if it is one."""
    match value.owner:
        case ops.Full(value=number, dtype=dtype) if dtype.is_int:
            return Affine({}, number)
        case ops.SizeOf(value=dim):
            return Affine({}, dim)
        case ops.Iota(start=start, step=step):
            return Affine({-1: step}, start)
        case ops.Cast(x=x, dtype=dtype) if dtype.is_int and x.dtype.is_int:
            return affine(x)
        case ops.Broadcast(x=x):
            return affine(x)
        case ops.Reshape(x=x, shape=shape):
            return _regrouped(affine(x), x.shape, shape)
        case ops.Transpose(x=x, perm=perm):
            inner, n = affine(x), len(perm)
            return inner and inner.moved({p - n: i - n for i, p in enumerate(perm)})
        case ops.Binary(a=a, b=b) as op:
            left, right = affine(a), affine(b)
            return _combined(op, left, right) if left is not None and right is not None else None
    return None


def _combined(op: Op, left: Affine, right: Affine) -> Affine | None:
    if isinstance(op, ops.FloorDiv):
        return left.over(right)
    return left.plus(right, 1 if isinstance(op, ops.Add) else -1) if isinstance(op, (ops.Add, ops.Sub)) else None


def _regrouped(inner: Affine | None, old: Shape, new: Shape) -> Affine | None:
    """Through a reshape that only adds or drops axes of size one."""
    before = [i - len(old) for i, d in enumerate(old) if not is_one(d)]
    after = [i - len(new) for i, d in enumerate(new) if not is_one(d)]
    same = len(before) == len(after) and all(same_dim(old[i], new[j]) for i, j in zip(before, after))
    return inner.moved(dict(zip(before, after))) if inner is not None and same else None


def read_mask(mask: Value, q: Value, k: Value) -> Meaning:
    """What the bool ``mask`` over queries of ``q`` ``[B, S, H, D]`` and keys of ``k`` ``[B, T, ...]`` says."""
    meaning = Meaning()
    for part in _conjunction(mask):
        meaning = _read_part(meaning, part, q, k)
    return meaning


def _conjunction(mask: Value) -> Iterator[Value]:
    op = mask.owner
    if isinstance(op, ops.And) and mask.dtype is DType.bool:
        yield from _conjunction(op.a)
        yield from _conjunction(op.b)
    elif isinstance(op, ops.Broadcast) or (isinstance(op, ops.Reshape) and only_leads(op)):
        yield from _conjunction(op.x)
    else:
        yield mask


def _read_part(known: Meaning, part: Value, q: Value, k: Value) -> Meaning:
    op = part.owner
    if isinstance(op, ops.Full) and op.value:
        return known
    found = _read_compare(op, as_dim(k.shape[1] - q.shape[1])) if isinstance(op, ops.Compare) else None
    window = constant_window(part, q, k) if found is None else None
    found = found if window is None else Meaning(causal=True, window=window)
    merged = _merge(known, found) if found is not None else None
    if merged is not None:
        return merged
    shape = padded(part.shape, 4)
    keys = len(shape) == 4 and is_one(shape[1]) and is_one(shape[2])
    if keys and same_dim(shape[0], q.shape[0]) and same_dim(shape[3], k.shape[1]):
        return replace(known, padding=(*known.padding, part))
    return replace(known, rest=(*known.rest, part))


def _merge(known: Meaning, found: Meaning) -> Meaning | None:
    """Both at once; None when attributes cannot say it."""
    if known.chunk and found.chunk and known.chunk != found.chunk:
        return None

    def tighter(a: int, b: int) -> int:
        return min(a, b) if a > 0 and b > 0 else max(a, b)

    return replace(
        known,
        causal=known.causal or found.causal,
        window=tighter(known.window, found.window),
        window_right=tighter(known.window_right, found.window_right),
        chunk=max(known.chunk, found.chunk),
    )


def _read_compare(op: ops.Compare, shift: Any) -> Meaning | None:
    """A comparison of key and query positions; query i stands at ``i + shift``."""
    left, right = affine(op.a), affine(op.b)
    if left is None or right is None:
        return None
    if isinstance(op, ops.Eq):
        return _same_chunk(left, right, shift) or _same_chunk(right, left, shift)
    difference, kind = left.plus(right, -1), cast(Any, type(op))
    if difference is not None and difference.axes == {_KEY: -1, _QUERY: 1}:
        difference, kind = right.plus(left, -1), _MIRRORED.get(kind)
    if difference is None or difference.axes != {_KEY: 1, _QUERY: -1}:
        return None
    ahead = as_dim(difference.offset + shift)  # kind(key - query + ahead, 0)
    if not isinstance(ahead, int):
        return None
    if kind in (ops.Le, ops.Lt):
        return _below(1 - ahead if kind is ops.Le else -ahead)
    if kind in (ops.Ge, ops.Gt):
        window = ahead + 1 if kind is ops.Ge else ahead
        return Meaning(window=window) if window > 0 else None
    return None


def _below(bound: int) -> Meaning | None:
    """``key < query + bound``."""
    if bound == 1:
        return Meaning(causal=True)
    return Meaning(window_right=bound) if bound > 0 else None


def _same_chunk(key: Affine, query: Affine, shift: Any) -> Meaning | None:
    """``key // size == query // size``."""
    fits = key.axes == {_KEY: 1} and query.axes == {_QUERY: 1} and key.divisor == query.divisor > 1
    fits = fits and same_dim(as_dim(key.offset), 0) and same_dim(as_dim(query.offset), shift)
    return Meaning(chunk=key.divisor) if fits else None
