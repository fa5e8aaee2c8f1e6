"""Values of loop kernels: emits the element (or vector of elements) of an IR value at an index, operands first.

Nothing is stored between operations. What an index does not vary with is emitted outside of the loop that varies
(`Nest.memo`), so statistics of a row are computed once a row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from torch_mlir.dialects import vector

from tilewright.codegen import reads as rd
from tilewright.codegen.index import Complex, Index, Poly, Var, at_most, lane_form, less, substitute_all
from tilewright.codegen.index_shapes import linear, size
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.loops_compute import compute, compute_dtype
from tilewright.codegen.mlir.loops_quant import Quantized, decoded
from tilewright.codegen.mlir.loops_scope import Nest
from tilewright.codegen.mlir.value import Val, constant, iota, mlir_type, shuffle
from tilewright.ir import Dim, Value, ops

Place = tuple[Value, Index]


class Evaluator(Quantized, Nest):
    """``value(v, index)`` emits one element of ``v``, or the lanes of a vector when the index has a vector variable."""

    def __init__(self, kernel: Kernel, buffers: Mapping[Value, Buffer], outputs: Mapping[Value, Buffer],
                 buffered: Collection[Value], lanes: int, unroll: int, moves: bool) -> None:
        """``buffered`` are the values whose rows are kept on the stack; ``moves``: no number is ever computed with."""
        super().__init__(kernel, lanes)
        self.buffers, self.outputs, self.buffered = buffers, outputs, buffered
        self.unroll, self.moves = unroll, moves

    def dtype(self, v: Value) -> str:
        """The element type of ``v`` in registers: narrow floats widen, unless they only move."""
        return v.dtype.value if self.moves else compute_dtype(v.dtype)

    def value(self, v: Value, index: Index) -> Val:
        """``v[index]``, of type ``dtype(v)``."""
        depth = max((i.depth for i in index), default=0)
        return self.memo((v, index), depth, lambda: self._make(v, index))

    def _make(self, v: Value, index: Index) -> Val:
        try:
            if v in self.buffers:
                return self._load(v, index)
            if v in self.buffered and (kept := self.kept(v, index)) is not None:
                return kept
            return self._evaluate(v, index)
        except Complex:
            return self._by_lane(v, index)

    def _evaluate(self, v: Value, index: Index) -> Val:
        op = v.owner
        assert op is not None
        if isinstance(op, ops.Quantize):
            return self.quantized(v, index)
        if rd.is_plain(op):
            places = rd.reads(op, index, self._pick)
            values = [self.value(*place) for place in places]
            if isinstance(op, rd.DECODING):
                return decoded(op, values).to(self.dtype(v))
            return values[0] if rd.is_move(op) else compute(op, values)
        dtype = self.dtype(op.result)
        match op:
            case ops.Full():
                return constant(op.value, dtype)
            case ops.SizeOf():
                return self.number(size(op.value)).to("i64").to(dtype)
            case ops.Iota():
                return self.numbers(size(op.start) + index[0] * op.step, dtype)
            case ops.Concat():
                return self._concat(op, index)
            case ops.Pad():
                return self._pad(op, index)
            case ops.Rope():
                return self._rope(op, index)
        return self.row_value(op, index)

    # --- memory -----------------------------------------------------------------------------------------------------

    def _load(self, v: Value, index: Index) -> Val:
        buffer = self.buffers[v]
        if v.dtype.bits < 8 or v.dtype.is_narrow_float:
            return self.load_narrow(v, buffer, linear(index, v.shape))
        return self.load(buffer, linear(index, v.shape)).to(self.dtype(v))

    def load(self, buffer: Buffer, place: Poly) -> Val:
        """The element at ``place``, or the vector when it has a vector variable; raises `Complex`."""
        var, stride, base = lane_form(place)
        if var is None:
            return buffer.load(self.number(base))
        if stride.constant == 1:
            return buffer.load(self.number(base), var.lanes, var.mask)
        return self._strided(buffer, var, stride, base)

    def _strided(self, buffer: Buffer, var: Var, stride: Poly, base: Poly) -> Val:
        start, step = self.number(base), self.number(stride)
        last = None if var.remaining is None else var.remaining - 1
        lanes = []
        for lane in range(var.lanes):
            at = constant(lane) if last is None else last.min(constant(lane))
            lanes.append(buffer.load(start + step * at))
        kind = mlir_type(lanes[0].dtype, var.lanes)
        return Val(vector.from_elements(kind, [lane.ir for lane in lanes]), lanes[0].dtype, var.lanes)

    def numbers(self, poly: Poly, dtype: str) -> Val:
        """An index as data."""
        var, stride, base = lane_form(poly)
        start = self.number(base).to("i64")
        if var is None:
            return start.to(dtype)
        steps = iota(var.lanes, "i64") * self.number(stride).to("i64")
        return (steps + start).to(dtype)

    def _by_lane(self, v: Value, index: Index) -> Val:
        """A vector made lane by lane through a few bytes of stack: where lanes go separate ways."""
        var = next(i.lane for i in index if i.lane is not None)
        spill = self.kernel.scratch(var.lanes, self.dtype(v))
        stop = constant(var.lanes) if var.remaining is None else var.remaining.min(constant(var.lanes))
        with self.loop(0, stop) as loop:
            one = self.variable(var.lo, var.hi, var.val + loop.index)
            spill.store(self.value(v, substitute_all(index, {var: Poly.of(one)})), loop.index)
        return spill.load(0, var.lanes)

    # --- data as an index -------------------------------------------------------------------------------------------

    def _pick(self, indices: Value, index: Index, dim: Dim) -> Poly:
        """The index that ``indices`` hold, made safe: a negative one counts from the end, the rest is clamped."""
        if any(i.lane for i in index):
            raise Complex
        n = size(dim)
        depth = max((i.depth for i in index), default=0)

        def make() -> Poly:
            raw, limit = self.value(indices, index).to("index"), self.number(n)
            wrapped = (raw < 0).select(raw + limit, raw)
            return Poly.of(self.variable(0, n - 1, wrapped.max(constant(0)).min(limit - 1)))

        return self.memo(("pick", indices, index, n), depth, make)

    # --- pieces -----------------------------------------------------------------------------------------------------

    def _concat(self, op: ops.Concat, index: Index) -> Val:
        at = index[op.axis]
        pieces = [p for p in rd.concat_pieces(op, index) if not (less(at, p[0]) or at_most(p[1], at))]
        return self._piece(pieces, at, _lanes(index))

    def _piece(self, pieces: list[tuple[Poly, Poly, Place]], at: Poly, lanes: int) -> Val:
        (_, stop, place), *others = pieces
        if not others:
            return self.value(*place).splat(lanes)
        if at.lane:
            raise Complex
        inside = self.number(at) < self.number(stop)
        return self._either(inside, lambda: self.value(*place), lambda: self._piece(others, at, lanes), lanes)

    def _either(self, condition: Val, yes: Callable[[], Val], no: Callable[[], Val], lanes: int) -> Val:
        sides = [self.fenced(lambda: yes().splat(lanes)), self.fenced(lambda: no().splat(lanes))]
        return self.kernel.branch(condition, *sides)[0]

    def _pad(self, op: ops.Pad, index: Index) -> Val:
        filler = constant(op.value, self.dtype(op.x))
        conditions: list[Val] = []
        for i, first, last in rd.pad_ranges(op, index):
            if less(i, first) or at_most(last, i):
                return filler
            if at_most(first, i) and less(i, last):
                continue
            if i.lane:
                raise Complex
            conditions += [self.number(i) >= self.number(first), self.number(i) < self.number(last)]
        if not conditions:
            return self.value(*rd.pad_read(op, index))
        inside = conditions[0]
        for condition in conditions[1:]:
            inside = inside & condition
        return self._either(inside, lambda: self.value(*rd.pad_read(op, index)), lambda: filler, _lanes(index))

    # --- rope -------------------------------------------------------------------------------------------------------

    def _rope(self, op: ops.Rope, index: Index) -> Val:
        d, turned = index[3], Poly.of(rd.rotated(op))
        if at_most(turned, d):
            return self.value(op.x, index)
        if not less(d, turned):
            if d.lane:
                raise Complex
            condition = self.number(d) < self.number(turned)
            sides = (lambda: self._turn(op, index)), (lambda: self.value(op.x, index))
            return self._either(condition, *sides, _lanes(index))
        return self._turn(op, index)

    def _turn(self, op: ops.Rope, index: Index) -> Val:
        """x * cos + (the signed partner of x) * sin."""
        x = self.value(op.x, index)
        cos, sin = (self.value(v, rd.rope_angle(op, index)) for v in (op.cos, op.sin))
        partner = self._half(op, index) if op.style == "half" else self._interleaved(op, index, x)
        return x * cos + partner * sin

    def _half(self, op: ops.Rope, index: Index) -> Val:
        d, half = index[3], Poly.of(rd.rotated(op) // 2)
        if less(d, half):
            return -self.value(op.x, rd.rope_partner(op, index, low=True))
        if at_most(half, d):
            return self.value(op.x, rd.rope_partner(op, index, low=False))
        if d.lane:
            raise Complex
        condition = self.number(d) < self.number(half)
        low = lambda: -self.value(op.x, rd.rope_partner(op, index, low=True))  # noqa: E731
        high = lambda: self.value(op.x, rd.rope_partner(op, index, low=False))  # noqa: E731
        return self._either(condition, low, high, _lanes(index))

    def _interleaved(self, op: ops.Rope, index: Index, x: Val) -> Val:
        var = index[3].lane
        if var is None:
            other = self.value(op.x, rd.rope_partner(op, index, low=False))
            return (self.number(index[3]) % constant(2)).eq(0).select(-other, other)
        if index[3] != Poly.of(var):
            raise Complex
        return _swap_pairs(x)

    def fresh(self, v: Value, index: Index) -> Val:
        try:
            return self._evaluate(v, index)
        except Complex:
            return self._by_lane(v, index)


def _swap_pairs(x: Val) -> Val:
    """(a, b) -> (-b, a) in each pair of lanes; vectors start at even elements."""
    return shuffle(x, -x, [lane - 1 if lane % 2 else x.lanes + lane + 1 for lane in range(x.lanes)])


def _lanes(index: Index) -> int:
    return next((i.lane.lanes for i in index if i.lane is not None), 0)

