"""``attention(q, repeat(k), repeat(v))`` -> ``attention(q, k, v)``: a head of keys serves a group of query heads."""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.ir import Builder, Dim, Pattern, Rewriter, Value, as_dim, ops, same_dim
from tilewright.passes.match import is_one, made_by, replace, same_shape


def grouped_heads(op: ops.Attention, rw: Rewriter) -> None:
    """Keys and values repeated for each query head -> the keys and values: attention groups heads by itself."""
    found = _unrepeated(op.k), _unrepeated(op.v)
    if found[0] is None or found[1] is None or found[0].heads != found[1].heads:
        return
    k, v = (g.single(rw.before(op)) for g in found if g is not None)
    replace(rw, op, op.clone({}, k=k, v=v))


@dataclass
class Grouped:
    """A broadcast ``[.., Hkv, 1, ..] -> [.., Hkv, n, ..]``; ``flip`` when heads stand before positions."""

    source: Value
    axis: int
    flip: bool

    @property
    def heads(self) -> Dim:
        return self.source.shape[self.axis]

    def single(self, b: Builder) -> Value:
        """Each head once, ``[B, T, Hkv, D]``."""
        shape = self.source.shape
        heads = b.add(ops.Reshape(self.source, (*shape[: self.axis + 1], *shape[self.axis + 2 :])))
        return b.add(ops.Transpose(heads, (0, 2, 1, 3))) if self.flip else heads


def _unrepeated(value: Value) -> Grouped | None:
    flip = made_by(value, ops.Transpose)
    if flip is not None and flip.perm != (0, 2, 1, 3):
        return None
    joined_heads = made_by(flip.x if flip is not None else value, ops.Reshape)
    repeat = made_by(joined_heads.x, ops.Broadcast) if joined_heads is not None else None
    axis = 2 if flip is None else 1
    if joined_heads is None or repeat is None or len(repeat.shape) != 5 or len(repeat.x.shape) != 5:
        return None
    kept = all(same_dim(a, b) for i, (a, b) in enumerate(zip(repeat.x.shape, repeat.shape)) if i != axis + 1)
    merged = (*repeat.shape[:axis], as_dim(repeat.shape[axis] * repeat.shape[axis + 1]), *repeat.shape[axis + 2 :])
    fits = kept and is_one(repeat.x.shape[axis + 1]) and same_shape(joined_heads.shape, merged)
    return Grouped(repeat.x, axis, flip is not None) if fits else None


def late_repeat(op: ops.Rope, rw: Rewriter) -> None:
    """Heads are rotated before they are repeated."""
    found = _unrepeated(op.x)
    if found is None or found.flip:
        return
    b, source = rw.before(op), found.source
    once = b.add(ops.Rope(found.single(b), op.cos, op.sin, op.style))
    spread = b.add(ops.Reshape(once, source.shape))
    times = as_dim(op.x.shape[2] // source.shape[2])
    wide = b.add(ops.Broadcast(spread, (*source.shape[:3], times, source.shape[4])))
    replace(rw, op, ops.Reshape(wide, op.result.shape))


def shared_head(op: ops.Attention, rw: Rewriter) -> None:
    """One head of keys and values broadcast to all query heads -> that head."""
    k, v = made_by(op.k, ops.Broadcast), made_by(op.v, ops.Broadcast)
    if k is None or v is None:
        return
    one = [r.x.tensor.rank == 4 and is_one(r.x.shape[2]) for r in (k, v)]
    keeps = [same_shape(r.x.shape[:2], r.shape[:2]) and same_dim(r.x.shape[3], r.shape[3]) for r in (k, v)]
    if all(one) and all(keeps):
        replace(rw, op, op.clone({}, k=k.x, v=v.x))


PATTERNS: tuple[Pattern, ...] = (grouped_heads, late_repeat, shared_head)
