"""``moe``: mixtures of experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright.ir.core import Env, Op, Value
from tilewright.ir.ops import numerics as num
from tilewright.ir.ops.shapes import expect_dim, expect_rank
from tilewright.ir.types import Dim, Type, as_dim, product


class Experts(Op):
    """Sum over each token's K chosen experts of ``weights[t, j] * down(act(gate(x)) * up(x))`` (Shazeer et al. 2017).

    x ``[T, H]``, indices ``[T, K]`` (i64), weights ``[T, K]``, gate_up ``[E, 2I, H]`` (gate rows first; ``[E, I, H]``
    when not gated), down ``[E, H, I]``, biases ``[E, 2I]`` and ``[E, H]`` -> ``[T, H]``.
    """

    name = "moe.experts"
    x: Value
    indices: Value
    weights: Value
    gate_up: Value
    down: Value
    gate_up_bias: Value | None = None
    down_bias: Value | None = None
    act: str = "silu"
    gated: bool = True

    def infer(self) -> tuple[Type, ...]:
        self.expect(self.act in num.ACTIVATIONS, f"unknown activation {self.act!r}; there are {list(num.ACTIVATIONS)}")
        for what, v, rank in (("x", self.x, 2), ("indices", self.indices, 2), ("gate_up", self.gate_up, 3)):
            expect_rank(self, what, v.shape, rank)
        experts, inner, hidden = self.gate_up.shape
        expect_dim(self, "gate_up, axis 2", hidden, self.x.shape[1])
        expect_dim(self, "down, axis 0", self.down.shape[0], experts)
        expect_dim(self, "down, axis 2", self.down.shape[2] * (2 if self.gated else 1), inner)
        return (self.x.tensor,)

    def evaluate(self, env: Env, x: Any, indices: Any, weights: Any, up: Any, down: Any, ub: Any, db: Any) -> Any:
        out = np.zeros(x.shape, num.wide(x).dtype)
        for e in range(up.shape[0]):
            tokens, slots = np.nonzero(indices == e)
            h = num.wide(x)[tokens] @ num.wide(up[e]).T
            h = h if ub is None else h + num.wide(ub[e])
            if self.gated:
                gate, lin = np.split(h, 2, -1)
                h = num.ACTIVATIONS[self.act](gate) * lin
            else:
                h = num.ACTIVATIONS[self.act](h)
            y = h @ num.wide(down[e]).T
            y = y if db is None else y + num.wide(db[e])
            np.add.at(out, tokens, y * num.wide(weights)[tokens, slots, None])
        return out.astype(x.dtype)

    def flops(self) -> Dim:
        return as_dim(2 * product(self.indices.shape) * self.x.shape[1] * (self.gate_up.shape[1] + self.down.shape[2]))
