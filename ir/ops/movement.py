"""``core``: operations that move elements without computing."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright.ir.core import Env, Op, Value
from tilewright.ir.ops import numerics as num
from tilewright.ir.ops.shapes import axis_of, broadcast, expect_broadcast, expect_dim, expect_rank, shape_text
from tilewright.ir.types import Dim, DType, Shape, TensorType, Type, as_dim, product, same_dim


class Reshape(Op):
    """The same elements in row-major order under another shape."""

    name = "core.reshape"
    x: Value
    shape: tuple[Dim, ...]

    def infer(self) -> tuple[Type, ...]:
        fits = same_dim(product(self.x.shape), product(self.shape))
        self.expect(fits, f"{shape_text(self.x.shape)} does not reshape to {shape_text(self.shape)}")
        return (self.x.tensor.with_shape(self.shape),)

    def evaluate(self, env: Env, x: Any) -> Any:
        return x.reshape(env.shape(self.shape))


class Transpose(Op):
    """Axis ``i`` of the result is axis ``perm[i]`` of x."""

    name = "core.transpose"
    x: Value
    perm: tuple[int, ...]

    def infer(self) -> tuple[Type, ...]:
        fits = sorted(self.perm) == list(range(self.x.tensor.rank))
        self.expect(fits, f"{self.perm} is no permutation of rank {self.x.tensor.rank}")
        return (self.x.tensor.with_shape([self.x.shape[i] for i in self.perm]),)

    def evaluate(self, env: Env, x: Any) -> Any:
        return np.ascontiguousarray(x.transpose(self.perm)).reshape([x.shape[i] for i in self.perm])


class Broadcast(Op):
    """x repeated to ``shape`` by NumPy's rules."""

    name = "core.broadcast"
    x: Value
    shape: tuple[Dim, ...]

    def infer(self) -> tuple[Type, ...]:
        expect_broadcast(self, "x", self.x.shape, self.shape)
        return (self.x.tensor.with_shape(self.shape),)

    def evaluate(self, env: Env, x: Any) -> Any:
        return np.ascontiguousarray(np.broadcast_to(x, env.shape(self.shape)))


class Slice(Op):
    """``x[starts[0]:stops[0]:steps[0], ...]``, one triple an axis; ``0 <= start <= stop <= size``, ``step >= 1``."""

    name = "core.slice"
    x: Value
    starts: tuple[Dim, ...]
    stops: tuple[Dim, ...]
    steps: tuple[int, ...]

    def infer(self) -> tuple[Type, ...]:
        for what in (self.starts, self.stops, self.steps):
            self.expect(len(what) == self.x.tensor.rank, f"needs {self.x.tensor.rank} starts, stops and steps")
        self.expect(all(s >= 1 for s in self.steps), f"steps must be positive, got {self.steps}")
        for a, b, n in zip(self.starts, self.stops, self.x.shape):
            bad = isinstance(a, int) and isinstance(b, int) and not 0 <= a <= b
            bad = bad or (isinstance(b, int) and isinstance(n, int) and b > n)
            self.expect(not bad, f"range {a}:{b} is outside of size {n}")
        sizes = [as_dim((as_dim(b - a) + s - 1) // s) for a, b, s in zip(self.starts, self.stops, self.steps)]
        return (self.x.tensor.with_shape(sizes),)

    def evaluate(self, env: Env, x: Any) -> Any:
        index = zip(env.shape(self.starts), env.shape(self.stops), self.steps)
        return np.ascontiguousarray(x[tuple(slice(a, b, s) for a, b, s in index)])


class Concat(Op):
    """The operands one after the other along ``axis``."""

    name = "core.concat"
    xs: tuple[Value, ...]
    axis: int

    def infer(self) -> tuple[Type, ...]:
        self.expect(len(self.xs) > 0, "needs at least one operand")
        first = self.xs[0].tensor
        axis = axis_of(self, self.axis, first.rank)
        total: Any = 0
        for x in self.xs:
            expect_rank(self, "operand", x.shape, first.rank)
            self.expect(x.dtype == first.dtype, f"element types differ: {first.dtype.value} and {x.dtype.value}")
            for i, (got, want) in enumerate(zip(x.shape, first.shape)):
                if i != axis:
                    expect_dim(self, f"axis {i}", got, want)
            total = total + x.shape[axis]
        return (first.with_shape((*first.shape[:axis], as_dim(total), *first.shape[axis + 1 :])),)

    def evaluate(self, env: Env, *xs: Any) -> Any:
        return np.concatenate(xs, self.axis)


class Pad(Op):
    """x with ``low[i]`` elements of ``value`` before and ``high[i]`` after axis ``i``."""

    name = "core.pad"
    x: Value
    low: tuple[Dim, ...]
    high: tuple[Dim, ...]
    value: float | int | bool = 0

    def infer(self) -> tuple[Type, ...]:
        fits = len(self.low) == len(self.high) == self.x.tensor.rank
        self.expect(fits, f"needs {self.x.tensor.rank} low and high pads")
        fits = all(p >= 0 for p in (*self.low, *self.high) if isinstance(p, int))
        self.expect(fits, "pads are not negative: a slice takes elements away")
        return (self.x.tensor.with_shape([as_dim(a + n + b) for a, n, b in zip(self.low, self.x.shape, self.high)]),)

    def evaluate(self, env: Env, x: Any) -> Any:
        widths = list(zip(env.shape(self.low), env.shape(self.high)))
        return np.pad(x, widths, constant_values=self.value)


def _expect_index(op: Op, index: Value) -> None:
    op.expect(index.dtype in (DType.i64, DType.i32), f"indices must be i64 or i32, got {index.dtype.value}")


class Gather(Op):
    """``numpy.take(x, indices, axis)``: slices of x picked by ``indices`` (any rank, each in ``[0, size)``)."""

    name = "core.gather"
    x: Value
    indices: Value
    axis: int

    def infer(self) -> tuple[Type, ...]:
        axis = axis_of(self, self.axis, self.x.tensor.rank)
        _expect_index(self, self.indices)
        return (self.x.tensor.with_shape((*self.x.shape[:axis], *self.indices.shape, *self.x.shape[axis + 1 :])),)

    def evaluate(self, env: Env, x: Any, indices: Any) -> Any:
        return np.take(x, indices, self.axis)


class TakeAlong(Op):
    """``numpy.take_along_axis``: element ``[.., indices[i.., j, ..], ..]`` along ``axis``, other axes as in indices."""

    name = "core.take_along"
    x: Value
    indices: Value
    axis: int

    def infer(self) -> tuple[Type, ...]:
        axis_of(self, self.axis, self.x.tensor.rank)
        expect_rank(self, "indices", self.indices.shape, self.x.tensor.rank)
        _expect_index(self, self.indices)
        return (self.x.tensor.with_shape(self.indices.shape),)

    def evaluate(self, env: Env, x: Any, indices: Any) -> Any:
        region = tuple(slice(None) if i == self.axis else slice(n) for i, n in enumerate(indices.shape))
        return np.take_along_axis(x[region], indices, self.axis)


def _index_shape(op: Op, x: Value, indices: tuple[Value, ...]) -> Shape:
    op.expect(0 < len(indices) <= x.tensor.rank, f"{len(indices)} indices for rank {x.tensor.rank}")
    shape: Shape = ()
    for index in indices:
        _expect_index(op, index)
        shape = broadcast(op, shape, index.shape)
    return shape


class GatherND(Op):
    """``x[i0, i1, ...]``: the indices broadcast together and pick along the leading axes; the other axes follow."""

    name = "core.gather_nd"
    x: Value
    indices: tuple[Value, ...]

    def infer(self) -> tuple[Type, ...]:
        shape = _index_shape(self, self.x, self.indices)
        return (self.x.tensor.with_shape((*shape, *self.x.shape[len(self.indices) :])),)

    def evaluate(self, env: Env, x: Any, *indices: Any) -> Any:
        return x[indices]


class ScatterND(Op):
    """A copy of x with ``x[i0, i1, ...]`` set to ``updates``, or increased by them when ``accumulate``."""

    name = "core.scatter_nd"
    x: Value
    indices: tuple[Value, ...]
    updates: Value
    accumulate: bool = False

    def infer(self) -> tuple[Type, ...]:
        shape = (*_index_shape(self, self.x, self.indices), *self.x.shape[len(self.indices) :])
        self.expect(self.updates.dtype == self.x.dtype, "updates must have the element type of x")
        expect_broadcast(self, "updates", self.updates.shape, shape)
        return (self.x.tensor,)

    def evaluate(self, env: Env, x: Any, *rest: Any) -> Any:
        *indices, updates = rest
        if self.accumulate:
            total = num.wide(x).copy()
            np.add.at(total, tuple(indices), num.wide(updates))
            return total.astype(x.dtype)
        out = x.copy()
        out[tuple(indices)] = updates
        return out


class ScatterAlong(Op):
    """A copy of x with element ``[.., indices[i.., j, ..], ..]`` along ``axis`` set to ``src[i.., j, ..]``."""

    name = "core.scatter_along"
    x: Value
    indices: Value
    src: Value
    axis: int

    def infer(self) -> tuple[Type, ...]:
        axis_of(self, self.axis, self.x.tensor.rank)
        expect_rank(self, "indices", self.indices.shape, self.x.tensor.rank)
        expect_rank(self, "src", self.src.shape, self.x.tensor.rank)
        _expect_index(self, self.indices)
        self.expect(self.src.dtype == self.x.dtype, "src must have the element type of x")
        return (TensorType(self.x.shape, self.x.dtype),)

    def evaluate(self, env: Env, x: Any, indices: Any, src: Any) -> Any:
        out = x.copy()
        region = tuple(slice(None) if i == self.axis else slice(n) for i, n in enumerate(indices.shape))
        np.put_along_axis(out[region], indices, src[tuple(map(slice, indices.shape))], self.axis)
        return out
