"""``matmul(softmax(add(mul(matmul(q, transpose(k)), scale), bias)), v)`` -> ``nn.attention(q, k, v, bias) {scale=..}``.

For modules that write attention out; what comes in between (scale, softcap, mask, bias, casts, joined heads) is taken
along. Transposes put around ``nn.attention`` cancel in canonicalize, which also turns masks into attributes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tilewright.ir import Builder, Dim, Module, Op, Rewriter, Shape, Value, as_dim, ops, rewrite, same_dim
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.canonical_attention import HIDDEN
from tilewright.passes.match import (
    either,
    is_one,
    joined,
    made_by,
    only_user,
    padded,
    replace,
    same_shape,
    scalar,
    used_once,
)

_HEADS = (0, 2, 1, 3)


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Finds attention written as products and a softmax."""

    name: ClassVar[str] = "fuse-attention"

    def run(self, module: Module, ctx: PassContext) -> bool:
        return ctx.take(rewrite(module, attention, functions=module.entries()))


class NotScores(Exception):
    """Why the operand of a softmax is not made of attention scores."""


@dataclass
class Scores:
    """What was found between the softmax and the product of queries and keys, from the outside in."""

    scale: float = 1.0
    softcap: float = 0.0
    masks: list[tuple[Value, int, bool]] = field(default_factory=list)
    """Condition, rank of the scores it is for, whether it says what to hide."""
    biases: list[tuple[Value, int, float]] = field(default_factory=list)
    """Value, rank of the scores it is for, factor."""


def attention(op: ops.Softmax, rw: Rewriter) -> None:
    shape = op.x.shape
    product = _values_product(op.result)
    if op.axis != len(shape) - 1 or product is None:
        if any(isinstance(u, ops.Matmul) for u in op.result.users):
            rw.skip(op, "something else than the product with the values takes the weights too")
        return
    found = Scores()
    try:
        keys = _read(op.x, found)
    except NotScores as error:
        rw.skip(op, str(error))
        return
    four = shape if len(shape) == 4 else (*_lead(keys.a), *shape[1:])
    b = rw.before(product)
    heads = [_heads(b, x, four) for x in (keys.a, _turned(b, keys.b), product.b)]
    masks = [b.add(ops.Not(m)) if hide else m for m, _, hide in found.masks]
    masks = [_four_axes(b, m, rank, four) for m, (_, rank, _) in zip(masks, found.masks)]
    biases = [_times(b, _four_axes(b, v, rank, four), by) for v, rank, by in found.biases]
    mask, bias = joined(b, ops.And, masks), joined(b, ops.Add, biases)
    out = b.add(ops.Attention(*heads, mask=mask, bias=bias, scale=found.scale, softcap=found.softcap))
    replace(rw, product, ops.Reshape(b.add(ops.Transpose(out, _HEADS)), product.result.shape))


def _values_product(weights: Value) -> ops.Matmul | None:
    """The product of the attention weights with the values, behind casts and a regrouping of heads."""
    user = only_user(weights)
    while isinstance(user, ops.Cast) or (isinstance(user, ops.Reshape) and _keeps_matrix(user)):
        weights, user = user.result, only_user(user.result)
    fits = isinstance(user, ops.Matmul) and user.a is weights and len(user.b.shape) == len(weights.shape) in (3, 4)
    return user if fits and isinstance(user, ops.Matmul) else None


def _keeps_matrix(op: ops.Reshape) -> bool:
    return len(op.shape) in (3, 4) and len(op.x.shape) in (3, 4) and same_shape(op.shape[-2:], op.x.shape[-2:])


def _read(value: Value, found: Scores) -> ops.Matmul:
    """Follow ``value`` inwards to the product of queries and keys, noting what it passes."""
    op = value.owner
    if not used_once(value):
        raise NotScores("the scores have another user")
    match op:
        case ops.Matmul() if len(op.a.shape) == len(op.b.shape) in (3, 4):
            return op
        case ops.Cast(x=x) if x.dtype.is_float:
            return _read(x, found)
        case ops.Reshape(x=x) if _keeps_matrix(op):
            return _read(x, found)
        case ops.Where():
            return _read_mask(op, found)
        case ops.Binary(a=a, b=b) if isinstance(op, (ops.Mul, ops.Div)):
            return _read_scale(op, a, scalar(b), found)
        case ops.Binary() if isinstance(op, ops.Add):
            return _read_bias(op, found)
    raise NotScores(f"{op.name if op else 'an argument'} stands before the softmax")


def _read_mask(op: ops.Where, found: Scores) -> ops.Matmul:
    shown, hidden = scalar(op.b), scalar(op.a)
    if found.softcap:
        raise NotScores("a mask stands inside of the softcap")
    if shown is not None and shown <= HIDDEN:
        found.masks.append((op.cond, len(op.result.shape), False))
        return _read(op.a, found)
    if hidden is not None and hidden <= HIDDEN:
        found.masks.append((op.cond, len(op.result.shape), True))
        return _read(op.b, found)
    raise NotScores("a choice stands before the softmax that hides nothing")


def _read_scale(op: Op, x: Value, number: float | None, found: Scores) -> ops.Matmul:
    if number is None:
        raise NotScores("the scores are scaled by a tensor")
    tanh = made_by(x, ops.Tanh)
    if tanh is None:
        found.scale *= float(number) if isinstance(op, ops.Mul) else 1 / float(number)
        return _read(x, found)
    if found.scale != 1 or found.softcap or not used_once(x):
        raise NotScores("a tanh stands before the softmax that is no softcap")
    found.softcap = float(number)
    product = _read(tanh.x, found)
    found.scale *= found.softcap  # scores are divided by the cap before the tanh
    return product


def _read_bias(op: ops.Binary, found: Scores) -> ops.Matmul:
    if found.softcap:
        raise NotScores("a bias stands inside of the softcap")
    for scores, bias in either(op):
        if _leads_to_product(scores) and same_shape(scores.shape, op.result.shape):
            found.biases.append((bias, len(op.result.shape), found.scale))
            return _read(scores, found)
    raise NotScores("a sum stands before the softmax that holds no product of queries and keys")


def _leads_to_product(value: Value) -> bool:
    op = value.owner
    if isinstance(op, (ops.Binary, ops.Where)):
        return any(map(_leads_to_product, op.operands))
    if isinstance(op, (ops.Cast, ops.Reshape, ops.Tanh)):
        return _leads_to_product(op.x)
    return isinstance(op, ops.Matmul)


def _lead(value: Value) -> tuple[Dim, Dim]:
    """Batch and heads of ``[B * H, S, D]``: as the reshape behind it put them together, else one head.

    Any two factors would be right; these leave nothing to move.
    """
    joined_axis, size = value.shape[0], value.shape[2]
    while isinstance(value.owner, (ops.Transpose, ops.Reshape, ops.Mul, ops.Div)):
        op = value.owner
        value = op.operands[0]
        if isinstance(op, ops.Reshape) and len(value.shape) > 2 and isinstance(value.shape[-1], int):
            heads = as_dim(value.shape[-1] // size)
            if same_dim(as_dim(value.shape[-2] * heads), joined_axis) and same_dim(heads * size, value.shape[-1]):
                return value.shape[-2], heads
    return joined_axis, 1


def _turned(b: Builder, value: Value) -> Value:
    """``[.., D, T]`` as ``[.., T, D]``."""
    rank = len(value.shape)
    return b.add(ops.Transpose(value, (*range(rank - 2), rank - 1, rank - 2)))


def _heads(b: Builder, value: Value, four: Shape) -> Value:
    """``[B, H, S, D]`` or ``[B * H, S, D]`` as ``[B, S, H, D]``; its own heads when it has fewer."""
    lead = value.shape[:-2] if len(value.shape) == 4 else four[:2]
    return b.add(ops.Transpose(b.add(ops.Reshape(value, (*lead, *value.shape[-2:]))), _HEADS))


def _four_axes(b: Builder, value: Value, rank: int, four: Shape) -> Value:
    """A mask or bias for scores of ``rank`` axes as one for scores of shape ``four``."""
    shape = padded(value.shape, rank)
    if rank == 3:
        lead = (1, 1) if is_one(shape[0]) else four[:2]
        shape = (*lead, *shape[1:])
    return b.add(ops.Reshape(value, shape))


def _times(b: Builder, value: Value, factor: float) -> Value:
    return value if factor == 1 else b.add(ops.Mul(value, b.full(factor, value)))
