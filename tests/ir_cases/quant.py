"""Quantizing and dequantizing, a group at a time in plain Python loops."""

import numpy as np
import torch

from tests.ir_cases.case import Case, f32, fixed, integers, normal
from tilewright.ir import DType
from tilewright.ir import ops as o

I8 = integers(5, 12, low=-127, high=128, dtype=DType.i8)
U8 = integers(5, 12, low=0, high=256, dtype=DType.u8)
I4 = integers(5, 12, low=-8, high=8, dtype=DType.i4)
U4 = integers(5, 12, low=0, high=16, dtype=DType.u4)
ZERO = integers(5, 3, low=0, high=16, dtype=DType.u8)


def _quantize(size):
    def rows(x):
        codes, scales = torch.empty(x.shape, dtype=torch.int8), []
        for row, out in zip(x.reshape(-1, x.shape[-1]), codes.reshape(-1, x.shape[-1])):
            for group, place in zip(row.split(size), out.split(size)):
                scale = group.abs().max() / 127 if group.any() else torch.tensor(1.0)
                place.copy_(torch.round(group / scale).clamp(-127, 127))
                scales.append(scale)
        return codes, torch.stack(scales).reshape(*x.shape[:-1], -1)

    return rows


def _dequantize(codes, scale, zero=None):
    size = codes.shape[-1] // scale.shape[-1]
    wide = codes.to(torch.float32)
    out = torch.empty_like(wide)
    for n in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            shift = 0.0 if zero is None else float(zero[n, k // size])
            out[n, k] = (wide[n, k] - shift) * scale[n, k // size].float()
    return out


def scales(groups, dtype=DType.f32):
    return lambda rng, own: (rng.standard_normal((5, groups)) * 0.01).astype(np.float32).astype(dtype.np)


CASES = [
    Case(o.Quantize, [normal(2, 3, 12)], _quantize(12)),
    Case(o.Quantize, [normal(3, 12, scale=50.0)], _quantize(4), {"group": 4}, note="group"),
    Case(o.Quantize, [fixed(np.zeros((2, 8)))], _quantize(8), note="zeros"),
    Case(o.Dequantize, [I8, scales(1)], _dequantize, note="i8"),
    Case(o.Dequantize, [I4, scales(3, DType.f16)], _dequantize, note="i4"),
    Case(o.Dequantize, [U8, scales(3, DType.f16), ZERO], _dequantize, note="u8"),
    Case(o.Dequantize, [U4, f32(scales(3)), ZERO], _dequantize, note="u4"),
    Case(o.Dequantize, [I8, scales(2)], _dequantize, {"dtype": DType.bf16}, note="bf16"),
]
