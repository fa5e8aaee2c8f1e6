"""Quantization in loop kernels: codes and scales of a row in two passes, and codes back to numbers.

The first pass finds the largest magnitude of each group and keeps the row when it had to be computed; the second
multiplies and rounds. ``quant.dequantize`` is an elementwise operation, so a gather from a quantized table touches
only the rows it needs.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilewright.codegen.mlir import loops_reads as rd
from tilewright.codegen.mlir.builder import Buffer
from tilewright.codegen.mlir.loops_index import Complex, Index, Poly, Var, is_even, lane_form
from tilewright.codegen.mlir.loops_rows import Rows, fits_stack, whole
from tilewright.codegen.mlir.loops_scope import Group
from tilewright.codegen.mlir.loops_shapes import linear
from tilewright.codegen.mlir.value import Val, constant, fma, shuffle
from tilewright.ir import DType, Value, ops

_LEVELS = 127.0
_LARGEST = 2.0**127
_MAGIC = 1.5 * 2.0**23
"""Added to a small number this leaves the nearest integer, ties to even, in the lowest bits."""


def keeps_row(op: ops.Quantize) -> bool:
    """Whether the row is written to the stack while its largest magnitude is found: when it is no argument."""
    return op.x.owner is not None and fits_stack(op.x)


def dequantize(op: ops.Dequantize, values: Sequence[Val]) -> Val:
    """(codes - zero) * scale, or codes * scale + offset, in f32."""
    codes, scale, *shift = values
    number = codes.to("i32")
    if op.zero is not None:
        number = number - shift[0].to("i32").splat(number.lanes)
    product = number.to("f32") * scale.splat(number.lanes)
    return product if op.offset is None else product + shift[0].splat(number.lanes)


class Quantized(Rows):
    """The part of the evaluator that quantizes rows, and reads numbers of four bits."""

    def quantized(self, v: Value, index: Index) -> Val:
        """A code or a scale: ``v`` is one of the results of a `Quantize`."""
        op = v.owner
        assert isinstance(op, ops.Quantize)
        *lead, at = index
        row = tuple(lead)
        if any(i.lane for i in row):
            raise Complex
        if v is op.results[1]:
            return self._scale(op, row, at, 0)
        group = rd.quantize_group(op, at)
        factor = self._scale(op, row, group, 1)
        x = self.load(self._row_buffer(op, row), at) if self._keeps(op) else self.value(op.x, index)
        x = x.to("f32")
        return fma(x, factor.splat(x.lanes), constant(_MAGIC, "f32", x.lanes)).bitcast("i32").to("i8")

    def _keeps(self, op: ops.Quantize) -> bool:
        return keeps_row(op) and op.x not in self.buffered

    def _scale(self, op: ops.Quantize, row: Index, group: Poly, part: int) -> Val:
        """The scale of a group, or (``part`` 1) what its numbers are multiplied by."""
        depth = max((i.depth for i in row), default=0)
        if not op.group:
            pair = self.memo((op, "scale", row), depth, lambda: self._pair(op, row, Poly()))
            return pair[part]
        tables = self.memo((op, "scales", row), depth, lambda: self._table(op, row))
        return self.load(tables[part], group)

    def _table(self, op: ops.Quantize, row: Index) -> tuple[Buffer, Buffer]:
        """The scales of all groups of a row and their inverses."""
        count = op.results[1].shape[-1]
        tables = tuple(self.kernel.scratch(whole(count, self.lanes), "f32") for _ in range(2))

        def body(i: Var, carry: Group) -> Group:
            for table, value in zip(tables, self._pair(op, row, Poly.of(i))):
                table.store(value, i.val)
            return []

        self.each(Poly(), Poly.of(int(count)), body, [])
        return tables[0], tables[1]

    def _pair(self, op: ops.Quantize, row: Index, group: Poly) -> tuple[Val, Val]:
        """A group's scale and its inverse, by a pass over the group."""
        kept = self._row_buffer(op, row) if self._keeps(op) else None

        bits = op.x in self.buffers and op.x.dtype is DType.bf16
        dtype = "i16" if bits else "f32"

        def element(at: Index) -> Group:
            place = group * op.group + at[0]
            if bits:  # without their signs they are ordered as integers are
                raw = self.load(self.buffers[op.x], linear((*row, place), op.x.shape))
                return [raw.bitcast("i16") & 0x7FFF]
            x = self.value(op.x, (*row, place)).to("f32")
            if kept is not None:
                kept.store(x, self.number(place))
            return [x.abs()]

        top = self.fold([op.group or op.x.shape[-1]], row, lambda lanes: [constant(0, dtype, lanes)], element,
                        lambda a, b: [a[0].max(b[0])])[0]  # fmt: skip
        if bits:
            top = top.bitcast("bf16").to("f32")
        empty = top.eq(0.0)
        one = constant(1.0, "f32", top.lanes)
        inverse = constant(_LEVELS, "f32", top.lanes) / empty.select(one, top)
        return empty.select(one, top / _LEVELS), inverse.min(_LARGEST)

    def _row_buffer(self, op: ops.Quantize, row: Index) -> Buffer:
        depth = max((i.depth for i in row), default=0)
        size = whole(op.x.shape[-1], self.lanes) + self.lanes  # the last vector of a group may reach beyond it
        return self.memo((op, "kept", row), depth, lambda: self.kernel.scratch(size, "f32"))

    # --- four bits ----------------------------------------------------------------------------------------------------

    def load_nibbles(self, buffer: Buffer, place: Poly, signed: bool) -> Val:
        """The number of four bits at ``place``, or a vector of them: as i8 or u8. Two share a byte, the low one first."""
        var, lanes = place.lane, 0 if place.lane is None else place.lane.lanes
        if var is None:
            start = self.number(place)
            byte, high = buffer.load(start // 2), (start % 2).ne(0)
            nibbles = high.select(byte >> 4, byte & 15)
        else:
            if lane_form(place)[1].constant != 1 or not is_even(place):
                raise Complex
            remaining = None if var.remaining is None else (var.remaining + 1) // 2
            mask = None if remaining is None else self.kernel.mask(remaining, lanes // 2)
            pairs = buffer.load(self.number(place) // 2, lanes // 2, mask)
            nibbles = _interleave(pairs & 15, pairs >> 4)
        if not signed:
            return nibbles
        return Val(((nibbles ^ 8) - 8).ir, "i8", lanes)


def _interleave(a: Val, b: Val) -> Val:
    return shuffle(a, b, [lane // 2 + (a.lanes if lane % 2 else 0) for lane in range(2 * a.lanes)])
