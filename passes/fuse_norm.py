"""``mul(w, mul(x, rsqrt(add(mean(mul(x, x)), eps))))`` -> ``nn.rms_norm(x, w)``; of ``x - mean(x)``, a layer norm.

Casts to f32 inside, and Gemma's ``1 + w``, become part of the norm, which computes in f32 anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tilewright.ir import DType, Module, Op, Rewriter, Value, ops, product, rewrite, same_dim
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.match import either, made_by, only_user, replace, scalar, through_widening


@dataclass(frozen=True)
class FuseNorm(Pass):
    """Finds RMS and layer norms written out in elementwise operations."""

    name: ClassVar[str] = "fuse-norm"

    def run(self, module: Module, ctx: PassContext) -> bool:
        return ctx.take(rewrite(module, norm, functions=module.entries()))


@dataclass
class Chain:
    """The operations from the root mean square on that belong to the norm, as far as they were followed."""

    x: Value
    end: Op
    narrow: DType
    wide: DType
    scale: Value | None = None
    offset: float = 0.0
    bias: Value | None = None

    @property
    def dtype(self) -> DType:
        return self.end.result.dtype


def norm(op: ops.Unary, rw: Rewriter) -> None:
    """Starts from ``rsqrt(mean(x * x) + eps)``."""
    add = made_by(op.x, ops.Add) if isinstance(op, ops.Rsqrt) else None
    eps = scalar(add.b) if add is not None else None
    mean = made_by(add.a, ops.Reduce) if add is not None else None
    square = made_by(mean.x, ops.Mul) if mean is not None else None
    if eps is None or mean is None or square is None or mean.fn != "mean" or square.a is not square.b:
        return
    inside = square.a
    if mean.axes != (inside.tensor.rank - 1,) or not mean.keepdim:
        rw.skip(op, f"the mean of squares is over axes {list(mean.axes)}, not over the last one")
        return
    times = only_user(op.result)
    if not isinstance(times, ops.Mul) or not any(a is inside for a, _ in either(times)):
        rw.skip(op, "the root is not multiplied with what was squared, and that alone")
        return
    centred = _uncentred(inside)
    wide = inside if centred is None else centred
    x = through_widening(wide)
    chain = Chain(x, times, x.dtype, wide.dtype)
    _follow(chain, has_bias=centred is not None)
    x = x if chain.dtype == x.dtype else wide
    if centred is None:
        new: Op = ops.RmsNorm(x, _vector(chain.scale, rw, chain.end), eps, chain.offset)
    else:
        scale = chain.scale if not chain.offset else None
        if chain.offset:
            rw.skip(op, "a layer norm has no offset of its weight")
            return
        new = ops.LayerNorm(x, _vector(scale, rw, chain.end), _vector(chain.bias, rw, chain.end), eps)
    replace(rw, chain.end, new)


def _uncentred(value: Value) -> Value | None:
    """x of ``x - mean(x)`` over the last axis."""
    sub = made_by(value, ops.Sub)
    mean = made_by(sub.b, ops.Reduce) if sub is not None else None
    if sub is None or mean is None or mean.fn != "mean" or mean.x is not sub.a or not mean.keepdim:
        return None
    return sub.a if mean.axes == (sub.a.tensor.rank - 1,) else None


def _follow(chain: Chain, has_bias: bool) -> None:
    """Takes a weight, then a bias, and casts back to the type of x on the way."""
    _narrow(chain)
    user = only_user(chain.end.result)
    if isinstance(user, ops.Mul):
        scale, offset = _scale(user, chain.end.result)
        if scale is not None and (has_bias is False or offset == 0):
            chain.end, chain.scale, chain.offset = user, scale, offset
            _narrow(chain)
    user = only_user(chain.end.result)
    if has_bias and isinstance(user, ops.Add):
        bias = next((b for a, b in either(user) if a is chain.end.result), None)
        if bias is not None and _is_vector(bias, chain.end.result):
            chain.end, chain.bias = user, through_widening(bias)
            _narrow(chain)


def _narrow(chain: Chain) -> None:
    user = only_user(chain.end.result)
    if isinstance(user, ops.Cast) and chain.dtype == chain.wide != chain.narrow and user.dtype == chain.narrow:
        chain.end = user


def _scale(user: ops.Binary, normed: Value) -> tuple[Value | None, float]:
    """The weight in ``normed * weight`` or ``normed * (weight + offset)``."""
    for a, b in either(user):
        if a is not normed or not _is_vector(b, normed):
            continue
        plain = through_widening(b)
        add = made_by(plain, ops.Add)
        offset = scalar(add.b) if add is not None else None
        if add is not None and offset is not None:
            return through_widening(add.a), float(offset)
        return plain, 0.0
    return None, 0.0


def _is_vector(value: Value, like: Value) -> bool:
    """One number an element of the last axis."""
    shape = value.shape
    return bool(shape) and same_dim(shape[-1], like.shape[-1]) and same_dim(product(shape), shape[-1])


def _vector(value: Value | None, rw: Rewriter, at: Op) -> Value | None:
    if value is None or value.tensor.rank == 1:
        return value
    return rw.before(at).add(ops.Reshape(value, (value.shape[-1],)))
