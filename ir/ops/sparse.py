"""``sparse``: layers whose weights are few numbers and where they belong."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright.ir.core import Env, Op, Value
from tilewright.ir.ops import numerics as num
from tilewright.ir.ops.shapes import expect_dim, expect_rank
from tilewright.ir.types import Dim, DType, Type, as_dim


class SparseLinear(Op):
    """``y[..., n] = sum over r of x[..., columns[n, r]] * values[n, r]``: ``[..., K]`` -> ``[..., N]``.

    As many weights in each row: values and columns are ``[N, R]`` (the ELLPACK layout). Columns (i16 or i32) lie in
    ``[0, K)`` and may repeat, their products add up. Sums are of f32; the result has the element type of x.
    """

    name = "sparse.linear"
    x: Value
    values: Value
    columns: Value

    def infer(self) -> tuple[Type, ...]:
        self.expect(self.x.dtype.is_float and self.x.tensor.rank > 0, f"x must be float, of rank 1 or more: {self.x.type}")
        self.expect(self.values.dtype.is_float, f"values are {self.values.dtype.value}")
        self.expect(self.columns.dtype in (DType.i16, DType.i32), f"columns are {self.columns.dtype.value}, not i16 or i32")
        expect_rank(self, "values", self.values.shape, 2)
        expect_rank(self, "columns", self.columns.shape, 2)
        for axis, (a, b) in enumerate(zip(self.columns.shape, self.values.shape)):
            expect_dim(self, f"columns, axis {axis}", a, b)
        return (self.x.tensor.with_shape((*self.x.shape[:-1], self.values.shape[0])),)

    def evaluate(self, env: Env, x: Any, values: Any, columns: Any) -> Any:
        wide, weights = num.wide(x).astype(np.float32), values.astype(np.float32)
        if columns.size and not 0 <= columns.min() <= columns.max() < x.shape[-1]:
            raise ValueError(f"a column is outside the {x.shape[-1]} of x")
        total = np.zeros((*x.shape[:-1], len(values)), np.float32)
        for r in range(values.shape[1]):
            total += wide[..., columns[:, r]] * weights[:, r]
        return total.astype(x.dtype)

    def flops(self) -> Dim:
        return as_dim(2 * self.result.tensor.elements * self.values.shape[1])
