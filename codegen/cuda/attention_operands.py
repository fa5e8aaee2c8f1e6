"""Queries, keys and values of an attention kernel, and how they get to tiles in shared memory.

Rows that lie in memory come by pieces of 16 bytes, as they are where the tile is of their type. What lies otherwise (an
odd size, a rotation or other operations on the way) is computed element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tilewright.codegen import reads as rd
from tilewright.codegen.cuda.cache import FloatRows
from tilewright.codegen.cuda.cache_codes import CodeRows
from tilewright.codegen.cuda.cache_places import Places
from tilewright.codegen.cuda.evaluate import Evaluator, stored_dtype
from tilewright.codegen.cuda.source import Source
from tilewright.codegen.index import Index, Poly
from tilewright.codegen.index_shapes import linear, size
from tilewright.ir import Argument, Dim, Shape, Value

_PIECE = 16
_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "u8": 1}


@dataclass(frozen=True)
class Rows:
    """Rows in memory. ``address`` writes C for where one begins: of (batch, token, head)."""

    dtype: str
    aligned: bool
    address: Callable[[Evaluator, Index], str]


@dataclass(frozen=True)
class Operand:
    """``name``: a tensor ``[B, T, heads, size]`` in ``rows``, or computed as ``value``."""

    name: str
    shape: Shape
    rows: Rows | None
    value: Value | None = None

    def piece(self) -> int:
        """Elements that are brought at once."""
        wide = _PIECE // _BYTES[self.rows.dtype] if self.rows and self.rows.aligned else 1
        return wide if int(self.shape[3]) % wide == 0 else 1

    def function(self, tile: str, pointers: dict[Value, str]) -> list[str]:
        """C: ``<name>(tile *to, b, t, h, d, on)`` brings a piece to a tile, zeros where not ``on``."""
        w = Evaluator(pointers)
        *place, d = variables(w, self.shape, "bthc")
        if self.rows is not None:
            address = self.rows.address(w, tuple(place))
            copied = self.rows.dtype == tile and self.piece() > 1
            w.put(f"{'tw_copy16' if copied else f'tw_widen<{self.piece()}>'}(to, {address} + d, on);")
        else:
            value = self.value
            assert value is not None
            w.put(f"const i64 c = tw_min(d, {int(self.shape[3]) - 1});")  # no branch, so that loads overlap
            w.put(f"tw_store(to, on ? {w.value(value, (*place, d)).text} : 0.0f);")
        return [f"static constexpr int {self.name.upper()}_PIECE = {self.piece()};",
                f"TW_FN void {self.name}({tile} *to, i64 b, i64 t, i64 h, i64 d, bool on) const {{",
                *(f"  {line}" for line in w.lines), "}"]  # fmt: skip


def variables(w: Evaluator, shape: Sequence[Dim], names: str) -> tuple[Poly, ...]:
    """A function's parameters ``names`` as places in ``shape``."""
    return tuple(Poly() if dim == 1 else w.variable(0, size(dim) - 1, name) for dim, name in zip(shape, names))


def tensor_operand(source: Source, name: str, value: Value) -> Operand:
    """An operand that is a tensor."""
    return Operand(name, tuple(value.shape), _rows_of(source, value), value)


@dataclass(frozen=True)
class CacheOperand:
    """The keys or the values of a cache: ``stored`` at ``pointer``, positions where ``places`` says."""

    name: str
    pointer: str
    stored: FloatRows | CodeRows
    places: Places
    batch: Dim

    def function(self, tile: str, pointers: dict[Value, str]) -> list[str]:
        """As of an `Operand`; and ``<name>_scales(tile *to, b, t, h, on)``: 16 bytes of scales of codes, from t's on."""
        stored = self.stored

        def address(w: Evaluator, index: Index) -> str:
            return stored.address(self.pointer, *self._place(w, index))

        shape = self.batch, self.places.length, stored.heads, stored.row
        aligned = stored.row * _BYTES[stored.stored] % _PIECE == 0
        lines = Operand(self.name, shape, Rows(stored.stored, aligned, address)).function(tile, pointers)
        if isinstance(stored, CodeRows):
            w = Evaluator(pointers)
            scales = stored.scale_address(self.pointer, *self._place(w, variables(w, shape[:3], "bth")))
            lines += [f"TW_FN void {self.name}_scales({tile} *to, i64 b, i64 t, i64 h, bool on) const {{",
                      f"  tw_copy16(to, {scales}, on);", "}"]  # fmt: skip
        return lines

    def _place(self, w: Evaluator, index: Index) -> tuple[str, str, str]:
        """C: region, head and slot of (batch, position, head)."""
        b, position, head = map(w.number, index)
        region, slot = self.places.place(b, position)
        return region, head, slot


def _rows_of(source: Source, value: Value) -> Rows | None:
    """Rows of ``value``, if they lie in an argument's memory as they are."""

    def place(index: Index) -> tuple[Value, Poly] | None:
        at = value
        while not isinstance(at, Argument):
            if at.owner is None or not rd.is_move(at.owner) or rd.picks_data(at.owner):
                return None
            ((at, index),) = rd.reads(at.owner, index, lambda *_: Poly())
        return at, linear(index, at.shape)

    *lead, last = variables(Evaluator({}), value.shape, "bthd")
    start, element = place((*lead, Poly())), place((*lead, last))
    if start is None or element is None or element[1] - start[1] != last:
        return None

    def address(w: Evaluator, index: Index) -> str:
        found = place((*index, Poly()))
        assert found is not None
        return f"{source.pointers[found[0]]} + {w.number(found[1])}"

    wide = _PIECE // value.dtype.size
    return Rows(stored_dtype(value.dtype), all(factor % wide == 0 for _, factor in start[1].terms), address)
