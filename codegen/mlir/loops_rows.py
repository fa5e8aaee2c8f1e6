"""Reductions and normalisations of loop kernels.

A statistic of a row is a value of that row alone: a loop over the row, emitted where the row's index is known. When
that index is a scalar the loop runs over vectors along the row; when it is a vector (a reduction across rows) each lane
keeps its own total.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from tilewright.codegen import reads as rd
from tilewright.codegen.index import Index, Poly, Var
from tilewright.codegen.index_shapes import linear, size
from tilewright.codegen.mlir import math
from tilewright.codegen.mlir.builder import Buffer
from tilewright.codegen.mlir.loops_compute import combine, compute_dtype, fold_lanes, identity
from tilewright.codegen.mlir.loops_scope import Group, Nest
from tilewright.codegen.mlir.value import Val, constant
from tilewright.ir import Dim, DType, Op, Return, Value, ops, product

STACK_ROW = 64 * 1024
"""Bytes of the longest row that is kept on the stack."""
_FEW = 4

Element = Callable[[Index], Group]
Step = Callable[[Group, Group], Group]


def keeps_exponentials(op: ops.Softmax) -> bool:
    """Whether the exponentials of a row are kept between the sum and the result: on the stack or where that will be."""
    return rd.is_trailing(op) and (fits_stack(op.x) or _only_leaves(op))


def _only_leaves(op: ops.Softmax) -> bool:
    """Whether the result is one of the kernel's, as wide as it is computed, and nothing else reads it."""
    result, kernel = op.result, op.parent
    if kernel is None or result.dtype not in (DType.f32, DType.f64):
        return False
    return all(isinstance(user, Return) for user in result.users) and kernel.returns.count(result) == 1


def fits_stack(v: Value) -> bool:
    """Whether a row of ``v`` in its compute type is static and short enough for the stack."""
    last = v.shape[-1] if v.shape else 1
    return isinstance(last, int) and last * max(v.dtype.size, 4) <= STACK_ROW


def _exp(x: Val) -> Val:
    from tilewright.codegen.mlir.loops_compute import _libm

    return _libm("exp")(x) if x.dtype == "f64" else math.exp(x)


class Rows(Nest):
    """The part of the evaluator that loops over rows."""

    buffered: Collection[Value]
    unroll: int
    buffers: Mapping[Value, Buffer]
    outputs: Mapping[Value, Buffer]
    """Where arguments lie and results go."""

    def value(self, v: Value, index: Index) -> Val:
        raise NotImplementedError

    def load(self, buffer: Buffer, place: Poly) -> Val:
        raise NotImplementedError

    def numbers(self, poly: Poly, dtype: str) -> Val:
        raise NotImplementedError

    def row_value(self, op: Op, index: Index) -> Val:
        """One element of a reduction or a normalisation."""
        row = rd.row_of(op, index)
        match op:
            case ops.Reduce():
                return self._reduced(op, row)
            case ops.ArgMax():
                return self._argmax(op, row)
            case ops.Softmax():
                return self._softmax(op, index, row)
            case ops.RmsNorm():
                return self._rms_norm(op, index, row)
        return self._layer_norm(op, index, row)

    # --- loops over a row -------------------------------------------------------------------------------------------

    def fold(self, extents: Sequence[Dim], row: Index, start: Callable[[int], Group], element: Element,
             step: Step) -> Group:
        """All elements of a row combined: ``start(lanes)`` is neutral, ``element(at)`` gives one, ``step`` combines."""
        lane = next((i.lane for i in row if i.lane is not None), None)
        if lane is not None:
            return self._fold_scalars(extents, (), start(lane.lanes), element, step)
        last = extents[-1]
        if isinstance(last, int) and last < _FEW:
            return self._fold_scalars(extents, (), start(0), element, step)
        groups = [start(self.lanes) for _ in range(self._streams(last))]
        groups = self._fold_vectors(extents, (), groups, start(self.lanes), element, step)
        while len(groups) > 1:
            groups = [step(a, b) for a, b in zip(groups[::2], groups[1::2])]
        return fold_lanes(groups[0], step)

    def _streams(self, extent: Dim) -> int:
        """Independent totals, so that one addition need not wait for the last."""
        count = self.unroll
        while isinstance(extent, int) and count > 1 and extent < count * self.lanes:
            count //= 2
        return count

    def _fold_scalars(self, extents: Sequence[Dim], at: Index, group: Group, element: Element, step: Step) -> Group:
        if not extents:
            new = element(at)
            return step(group, [n.splat(g.lanes) for n, g in zip(new, group)])

        def body(i: Var, inner: Group) -> Group:
            return self._fold_scalars(extents[1:], (*at, Poly.of(i)), inner, element, step)

        return self.each(Poly(), size(extents[0]), body, group)

    def _fold_vectors(self, extents: Sequence[Dim], at: Index, groups: list[Group], neutral: Group, element: Element,
                      step: Step) -> list[Group]:
        if len(extents) > 1:
            flat, width = [v for g in groups for v in g], len(neutral)

            def outer(i: Var, carry: Group) -> Group:
                inner = [carry[j:j + width] for j in range(0, len(carry), width)]
                new = self._fold_vectors(extents[1:], (*at, Poly.of(i)), inner, neutral, element, step)
                return [v for g in new for v in g]

            out = self.each(Poly(), size(extents[0]), outer, flat)
            return [out[j:j + width] for j in range(0, len(out), width)]

        def body(i: Var, group: Group) -> Group:
            new = [v.splat(self.lanes) for v in element((*at, Poly.of(i)))]
            if i.mask is not None:
                new = [i.mask.select(v, n) for v, n in zip(new, neutral)]
            return step(group, new)

        return self.sweep(Poly(), size(extents[0]), body, groups)

    def _statistic(self, op: Op, name: str, row: Index, make: Callable[[], Val]) -> Val:
        depth = max((i.depth for i in row), default=0)
        return self.memo((op, name, row), depth, make)

    def _total(self, op: Op, fn: str, row: Index, dtype: str, element: Callable[[Index, Val], Val]) -> Val:
        """``fn`` over one row of ``element(index, x)``."""
        x = op.operands[0]

        def one(at: Index) -> Group:
            place = rd.row_element(op, row, at)
            return [element(at, self.value(x, place))]

        def step(a: Group, b: Group) -> Group:
            return [combine(fn, a[0], b[0])]

        return self.fold(rd.fold_extents(op), row, lambda lanes: [identity(fn, dtype, lanes)], one, step)[0]

    def count(self, op: Op, dtype: str) -> Val:
        """Elements of a row as a number."""
        n = size(product(rd.fold_extents(op)))
        return constant(n.constant, dtype) if n.constant is not None else self.number(n).to("i64").to(dtype)

    # --- reductions -------------------------------------------------------------------------------------------------

    def _reduced(self, op: ops.Reduce, row: Index) -> Val:
        dtype = compute_dtype(op.x.dtype)
        if op.fn in ("any", "all"):
            return self._total(op, op.fn, row, "bool", lambda at, x: x.to("bool"))
        if op.fn == "mean" and dtype != "bool" and not op.x.dtype.is_float:
            total = self._total(op, "sum", row, "i64", lambda at, x: x.to("i64"))
            return (total.to("f64") / self.count(op, "f64").splat(total.lanes)).to(dtype)
        total = self._total(op, op.fn, row, dtype, lambda at, x: x)
        return total / self.count(op, dtype) if op.fn == "mean" and dtype != "bool" else total

    def _argmax(self, op: ops.ArgMax, row: Index) -> Val:
        dtype = compute_dtype(op.x.dtype)
        dtype = "u8" if dtype == "bool" else dtype

        def start(lanes: int) -> Group:
            return [identity("max", dtype, lanes), constant((1 << 31) - 1, "i32", lanes)]

        def one(at: Index) -> Group:
            return [self.value(op.x, rd.row_element(op, row, at)).to(dtype), self.numbers(at[0], "i32")]

        return self.fold(rd.fold_extents(op), row, start, one, _greater)[1].to("i64")

    # --- normalisations ---------------------------------------------------------------------------------------------

    def _rms_norm(self, op: ops.RmsNorm, index: Index, row: Index) -> Val:
        def scale() -> Val:
            dtype = compute_dtype(op.x.dtype)
            total = self._total(op, "sum", row, dtype, lambda at, x: x * x)
            return 1.0 / (total / self.count(op, dtype) + op.eps).sqrt()

        y = self.value(op.x, index) * self._statistic(op, "scale", row, scale)
        for place in rd.row_weights(op, index):
            weight = self.value(*place)
            y = y * (weight + op.offset if op.offset else weight)
        return y

    def _layer_norm(self, op: ops.LayerNorm | ops.GroupNorm, index: Index, row: Index) -> Val:
        dtype = compute_dtype(op.x.dtype)

        def mean() -> Val:
            return self._total(op, "sum", row, dtype, lambda at, x: x) / self.count(op, dtype)

        def scale() -> Val:
            # The mean first: the difference of squares would cancel.
            centre = self._statistic(op, "mean", row, mean)
            total = self._total(op, "sum", row, dtype, lambda at, x: (x - centre) * (x - centre))
            return 1.0 / (total / self.count(op, dtype) + op.eps).sqrt()

        factor = self._statistic(op, "scale", row, scale)
        y = (self.value(op.x, index) - self._statistic(op, "mean", row, mean)) * factor
        weights = rd.row_weights(op, index)
        if op.weight is not None:
            y = y * self.value(*weights[0])
        return y if op.bias is None else y + self.value(*weights[-1])

    def _softmax(self, op: ops.Softmax, index: Index, row: Index) -> Val:
        dtype = compute_dtype(op.x.dtype)
        kept = None if any(i.lane for i in row) or not keeps_exponentials(op) else self._exponentials(op, row)

        def top() -> Val:
            highest = self._total(op, "max", row, dtype, lambda at, x: x)
            return (highest.abs() < float("inf")).select(highest, constant(0.0, dtype, highest.lanes))

        def exponential(at: Index, x: Val) -> Val:
            e = _exp(x - self._statistic(op, "top", row, top))
            if kept is not None:
                self._keep(kept, op, row, at, e)
            return e

        def scale() -> Val:
            total = self._total(op, "sum", row, dtype, exponential)
            return 1.0 / total.eq(0.0).select(constant(1.0, dtype, total.lanes), total)

        factor = self._statistic(op, "scale", row, scale)
        if kept is not None:
            place = index[-1] if fits_stack(op.x) else linear(index, op.x.shape)
            return self.load(kept, place) * factor
        return _exp(self.value(op.x, index) - self._statistic(op, "top", row, top)) * factor

    def _exponentials(self, op: ops.Softmax, row: Index) -> Buffer:
        """Where the exponentials of a row are kept."""
        if not fits_stack(op.x):
            return self.outputs[op.result]
        size, depth = whole(op.x.shape[-1], self.lanes), max((i.depth for i in row), default=0)
        return self.memo((op, "exp", row), depth, lambda: self.kernel.scratch(size, compute_dtype(op.x.dtype)))

    def _keep(self, kept: Buffer, op: ops.Softmax, row: Index, at: Index, value: Val) -> None:
        if fits_stack(op.x):
            kept.store(value, self.number(at[0]))
            return
        lane = at[0].lane
        place = self.number(linear(rd.row_element(op, row, at), op.x.shape))
        kept.store(value, place, None if lane is None else lane.mask)

    # --- rows on the stack ------------------------------------------------------------------------------------------

    def kept(self, v: Value, index: Index) -> Val | None:
        """``v[index]`` from its row on the stack, which is filled first; None when the index is no plain row."""
        *lead, at = index
        row = tuple(lead)
        if any(i.lane for i in row) or not fits_stack(v):
            return None
        depth = max((i.depth for i in row), default=0)
        if depth >= at.depth:
            return None
        buffer = self.memo((v, "row", row), depth, lambda: self._fill(v, row))
        return self.load(buffer, at)

    def _fill(self, v: Value, row: Index) -> Buffer:
        buffer = self.kernel.scratch(whole(v.shape[-1], self.lanes), compute_dtype(v.dtype))

        def body(i: Var, group: Group) -> Group:
            value = self.fresh(v, (*row, Poly.of(i))).splat(self.lanes)
            buffer.store(value, i.val)
            return []

        self.sweep(Poly(), size(v.shape[-1]), body, [[]])
        return buffer

    def fresh(self, v: Value, index: Index) -> Val:
        """``v[index]`` computed, not taken from the stack."""
        raise NotImplementedError


def whole(count: Dim, lanes: int) -> int:
    """Room for whole vectors."""
    return -(-int(count) // lanes) * lanes


def _greater(a: Group, b: Group) -> Group:
    """The larger (value, place); a NaN is larger than all, and of equals the first wins."""
    (x, i), (y, j) = a, b
    better, same = y > x, y.eq(x)
    if x.is_float:
        nan, new = x.ne(x), y.ne(y)
        better, same = (better & ~nan) | (new & ~nan), same | (nan & new)
    take = better | (same & (j < i))
    return [take.select(y, x), take.select(j, i)]

