"""``attention(q * 0.5, k, v, le(iota, iota))`` -> ``attention(q, k, v) {scale=0.5 causal=true}``."""

from __future__ import annotations

from tilewright.ir import DType, Op, Pattern, Rewriter, Value, ops
from tilewright.passes.masks import Meaning, read_mask
from tilewright.passes.match import (
    is_scalar,
    joined,
    made_by,
    only_leads,
    padded,
    replace,
    same_shape,
    scalar,
    used_once,
)

HIDDEN = -1e4  # a number added to a score below which models mean "never"


def _change(op: ops.Attention, rw: Rewriter, **changes: object) -> None:
    replace(rw, op, op.clone({}, **changes))


def mask_bias(op: ops.Attention, rw: Rewriter) -> None:
    """A bias that is zero or minus infinity -> a mask, also as one term of a sum; a bias of zeros -> none.

    The lowest finite number counts as minus infinity: a query that sees no key at all then gives zeros, where adding
    that number gave the mean of all values. Only queries that are padding themselves see no key.
    """
    if op.bias is None:
        return
    if is_scalar(op.bias, 0):
        _change(op, rw, bias=None)
        return
    terms, mask = [], op.mask
    for term in _terms(op.bias):
        kept = _kept_where(rw, op, term)
        if kept is None:
            terms.append(term)
        else:
            mask = joined(rw.before(op), ops.And, [mask, kept])
    if mask is not op.mask:
        _change(op, rw, mask=mask, bias=joined(rw.before(op), ops.Add, terms))


def _terms(bias: Value) -> list[Value]:
    add = bias.owner
    if isinstance(add, ops.Broadcast) or (isinstance(add, ops.Reshape) and only_leads(add)):
        return _terms(add.x)
    return [*_terms(add.a), *_terms(add.b)] if isinstance(add, ops.Add) else [bias]


def _kept_where(rw: Rewriter, op: Op, bias: Value) -> Value | None:
    """Where ``bias`` is zero, when it is minus infinity anywhere else."""
    choice = made_by(bias, ops.Where)
    if choice is None:
        return None
    a, b = scalar(choice.a), scalar(choice.b)
    if a is None or b is None:
        return None
    if a == 0 and b <= HIDDEN:
        return choice.cond
    return rw.before(op).add(ops.Not(choice.cond)) if b == 0 and a <= HIDDEN else None


def mask_attributes(op: ops.Attention, rw: Rewriter) -> None:
    """A mask that compares positions -> causal, window, chunk; one that says which keys are real -> padding."""
    if op.mask is None:
        return
    said = read_mask(op.mask, op.q, op.k)
    if said == Meaning(rest=said.rest) and said.rest:
        rw.skip(op, "the mask is not made of comparisons of positions")
        return
    if not _compatible(op, said):
        rw.skip(op, "the mask names a window or chunk besides the one of the attention")
        return
    keys = (op.q.shape[0], op.k.shape[1])
    padding = [op.padding, *(rw.before(op).add(ops.Reshape(p, keys)) for p in said.padding)]
    changes = {
        "mask": joined(rw.before(op), ops.And, said.rest),
        "padding": joined(rw.before(op), ops.And, padding),
        "causal": op.causal or said.causal,
        "window": max(op.window, said.window),
        "window_right": max(op.window_right, said.window_right),
        "chunk": max(op.chunk, said.chunk),
    }
    _change(op, rw, **changes)


def _compatible(op: ops.Attention, said: Meaning) -> bool:
    pairs = (op.window, said.window), (op.window_right, said.window_right), (op.chunk, said.chunk)
    return all(a <= 0 or b <= 0 or a == b for a, b in pairs)


def unrepeated_mask(op: ops.Attention, rw: Rewriter) -> None:
    """Masks and biases broadcast by themselves; they keep four axes."""
    for name in ("mask", "bias"):
        value: Value | None = getattr(op, name)
        repeat = made_by(value, ops.Broadcast)
        source = repeat.x if repeat is not None else value
        if source is None or (source is value and len(source.shape) == 4):
            continue
        _change(op, rw, **{name: rw.before(op).add(ops.Reshape(source, padded(source.shape, 4)))})
        return


def whole_padding(op: ops.Attention, rw: Rewriter) -> None:
    """Padding that keeps every key -> none."""
    if op.padding is not None and is_scalar(op.padding, True):
        _change(op, rw, padding=None)


def scaled_operand(op: ops.Attention, rw: Rewriter) -> None:
    """``attention(q * c, k)`` -> ``attention(q, k) {scale * c}``, also when q is regrouped or rotated in between."""
    for value in (op.q, op.k):
        at = value
        while used_once(at) and isinstance(at.owner, (ops.Reshape, ops.Transpose, ops.Rope)):
            at = at.owner.x
        product = at.owner
        if not used_once(at) or not isinstance(product, (ops.Mul, ops.Div)) or product.a.dtype is DType.bool:
            continue
        number = scalar(product.b)
        if number is None or not same_shape(product.a.shape, product.result.shape):
            continue
        replace(rw, product, product.a)
        scale = op.scale * number if isinstance(product, ops.Mul) else op.scale / number
        _change(op, rw, scale=scale)
        return


PATTERNS: tuple[Pattern, ...] = (
    unrepeated_mask,
    mask_bias,
    mask_attributes,
    whole_padding,
    scaled_operand,
)
