"""Sparse layers, weight by weight."""

import numpy as np
import torch

from tests.ir_cases.case import Case, f32, fixed, integers, normal, positive
from tilewright.ir import DType
from tilewright.ir import ops as o


def _sparse_linear(x, values, columns):
    y = torch.zeros(*x.shape[:-1], len(values), dtype=x.dtype)
    for n in range(values.shape[0]):
        for r in range(values.shape[1]):
            y[..., n] += x[..., int(columns[n, r])] * values[n, r]
    return y.numpy().astype(np.float32)


def _threshold(x, limits, by=None):
    size = (x if by is None else by).abs()
    return torch.where(size < limits, torch.zeros(()), x)


EDGES = fixed([[0.5, -0.5, 0.25, -0.0, float("inf"), float("-inf"), float("nan"), 0.49]])

CASES = [
    Case(o.SparseLinear, [normal(2, 3, 7), normal(5, 2), integers(5, 2, low=0, high=7, dtype=DType.i16)], _sparse_linear),
    Case(o.SparseLinear, [normal(3, 9), normal(4, 3), integers(4, 3, low=0, high=9, dtype=DType.i32)], _sparse_linear,
         note="i32"),
    Case(o.Threshold, [EDGES, f32(fixed([0.5]))], _threshold, note="edges"),
    Case(o.Threshold, [normal(3, 2, 7), f32(fixed(0.5))], _threshold, note="scalar"),
    Case(o.Threshold, [normal(3, 7), f32(positive(7))], _threshold, note="channels"),
    Case(o.Threshold, [normal(3, 7), f32(positive(7)), normal(3, 7)], _threshold, note="by"),
]  # fmt: skip
