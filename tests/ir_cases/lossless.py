"""Compressed bf16 weights, decoded number by number in plain Python."""

import numpy as np
import torch

from tests.ir_cases.case import Case
from tilewright.ir import DType
from tilewright.ir import ops as o
from tilewright.passes.compress import choose_base, compress, exponent_counts

ROWS, COLUMNS = 18, 5


def parts():
    weight = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(DType.bf16.np)
    weight[3, 2], weight[17, 4] = 0, -1e30
    base, escapes = choose_base(exponent_counts(weight))
    assert escapes > 2
    return compress(weight, base, escapes)


def _decompress(low, planes, escapes, starts, base):
    out = torch.empty(ROWS, COLUMNS)
    for block in range(-(-ROWS // 16)):
        at = int(starts[block])
        for step in range(-(-COLUMNS // 4)):
            for i in range(64):
                code = sum((int(planes[block, step, j]) >> i & 1) << j for j in range(3))
                exponent = int(base[0]) + code
                if code == 7:
                    exponent, at = int(escapes[at]), at + 1
                row, column = 16 * block + 4 * (i // 16) + i % 8 // 2, 4 * step + 2 * (i // 8 % 2) + i % 2
                byte = int(low[block, step, i])
                if row < ROWS and column < COLUMNS:
                    size = 2.0 ** (exponent - 127) * (1 + (byte & 127) / 128) if exponent else 0.0
                    out[row, column] = -size if byte & 128 else size
    return out.bfloat16().float().numpy().astype(DType.bf16.np)


def given(array):
    return lambda rng, dtype: array


CASES = [Case(o.Decompress, [given(p) for p in parts()], _decompress, {"rows": ROWS, "columns": COLUMNS})]
