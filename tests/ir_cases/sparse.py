"""Sparse layers, weight by weight."""

import numpy as np
import torch

from tests.ir_cases.case import Case, integers, normal
from tilewright.ir import DType
from tilewright.ir import ops as o


def _sparse_linear(x, values, columns):
    y = torch.zeros(*x.shape[:-1], len(values), dtype=x.dtype)
    for n in range(values.shape[0]):
        for r in range(values.shape[1]):
            y[..., n] += x[..., int(columns[n, r])] * values[n, r]
    return y.numpy().astype(np.float32)


CASES = [
    Case(o.SparseLinear, [normal(2, 3, 7), normal(5, 2), integers(5, 2, low=0, high=7, dtype=DType.i16)], _sparse_linear),
    Case(o.SparseLinear, [normal(3, 9), normal(4, 3), integers(4, 3, low=0, high=9, dtype=DType.i32)], _sparse_linear,
         note="i32"),
]  # fmt: skip
