"""``mul(silu(linear(x, @gate)), linear(x, @up))`` -> ``nn.gated_linear(x, @gate, @up) {act="silu"}``.

Also of one layer whose result is cut in two (``gate_up_proj``): its weight is cut instead, without loading it. Weights
may be dequantized ones, and with rounded inputs results that are cast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tilewright.ir import Dim, DType, Module, Op, Rewriter, Value, ops, rewrite, same_dim
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.canonical_moves import is_zero
from tilewright.passes.match import either, made_by, replace, used_once
from tilewright.passes.stored import cut, cut_bias, form
from tilewright.passes.weights import as_weight

_ACTIVATIONS: dict[type[Op], str] = {ops.Silu: "silu", ops.Gelu: "gelu", ops.GeluTanh: "gelu_tanh", ops.Relu: "relu"}


@dataclass(frozen=True)
class FuseGateUp(Pass):
    """Finds gated feed-forward layers: two products with the input of which one gates the other."""

    name: ClassVar[str] = "fuse-gate-up"

    def run(self, module: Module, ctx: PassContext) -> bool:
        return ctx.take(rewrite(module, gated, functions=module.entries()))


@dataclass
class Half:
    """A linear layer, or the rows ``[start, stop)`` of one."""

    linear: ops.Linear
    start: Dim
    stop: Dim

    @property
    def is_whole(self) -> bool:
        return is_zero(self.start) and same_dim(self.stop, self.linear.weight.shape[0])


def gated(op: ops.Binary, rw: Rewriter) -> None:
    if not isinstance(op, ops.Mul):
        return
    for active, plain in either(op):
        act = active.owner
        if type(act) not in _ACTIVATIONS or not isinstance(act, ops.Unary) or not used_once(active):
            continue
        gate, up = half(act.x), half(plain)
        if gate is None or up is None:
            continue
        reason = mismatch(gate, up)
        if reason is not None:
            rw.skip(op, reason)
            continue
        (w1, b1), (w2, b2) = rows(rw, op, gate), rows(rw, op, up)
        new = rw.before(op).add(ops.GatedLinear(gate.linear.x, w1, w2, b1, b2, act=_ACTIVATIONS[type(act)]))
        kind = op.result.dtype
        replace(rw, op, new if new.dtype is kind else rw.before(op).add(ops.Cast(new, kind)))
        return


def half(value: Value) -> Half | None:
    """The linear layer, or the part of one, that makes ``value``, maybe of f32 that is cast to fewer bits."""
    cast = made_by(value, ops.Cast)
    if cast is not None and cast.x.dtype is DType.f32 and value.dtype.is_float and used_once(value):
        return half(cast.x)
    linear = made_by(value, ops.Linear)
    if linear is not None:
        return Half(linear, 0, linear.weight.shape[0])
    part = made_by(value, ops.Slice)
    linear = made_by(part.x, ops.Linear) if part is not None else None
    if part is None or linear is None or any(s != 1 for s in part.steps):
        return None
    lead = zip(part.starts[:-1], part.stops[:-1], part.x.shape[:-1])
    whole = all(is_zero(a) and same_dim(b, n) for a, b, n in lead)
    return Half(linear, part.starts[-1], part.stops[-1]) if whole else None


def mismatch(gate: Half, up: Half) -> str | None:
    """Why the two cannot be one layer."""
    g, u = gate.linear, up.linear
    if g.x is not u.x:
        return "gate and up have different inputs"
    if g.weight.dtype != u.weight.dtype:
        return "gate and up have different element types"
    forms = {form(g.weight), form(u.weight)}
    if None not in forms and len(forms) > 1:
        return "gate and up are quantized in different ways"
    for part in (gate, up):
        users = [user for user in part.linear.result.users if not isinstance(user, ops.Slice)]
        if part.is_whole and not used_once(part.linear.result):
            return "the product has another user"
        if not part.is_whole and (users or form(part.linear.weight) is None):
            return "the product that is cut has another user, or a computed weight"
        if not part.is_whole and part.linear.bias is not None and as_weight(part.linear.bias, 1) is None:
            return "the bias that is cut is computed"
    return None


def rows(rw: Rewriter, op: Op, part: Half) -> tuple[Value, Value | None]:
    """Weight and bias of the part, for a layer in front of ``op``."""
    linear = part.linear
    if part.is_whole:
        return linear.weight, linear.bias
    start, stop = int(part.start), int(part.stop)
    return cut(rw.before(op), rw.module, linear.weight, start, stop), cut_bias(rw.module, linear.bias, start, stop)
