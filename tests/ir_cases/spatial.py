"""Convolution, pooling, resizing."""

import torch.nn.functional as F

from tests.ir_cases.case import Case, normal
from tilewright.ir import ops as o

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
ADAPTIVE = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def _conv(x, w, stride, padding, dilation, groups=1, bias=True):
    inputs = [normal(2, *x), normal(*w), normal(w[0]) if bias else None]
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    conv = CONV[len(stride)]
    return Case(
        o.Conv, inputs, lambda a, b, c: conv(a, b, c, stride, padding, dilation, groups), attrs, note=f"{x}-{w}"
    )


def _transposed(x, w, stride, padding, dilation, extra, groups=1):
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "output_padding": extra}
    conv = TRANSPOSED[len(stride)]
    return Case(
        o.Conv,
        [normal(2, *x), normal(*w), normal(w[1] * groups)],
        lambda a, b, c: conv(a, b, c, stride, padding, extra, groups, dilation),
        attrs | {"transposed": True},
        note=f"transposed-{x}-{w}",
    )


def _max_pool(x, k, s, p, d, ceil=False):
    attrs = {"kernel": k, "stride": s, "padding": p, "dilation": d, "ceil_mode": ceil}
    return Case(
        o.MaxPool, [normal(2, *x)], lambda a: MAX_POOL[len(k)](a, k, s, p, d, ceil), attrs, note=f"{x}-{k}-{ceil}"
    )


def _avg_pool(x, k, s, p, count):
    attrs = {"kernel": k, "stride": s, "padding": p, "count_include_pad": count}
    pool = AVG_POOL[len(k)]
    return Case(o.AvgPool, [normal(2, *x)], lambda a: pool(a, k, s, p, False, count), attrs, note=f"{x}-{k}-{count}")


def _resize(x, size, mode="nearest", align=False):
    own = {"bilinear": {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]}.get(mode, mode)
    corners = align if mode == "bilinear" else None
    attrs = {"size": size, "mode": mode, "align_corners": align}
    return Case(
        o.Resize,
        [normal(2, *x)],
        lambda a: F.interpolate(a, size, mode=own, align_corners=corners),
        attrs,
        note=f"{x}-{size}-{mode}-{align}",
    )


CASES = [
    _conv((4, 11), (6, 4, 3), (1,), (1,), (1,)),
    _conv((4, 11), (6, 2, 3), (2,), (2,), (2,), groups=2, bias=False),
    _conv((3, 9, 7), (5, 3, 3, 2), (2, 1), (1, 0), (1, 2)),
    _conv((4, 6, 5), (8, 1, 3, 3), (1, 1), (1, 1), (1, 1), groups=4),
    _conv((2, 5, 4, 6), (3, 2, 2, 3, 1), (1, 2, 1), (0, 1, 0), (1, 1, 1)),
    _transposed((4, 7), (4, 3, 3), (2,), (1,), (1,), (1,)),
    _transposed((4, 5, 3), (4, 2, 3, 2), (3, 2), (1, 0), (1, 2), (2, 1), groups=2),
    _transposed((2, 2, 3, 2), (2, 3, 2, 2, 2), (1, 1, 2), (0, 1, 0), (1, 1, 1), (0, 0, 0)),
    _max_pool((3, 10), (3,), (2,), (1,), (1,)),
    _max_pool((3, 10, 9), (3, 2), (2, 2), (1, 1), (2, 1)),
    _max_pool((3, 10, 9), (3, 2), (2, 2), (1, 0), (1, 1), True),
    _max_pool((1, 5, 5), (2, 2), (3, 3), (1, 1), (1, 1), True),
    _avg_pool((3, 10), (3,), (2,), (1,), True),
    _avg_pool((3, 10, 9), (3, 2), (2, 3), (1, 1), False),
    _avg_pool((3, 6, 5, 4), (2, 2, 2), (2, 2, 2), (0, 0, 0), True),
    *(
        Case(o.AdaptiveAvgPool, [normal(2, 3, *x)], lambda a, s=s: ADAPTIVE[len(s)](a, s), {"size": s}, note=f"{x}-{s}")
        for x, s in [((7,), (3,)), ((7, 5), (1, 1)), ((7, 10), (4, 3)), ((5, 6, 7), (2, 3, 4))]
    ),
    *(
        _resize(x, s, m, a)
        for x, s in [((3, 5), (9,)), ((3, 5, 6), (8, 4)), ((1, 1, 7), (4, 1))]
        for m, a in [("nearest", False), ("bilinear", False), ("bilinear", True)]
    ),
    _resize((2, 3, 4, 5), (5, 3, 7), "bilinear"),
]
