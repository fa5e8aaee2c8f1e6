"""``attention(q * 0.5, k, v, le(iota, iota))`` -> ``attention(q, k, v) {scale=0.5 causal=true}``."""

from __future__ import annotations

from tilewright.ir import DType, Op, Pattern, Rewriter, Value, ops, same_dim
from tilewright.passes.masks import Meaning, read_mask
from tilewright.passes.match import is_one, is_scalar, joined, made_by, replace, same_shape, scalar, used_once

HIDDEN = -1e4  # a number added to a score below which models mean "never"


def _change(op: ops.Attention, rw: Rewriter, **changes: object) -> None:
    replace(rw, op, op.clone({}, **changes))


def mask_bias(op: ops.Attention, rw: Rewriter) -> None:
    """A bias that is zero or minus infinity -> a mask, also as one term of a sum; a bias of zeros -> none."""
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
    if isinstance(add, ops.Broadcast):
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
    if said.rest == (op.mask,):
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
    """Masks and biases broadcast by themselves; axes of size one are kept, so that both stay of rank 4."""
    for name in ("mask", "bias"):
        value: Value | None = getattr(op, name)
        repeat = made_by(value, ops.Broadcast)
        if repeat is not None:
            lead = (1,) * (len(repeat.shape) - repeat.x.tensor.rank)
            source = repeat.x if not lead else rw.before(op).add(ops.Reshape(repeat.x, (*lead, *repeat.x.shape)))
            _change(op, rw, **{name: source})
            return


def whole_padding(op: ops.Attention, rw: Rewriter) -> None:
    """Padding that keeps every key -> none."""
    if op.padding is not None and is_scalar(op.padding, True):
        _change(op, rw, padding=None)


def grouped_heads(op: ops.Attention, rw: Rewriter) -> None:
    """Keys and values repeated for each query head -> the keys and values: attention groups heads by itself."""
    k, v = _unrepeated(op.k), _unrepeated(op.v)
    if k is None or v is None or not same_dim(k.shape[2], v.shape[2]):
        return
    pair = [rw.before(op).add(ops.Reshape(x.x, (*x.x.shape[:2], x.x.shape[2], x.shape[4]))) for x in (k, v)]
    _change(op, rw, k=pair[0], v=pair[1])


def _unrepeated(value: Value) -> ops.Broadcast | None:
    """The broadcast ``[B, T, Hkv, 1, D] -> [B, T, Hkv, n, D]`` behind ``[B, T, Hkv * n, D]``."""
    reshape = made_by(value, ops.Reshape)
    repeat = made_by(reshape.x, ops.Broadcast) if reshape is not None else made_by(value, ops.Broadcast)
    if repeat is None:
        return None
    if len(repeat.shape) == 5 and repeat.x.tensor.rank == 5 and is_one(repeat.x.shape[3]):
        others = [i for i in range(5) if i != 3]
        keeps = all(same_dim(repeat.shape[i], repeat.x.shape[i]) for i in others)
        return repeat if keeps and same_shape(value.shape[:2], repeat.shape[:2]) else None
    return None


def shared_head(op: ops.Attention, rw: Rewriter) -> None:
    """One head of keys and values broadcast to all query heads -> that head."""
    k, v = made_by(op.k, ops.Broadcast), made_by(op.v, ops.Broadcast)
    if k is None or v is None:
        return
    one = [r.x.tensor.rank == 4 and is_one(r.x.shape[2]) for r in (k, v)]
    keeps = [same_shape(r.x.shape[:2], r.shape[:2]) and same_dim(r.x.shape[3], r.shape[3]) for r in (k, v)]
    if all(one) and all(keeps):
        _change(op, rw, k=k.x, v=v.x)


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
    grouped_heads,
    shared_head,
    scaled_operand,
)
