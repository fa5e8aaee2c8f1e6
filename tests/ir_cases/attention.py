"""Attention, against PyTorch's own and against loops that follow the definition word by word."""

import math

import torch
import torch.nn.functional as F

from tests.ir_cases.case import Case, flags, normal
from tilewright.ir import DType
from tilewright.ir import ops as o


def sees(query: int, key: int, causal=True, window=-1, window_right=-1, chunk=0) -> bool:
    """Whether the query at one position attends to the key at another."""
    if causal and key > query:
        return False
    if window > 0 and query - key >= window:
        return False
    if window_right > 0 and key - query >= window_right:
        return False
    return chunk <= 0 or key // chunk == query // chunk


def loops(q, k, v, where, keep=None, bias=None, sinks=None, scale=1.0, softcap=0.0, **rule):
    """Attention of each head of each query alone; ``where[b][s]`` is the position of a query."""
    out = torch.zeros(*q.shape[:3], v.shape[3])
    for b in range(q.shape[0]):
        for s in range(q.shape[1]):
            for h in range(q.shape[2]):
                g = h * k.shape[2] // q.shape[2]
                scores, values = [], []
                for t in range(k.shape[1]):
                    if not sees(where[b][s], t, **rule) or (keep is not None and not keep[b][h][s][t]):
                        continue
                    score = float(q[b, s, h].double() @ k[b, t, g].double()) * scale
                    score = softcap * math.tanh(score / softcap) if softcap else score
                    scores.append(score + (0 if bias is None else float(bias[b][h][s][t])))
                    values.append(v[b, t, g].double())
                extra = [] if sinks is None else [float(sinks[h])]
                if scores:
                    weights = torch.tensor([*scores, *extra], dtype=torch.float64).softmax(0)[: len(scores)]
                    out[b, s, h] = (weights[:, None] * torch.stack(values)).sum(0).float()
    return out


def _heads_first(*xs):
    return [x.transpose(1, 2) for x in xs]


def _sdpa(scale=None, causal=False):
    def attention(q, k, v, mask=None, bias=None):
        extra = mask if mask is not None else bias
        y = F.scaled_dot_product_attention(
            *_heads_first(q, k, v), attn_mask=extra, is_causal=causal, scale=scale, enable_gqa=True
        )
        return y.transpose(1, 2)

    return attention


def _by_loops(**options):
    def attention(q, k, v, mask=None, bias=None, sinks=None, padding=None):
        b, s, h, t = q.shape[0], q.shape[1], q.shape[2], k.shape[1]
        keep = torch.ones(b, h, s, t, dtype=torch.bool)
        keep = keep if mask is None else keep & mask
        keep = keep if padding is None else keep & padding[:, None, None, :]
        bias = None if bias is None else bias.expand(b, h, s, t)
        where = [[t - s + i for i in range(s)]] * b
        return loops(q, k, v, where, keep, bias, sinks, **{"causal": False} | options)

    return attention


_QKV = [normal(2, 5, 4, 8), normal(2, 5, 2, 8), normal(2, 5, 2, 6)]
_CHUNK = [normal(2, 3, 4, 8), normal(2, 7, 2, 8), normal(2, 7, 2, 8)]  # three queries at the end of seven keys
_RULES = [
    {"causal": True},
    {"causal": True, "window": 3},
    {"causal": True, "chunk": 4},
    {"window": 2, "window_right": 2},
    {"causal": True, "softcap": 2.0, "scale": 0.5},
]


def _ruled(inputs, rule, note):
    return Case(
        o.Attention, inputs, _by_loops(**rule), rule, note=f"{note}-{'-'.join(f'{k}={v}' for k, v in rule.items())}"
    )


CASES = [
    Case(o.Attention, _QKV, _sdpa(), {"scale": 8**-0.5}, note="gqa"),
    Case(o.Attention, _QKV, _sdpa(0.3, causal=True), {"scale": 0.3, "causal": True}, note="causal"),
    Case(o.Attention, [*_CHUNK, None, normal(1, 4, 3, 7)], _sdpa(1.0), note="bias"),
    Case(
        o.Attention,
        [normal(1, 130, 2, 16), normal(1, 130, 1, 16), normal(1, 130, 1, 16)],
        _sdpa(0.25, causal=True),
        {"scale": 0.25, "causal": True},
        (DType.f32,),
        "long",
    ),
    *(_ruled(_QKV, rule, "square") for rule in _RULES),
    *(_ruled(_CHUNK, rule, "offset") for rule in _RULES),
    _ruled([*_CHUNK, flags(2, 1, 3, 7)], {"causal": True}, "mask"),
    _ruled([*_CHUNK, None, None, normal(4)], {"causal": True}, "sinks"),
    _ruled([*_CHUNK, None, None, None, flags(2, 7)], {"causal": True}, "padding"),
    _ruled(
        [*_CHUNK, flags(3, 7), normal(3, 7), normal(4), flags(2, 7)],
        {"causal": True, "window": 4, "softcap": 3.0},
        "all",
    ),
]
