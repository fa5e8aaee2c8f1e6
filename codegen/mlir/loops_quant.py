"""Quantization in loop kernels: codes and scales of a row in two passes, and codes back to numbers.

The first pass finds the largest magnitude of each group and keeps the row when it had to be computed; the second
multiplies and rounds. ``quant.dequantize`` is an elementwise operation, so a gather from a quantized table touches
only the rows it needs.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilewright.codegen import reads as rd
from tilewright.codegen.index import Complex, Index, Poly, Var, divisor, floor_div, lane_form
from tilewright.codegen.index_shapes import linear, size
from tilewright.codegen.mlir.builder import Buffer
from tilewright.codegen.mlir.loops_rows import Rows, fits_stack, whole
from tilewright.codegen.mlir.loops_scope import Group
from tilewright.codegen.mlir.narrow import F8_FACTORS, widen_f4e2m1, widen_f8, widen_f8e8m0
from tilewright.codegen.mlir.value import Val, constant, fma, literals, shuffle
from tilewright.codegen.packing import code_planes
from tilewright.ir import DType, Value, ops, product

_LEVELS = 127.0
_LARGEST = 2.0**127
_MAGIC = 1.5 * 2.0**23
"""Added to a small number this leaves the nearest integer, ties to even, in the lowest bits."""


def keeps_row(op: ops.Quantize) -> bool:
    """Whether the row is written to the stack while its largest magnitude is found: when it is no argument."""
    return op.x.owner is not None and fits_stack(op.x)


def decoded(op: ops.Dequantize | ops.Lookup | ops.Expand, values: Sequence[Val]) -> Val:
    """What ``op`` makes of codes (or of what they are looked up as), scale and zero or offset: f32, or an i32."""
    number, *rest = values
    if isinstance(op, ops.Lookup):
        return number * rest[0].splat(number.lanes) if rest else number
    number = number if number.is_float else number.to("i32")
    scale, *shift = rest
    if op.zero is not None:
        number = number - shift[0].to("i32").splat(number.lanes)
    if isinstance(op, ops.Expand):
        return (number * scale.to("i32").splat(number.lanes)).max(-128).min(127)
    product = number.to("f32") * scale.splat(number.lanes)
    return product if op.offset is None else product + shift[0].splat(number.lanes)


def stored(dtype: DType) -> str:
    """Element type of the memory of a tensor: bytes, where the builder has no such type."""
    return "u8" if dtype.bits < 8 or dtype.is_narrow_float else dtype.value


class Quantized(Rows):
    """The part of the evaluator that quantizes rows, and reads numbers of few bits."""

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

    # --- few bits -----------------------------------------------------------------------------------------------------

    def load_narrow(self, v: Value, buffer: Buffer, place: Poly) -> Val:
        """The number at ``place``, or a vector of them: f32 of floats, i8 or u8 of integers."""
        dtype, code = v.dtype, self._code(v, buffer, place)
        if dtype is DType.f4e2m1:
            return widen_f4e2m1(code)
        if dtype is DType.f8e8m0:
            return widen_f8e8m0(code)
        if dtype.is_narrow_float:
            return widen_f8(code.to("i16"), dtype.value) * F8_FACTORS[dtype.value]
        if dtype.value.startswith("u"):
            return code
        half = 1 << (dtype.bits - 1)
        return Val(((code ^ half) - half).ir, "i8", code.lanes)

    def _code(self, v: Value, buffer: Buffer, place: Poly) -> Val:
        """Its bits, as u8. What codes of 3 bits have above two bits lies behind all of what is below, see `pack_codes`."""
        if v.dtype.bits == 8:
            return self.load(buffer, place)
        low, *high = code_planes(v.dtype.bits)
        code = self._bits(buffer, place, low)
        if not high:
            return code
        behind = self.number(floor_div(size(product(v.shape)) + (8 // low - 1), 8 // low))
        return code | self._bits(buffer.at(behind), place, *high) << low

    def _bits(self, buffer: Buffer, place: Poly, bits: int) -> Val:
        """So many bits for each element, neighbours from the lowest bits of a byte to the highest."""
        var, apart = place.lane, 8 // bits
        if var is None:
            start = self.number(place)
            byte, shift = buffer.load(start // apart).to("i32"), (start % apart).to("i32") * bits
        else:
            if lane_form(place)[1].constant != 1 or divisor(place) % apart:
                raise Complex
            remaining = None if var.remaining is None else (var.remaining + (apart - 1)) // apart
            mask = None if remaining is None else self.kernel.mask(remaining, var.lanes // apart)
            loaded = buffer.load(self.number(place) // apart, var.lanes // apart, mask)
            byte = shuffle(loaded, loaded, [lane // apart for lane in range(var.lanes)]).to("i32")
            shift = literals([bits * (lane % apart) for lane in range(var.lanes)], "i32")
        return (byte.shift_right_logical(shift) & ((1 << bits) - 1)).to("u8")
