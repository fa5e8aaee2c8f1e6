"""``sparse``: layers whose weights are few numbers and where they belong, and inputs that are made zero."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright.ir.core import Env, Op, Value
from tilewright.ir.ops import numerics as num
from tilewright.ir.ops.elementwise import Elementwise
from tilewright.ir.ops.shapes import broadcast, expect_dim, expect_rank
from tilewright.ir.types import Dim, DType, TensorType, Type, as_dim


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


class Threshold(Elementwise):
    """x where ``|by| >= limits``, else 0; ``by`` is x unless given. A NaN in ``by`` and a NaN limit keep x.

    The limits are f32, one for all (``[]`` or ``[1]``) or one for each of the last axis (``[K]``); x and ``by`` broadcast.
    In front of a linear layer it lets the layer leave out what belongs to zeros: TEAL (arXiv:2408.14690), CATS
    (arXiv:2404.08763).
    """

    name = "sparse.threshold"
    x: Value
    limits: Value
    by: Value | None = None

    def infer(self) -> tuple[Type, ...]:
        self.expect(self.x.dtype.is_float, f"x is {self.x.dtype.value}")
        self.expect(self.limits.dtype is DType.f32, f"limits are {self.limits.dtype.value}, not f32")
        self.expect(self.limits.tensor.rank < 2, f"limits are {self.limits.type}, not one or a row")
        shape = broadcast(self, self.x.shape, self.limits.shape)
        if self.by is not None:
            self.expect(self.by.dtype.is_float, f"by is {self.by.dtype.value}")
            shape = broadcast(self, shape, self.by.shape)
        return (TensorType(shape, self.x.dtype),)

    def evaluate(self, env: Env, x: Any, limits: Any, by: Any) -> Any:
        with np.errstate(invalid="ignore"):
            small = np.abs(num.wide(x if by is None else by)) < limits
        return np.where(small, x.dtype.type(0), x)

    def flops(self) -> Dim:
        return 0
