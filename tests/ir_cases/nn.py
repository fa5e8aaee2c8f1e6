"""Layers."""

import numpy as np
import torch
import torch.nn.functional as F

from tests.ir_cases.case import INTS, Case, f32, fixed, integers, normal
from tilewright.ir import DType
from tilewright.ir import ops as o

ACTS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def _gated(act):
    def layer(x, g, u, gb=None, ub=None):
        return ACTS[act](F.linear(x, g, gb)) * F.linear(x, u, ub)

    return layer


def _experts(act, gated):
    def layer(x, indices, weights, up, down, ub=None, db=None):
        rows = []
        for t, row in enumerate(x):
            total = torch.zeros_like(row)
            for e, w in zip(indices[t].tolist(), weights[t]):
                h = up[e] @ row + (0 if ub is None else ub[e])
                a, *b = h.chunk(2) if gated else (h,)
                h = ACTS[act](a) * b[0] if gated else ACTS[act](a)
                total = total + w * (down[e] @ h + (0 if db is None else db[e]))
            rows.append(total)
        return torch.stack(rows)

    return layer


def _rope(style):
    """By complex multiplication: element pairs turn by the angle whose cosine and sine are given once a pair."""

    def turn(x, cos, sin):
        r = cos.shape[-1]
        first, second = (slice(0, r // 2), slice(r // 2, r)) if style == "half" else (slice(0, r, 2), slice(1, r, 2))
        z = torch.complex(x[..., first], x[..., second]) * torch.complex(cos[..., first], sin[..., first])[:, :, None]
        out = x.clone()
        out[..., first], out[..., second] = z.real, z.imag
        return out

    return turn


def _angles(fn, style, *shape):
    """cos or sin, one value an element, equal for the two elements of a pair."""

    def make(rng, dtype):
        b, s, r = shape
        angle = np.arange(b * s * (r // 2)).reshape(b, s, r // 2) * 0.37
        both = np.concatenate([angle, angle], -1) if style == "half" else np.repeat(angle, 2, -1)
        return fn(both).astype(np.float32)

    return make


def _rope_case(style, batch, rotated, note):
    shape = (batch, 5, rotated)
    inputs = [normal(2, 5, 3, 8), _angles(np.cos, style, *shape), _angles(np.sin, style, *shape)]
    return Case(o.Rope, inputs, _rope(style), {"style": style}, note=note)


_NORM = [normal(3, 4, 9, scale=2.0), normal(9), normal(9)]
_MOE = [normal(6, 4), fixed([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0], [1, 2]], DType.i64), normal(6, 2)]

CASES = [
    Case(o.Matmul, [normal(3, 5), normal(5, 7)], torch.matmul),
    Case(o.Matmul, [normal(2, 1, 3, 5), normal(4, 5, 7)], torch.matmul, note="broadcast"),
    Case(o.Matmul, [integers(3, 5), integers(5, 2)], torch.matmul, dtypes=INTS, note="ints"),
    Case(o.Linear, [normal(2, 3, 7), normal(5, 7)], F.linear),
    Case(o.Linear, [normal(7), normal(5, 7), normal(5)], F.linear, note="bias"),
    Case(o.Linear, [normal(3, 7), f32(normal(5, 7)), normal(5)], F.linear, note="wide"),
    *(Case(o.GatedLinear, [normal(3, 7), normal(5, 7), normal(5, 7)], _gated(a), {"act": a}, note=a) for a in ACTS),
    Case(o.GatedLinear, [normal(7), normal(5, 7), normal(5, 7), normal(5), normal(5)], _gated("silu"), note="bias"),
    Case(o.GatedLinear, [normal(2, 7), f32(normal(5, 7)), f32(normal(5, 7))], _gated("silu"), note="wide"),
    Case(o.Embedding, [integers(3, 4, low=0, high=9, dtype=DType.i64), normal(9, 5)], F.embedding),
    Case(o.Softmax, [normal(3, 9, scale=9.0)], lambda x: x.softmax(1), {"axis": 1}),
    Case(o.Softmax, [normal(3, 9, 2)], lambda x: x.softmax(0), {"axis": 0}, note="axis-0"),
    Case(
        o.Softmax,
        [fixed([[1.0, float("-inf")], [float("-inf")] * 2])],
        lambda x: torch.tensor([[1.0, 0], [0, 0]]),
        {"axis": 1},
        note="empty-row",
    ),
    Case(o.LayerNorm, _NORM, lambda x, w, b: F.layer_norm(x, (9,), w, b, 1e-5)),
    Case(o.LayerNorm, _NORM[:1], lambda x: F.layer_norm(x, (9,), eps=0.1), {"eps": 0.1}, note="plain"),
    Case(o.LayerNorm, _NORM[:2], lambda x, w: F.layer_norm(x, (9,), w), note="no-bias"),
    Case(o.RmsNorm, _NORM[:2], lambda x, w: F.rms_norm(x, (9,), w, 1e-6)),
    Case(o.RmsNorm, _NORM[:1], lambda x: F.rms_norm(x, (9,), eps=0.1), {"eps": 0.1}, note="plain"),
    Case(o.RmsNorm, _NORM[:2], lambda x, w: F.rms_norm(x, (9,), w + 1, 1e-6), {"offset": 1.0}, note="offset"),
    Case(o.GroupNorm, [normal(2, 6, 5), normal(6), normal(6)], lambda x, w, b: F.group_norm(x, 3, w, b), {"groups": 3}),
    Case(o.GroupNorm, [normal(2, 4, 3, 2)], lambda x: F.group_norm(x, 2), {"groups": 2}, note="plain"),
    *(_rope_case(s, b, r, f"{s}-{b}-{r}") for s in ("half", "interleaved") for b, r in ((1, 8), (2, 8), (2, 4))),
    *(
        Case(o.Experts, [*_MOE, normal(3, 10, 4), normal(3, 4, 5)], _experts(a, True), {"act": a}, note=a)
        for a in ("silu", "gelu")
    ),
    Case(
        o.Experts,
        [*_MOE, normal(3, 5, 4), normal(3, 4, 5), normal(3, 5), normal(3, 4)],
        _experts("relu", False),
        {"act": "relu", "gated": False},
        note="plain",
    ),
    Case(
        o.Experts,
        [*_MOE, normal(3, 10, 4), normal(3, 4, 5), normal(3, 10), normal(3, 4)],
        _experts("silu", True),
        note="bias",
    ),
]
