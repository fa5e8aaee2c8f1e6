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
U2 = integers(5, 12, low=0, high=4, dtype=DType.u2)
I2 = integers(5, 12, low=-2, high=2, dtype=DType.i2)
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


def _dequantize(codes, scale, zero=None, offset=None):
    size = codes.shape[-1] // scale.shape[-1]
    wide = codes.to(torch.float32)
    out = torch.empty_like(wide)
    for n in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            shift = 0.0 if zero is None else float(zero[n, k // size])
            out[n, k] = (wide[n, k] - shift) * scale[n, k // size].float()
            out[n, k] += 0.0 if offset is None else offset[n, k // size]
    return out


def _lookup(codes, table, scale=None):
    out = torch.empty(codes.shape)
    for n in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            times = 1.0 if scale is None else scale[n, k // (codes.shape[1] // scale.shape[1])].float()
            out[n, k] = table[n if len(table) > 1 else 0, int(codes[n, k])] * times
    return out


def _expand(codes, scale, zero=None):
    wide = _dequantize(codes, scale, zero)
    return wide.clamp(-128, 127).to(torch.int8)


def narrow(dtype, groups=None):
    """Codes [5, 12], or scales [5, groups], of a narrow float type."""
    return lambda rng, own: np.exp2(rng.integers(-3, 3, (5, groups or 12))).astype(dtype.np)


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
    Case(o.Dequantize, [U2, scales(3, DType.f16), ZERO], _dequantize, note="u2"),
    Case(o.Dequantize, [I2, scales(1)], _dequantize, note="i2"),
    Case(o.Dequantize, [narrow(DType.f8e4m3), scales(1)], _dequantize, note="f8e4m3"),
    Case(o.Dequantize, [narrow(DType.f8e5m2), scales(1)], _dequantize, note="f8e5m2"),
    Case(o.Dequantize, [narrow(DType.f4e2m1), narrow(DType.f8e8m0, 3)], _dequantize, note="mxfp4"),
    Case(o.Dequantize, [U4, f32(scales(3)), None, f32(scales(3))], _dequantize, note="u4 with offsets"),
    Case(o.Lookup, [U4, f32(normal(5, 16))], _lookup, note="a table a row"),
    Case(o.Lookup, [U2, f32(normal(1, 4)), scales(3, DType.f16)], _lookup, note="one table, scales"),
    Case(o.Expand, [I4, integers(5, 3, low=1, high=30, dtype=DType.u8)], _expand),
    Case(o.Expand, [U4, integers(5, 3, low=1, high=16, dtype=DType.u8), ZERO], _expand, note="zero"),
]
