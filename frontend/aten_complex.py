"""ATen: complex numbers, as rotary embeddings use them. A complex tensor is pairs (real, imaginary) along a last axis.

A table of its own: what it lacks is refused, also where the plain table knows the operation for real numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tilewright.frontend import aten_core, aten_move
from tilewright.frontend.symbols import COMPLEX
from tilewright.frontend.table import Context, Lower
from tilewright.ir import ops
from tilewright.ir.core import Value

aten = torch.ops.aten


def is_complex(node: Any) -> bool:
    """Whether a node's value is a complex tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype in COMPLEX


def polar(c: Context, size: Value, angle: Value) -> Value:
    parts = [c(ops.Mul, size, c(kind, angle)) for kind in (ops.Cos, ops.Sin)]
    return c.concat([c.unsqueeze(p, -1) for p in parts], size.tensor.rank)


def view(c: Context, x: Value) -> Value:
    return x


def mul(c: Context, x: Any, y: Any) -> Value:
    """``(a + ib)(p + iq) = (ap - bq) + i(aq + bp)``; a real factor scales both parts."""
    both = [is_complex(arg) for arg in c.node.args]
    if both != [True, True]:
        pair, factor = (x, y) if both[0] else (y, x)
        return aten_core.binary(c, ops.Mul, pair, c.unsqueeze(factor, -1) if isinstance(factor, Value) else factor)
    (a, b), (p, q) = ([c.slice(v, v.tensor.rank - 1, i, 1) for i in (0, 1)] for v in (x, y))
    real = c(ops.Sub, c(ops.Mul, a, p), c(ops.Mul, b, q))
    imaginary = c(ops.Add, c(ops.Mul, a, q), c(ops.Mul, b, p))
    return c.concat([real, imaginary], c.out.rank - 1)


def slice_(c: Context, x: Value, dim: int = 0, *rest: Any) -> Value:
    return aten_move.slice_(c, x, dim if dim >= 0 else dim + x.tensor.rank - 1, *rest)


COMPLEX_TABLE: dict[Any, Lower] = {
    aten.polar.default: polar,
    aten.view_as_complex.default: view,
    aten.view_as_real.default: view,
    aten.mul.Tensor: mul,
    aten.slice.Tensor: slice_,
    aten.alias.default: aten_core.as_type,
    aten.clone.default: aten_core.as_type,
    aten._to_copy.default: aten_core.as_type,
    aten.to.dtype: aten_core.as_type,
    aten.to.device: aten_core.as_type,
    aten.to.dtype_layout: aten_core.as_type,
    aten.contiguous.default: aten_core.as_type,
    aten.view.default: aten_move.reshape,
    aten.reshape.default: aten_move.reshape,
    aten.unsqueeze.default: aten_move.reshape,
    aten.expand.default: aten_move.expand,
}
