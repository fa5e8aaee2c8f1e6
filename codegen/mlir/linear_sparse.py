"""Weights that ``sparse.expand`` makes of values and masks, expanded in registers or a block of a panel at a time.

A vector of features is one block of 16 rows, or half of one: the values of a step follow each other in memory, and an
instruction puts each in the lane that its bit of the mask names. Where there is no such instruction a table of shuffles
does it for eight at a time. Only the count of bits is carried from step to step, so steps overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tilewright.codegen.mlir.builder import Buffer, Function, Kernel
from tilewright.codegen.mlir.value import SIZES, Val, constant, in_register, intrinsic, shuffle
from tilewright.ir import DType
from tilewright.ir.ops.sparse_expand import ROWS, SEGMENT, MaskLayout

_ABSENT = 0x80
"""A place for shuffles that gives zero."""
_AHEAD = 2048  # bytes that are fetched ahead where blocks are expanded
_MASK_AHEAD = 8  # bytes of values fetched ahead for each byte of masks


@dataclass(frozen=True)
class Sparse:
    """Buffers of one weight of ``rows`` x ``columns``."""

    values: Buffer
    mask: Buffer
    starts: Buffer
    layout: MaskLayout
    rows: int
    columns: int

    @property
    def buffers(self) -> tuple[Buffer, Buffer, Buffer]:
        return self.values, self.mask, self.starts

    @property
    def blocks(self) -> int:
        return -(-self.rows // ROWS)

    @property
    def steps(self) -> int:
        return self.layout.steps(self.columns)

    def inside(self, values: Buffer, mask: Buffer, starts: Buffer) -> Sparse:
        """The weight as an inner function sees it."""
        return replace(self, values=values, mask=mask, starts=starts)

    def start(self, block: Val, step: Val | int = 0) -> Val:
        """Where the values of a step begin, the first of a segment."""
        segments = -(-self.steps // SEGMENT)
        at = block * segments if isinstance(step, int) else block * segments + step // SEGMENT
        return self.starts.load(at).to("index")

    def block(self, at: Val) -> Val:
        """The block ``at``, or the last one where a panel reaches past it."""
        return at.min(constant(self.blocks - 1))


@dataclass(frozen=True)
class Expander:
    """Makes vectors of a weight out of bits and values."""

    kernel: Kernel
    weight: Sparse

    @property
    def halves(self) -> int:
        """Vectors of a block."""
        return ROWS // self.kernel.lanes

    @property
    def count(self) -> int:
        """Bits of one vector."""
        return self.weight.layout.bits // self.halves

    @property
    def item(self) -> int:
        """Bytes that a bit brings."""
        layout = self.weight.layout
        return layout.size * layout.stored.size

    def word(self, places: Sequence[Val], masks: Sequence[Val], half: int) -> Val:
        """A vector of dense weights, as stored elements; of single codes of 4 bits, two steps."""
        layout = self.weight.layout
        parts = [self.items(at, mask, half) for at, mask in zip(places, masks, strict=True)]
        whole = parts[0] if len(parts) == 1 else parts[0] | parts[1] << 4
        return whole.bitcast(element(layout.stored))

    def advance(self, mask: Val) -> Val:
        """Elements of the values that a step takes."""
        count, layout = _ones(mask), self.weight.layout
        return (count + 1) // 2 if layout.nibbles else count * layout.size

    def items(self, at: Val, mask: Val, half: int) -> Val:
        """A vector of what the bits of one step bring, whose values begin ``at``."""
        if self._expands:
            return self._expanded(at, mask)
        bits = _widened(mask)
        before = _ones(_low(bits, self.count)) if half else constant(0)
        return self._shuffled(at, bits.shift_right_logical(self.count) if half else bits, before)

    @property
    def _expands(self) -> bool:
        """Whether an instruction does it all."""
        return self.halves == 1 and (self.item == 4 or "avx512vbmi2" in self.kernel.target.features)

    def _expanded(self, at: Val, bits: Val) -> Val:
        item = f"i{8 * self.item}"
        name = f"llvm.x86.avx512.mask.expand.v{self.count}{item}"
        loaded = in_register(self._load(at, self.count).bitcast(item))  # reading memory itself, it takes twice as long
        mask, absent = bits.splat(1).bitcast("bool"), self._absent(self.count * self.item).bitcast(item)
        return intrinsic(name, item, self.count, loaded, absent, mask).bitcast("u8")

    def _absent(self, count: int) -> Val:
        """So many bytes of zeros, as codes that are."""
        bias = self.weight.layout.bias
        return constant(bias - 256 if bias & 128 else bias, "u8", count)

    def _load(self, at: Val, count: int) -> Val:
        """So many items from ``at`` on, as bytes."""
        values, layout = self.weight.values, self.weight.layout
        if layout.nibbles:
            return _halves(values.load(at, count // 2))
        return values.load(at, count * layout.size).bitcast("u8")

    # --- by tables ----------------------------------------------------------------------------------------------------

    def _shuffled(self, at: Val, bits: Val, before: Val) -> Val:
        """Eight items at a time; ``before`` of the step's come ahead of these."""
        layout, pieces, places = self.weight.layout, [], []
        for chunk in range(self.count // 8):
            skipped = before + _ones(_low(bits, 8 * chunk)) if chunk else before
            byte = ((bits.shift_right_logical(8 * chunk) if chunk else bits) & 0xFF).to("index")
            if layout.nibbles:
                pieces.append(self._nibbles(at, skipped, byte))
                continue
            pieces.append(self._load(at + skipped * layout.size, 8))
            places.append(self._places(byte, chunk))
        if layout.nibbles:
            return _joined(pieces)
        if self.item == 4:
            (piece,), (place,) = pieces, places
            found = intrinsic("llvm.x86.avx2.permd", "i32", 8, piece.bitcast("i32"), place)
            return (place < 0).select(self._absent(32).bitcast("i32"), found).bitcast("u8")
        order = _joined(places)
        return _shuffle_bytes(_joined(pieces), order) | order & self._absent(order.lanes)

    def _places(self, byte: Val, chunk: int) -> Val:
        """For eight items the places of their bytes (of words: the words) among those loaded."""
        table = self.kernel.table("places", _table(1))
        if self.item == 4:
            return table.load(byte * 8, 8).bitcast("i8").to("i32")
        if self.item == 2:
            return self.kernel.table("pairs", _table(2)).load(byte * 16, 16)
        return table.load(byte * 8, 8) + (8 if chunk % 2 else 0)

    def _nibbles(self, at: Val, skipped: Val, byte: Val) -> Val:
        """Eight codes of 4 bits, the first of which may be the upper half of its byte."""
        data = _halves(self.weight.values.load(at + skipped // 2, 8))
        place = self.kernel.table("places", _table(1)).load(byte * 8, 8) + (skipped % 2).to("i32").to("u8").splat(8)
        absent = (place.bitcast("i16").shift_right_logical(4)).bitcast("u8") & self._absent(8)
        return _shuffle_bytes(data, _joined([place, place])).slice(0, 8) | absent


def element(dtype: DType) -> str:
    """The element type of a buffer: floats of 8 bits and fewer are bytes."""
    return "u8" if dtype.is_narrow_float else dtype.value


def _ones(bits: Val) -> Val:
    """How many bits are set."""
    wide = _widened(bits)
    return intrinsic(f"llvm.ctpop.{wide.dtype}", wide.dtype, 0, wide).to("index")


def _widened(bits: Val) -> Val:
    """The bits of a mask in 32 or 64."""
    return bits.to("i32") & 0xFFFF if bits.dtype == "i16" else bits


def _low(bits: Val, count: int) -> Val:
    return bits & ((1 << count) - 1)


def _halves(data: Val) -> Val:
    """Bytes of two codes each -> twice as many bytes."""
    wide = data.to("i16")
    return ((wide | wide << 4) & 0x0F0F).bitcast("u8")


def _joined(pieces: Sequence[Val]) -> Val:
    """Vectors one after the other."""
    whole = list(pieces)
    while len(whole) > 1:
        whole = [shuffle(a, b, range(2 * a.lanes)) for a, b in zip(whole[::2], whole[1::2])]
    return whole[0]


def _shuffle_bytes(data: Val, places: Val) -> Val:
    """vpshufb: within every 16 bytes."""
    names = {16: "ssse3.pshuf.b.128", 32: "avx2.pshuf.b", 64: "avx512.pshuf.b.512"}
    return intrinsic(f"llvm.x86.{names[data.lanes]}", "u8", data.lanes, data, places)


def _table(item: int) -> list[int]:
    """For each byte of a mask where the bytes of eight items come from."""
    rows = []
    for byte in range(256):
        found = iter(range(8))
        for bit in range(8):
            place = next(found) if byte >> bit & 1 else None
            rows += [_ABSENT if place is None else place * item + i for i in range(item)]
    return rows


class Reader:
    """Stands for the buffer of a panel's weights: loads expand what comes next.

    Loads must follow each other in the order of steps. ``carried`` are the places of the blocks'
    next values, which loops hand on.
    """

    def __init__(self, kernel: Kernel, weight: Sparse, first: Val, vectors: int, panel: int, step: int) -> None:
        """``vectors`` from the ``first`` of the weight on, in panels of so many features; a feed's step is ``step`` k's."""
        self.expander, self.weight = Expander(kernel, weight), weight
        self.blocks = [weight.block(first // self.expander.halves + i) for i in range(vectors // self.expander.halves)]
        self.masks = [weight.mask.at(block * weight.steps) for block in self.blocks]
        self.carried = [weight.start(block) for block in self.blocks]
        self.own = weight.layout.pair * (2 if weight.layout.nibbles else 1)  # k's of a load
        self.size = panel * weight.layout.dtype.bits * self.own // (8 * weight.layout.stored.size)  # elements of a load
        self.vector, self.per_step = self.size * kernel.lanes // panel, step // self.own
        self.base, self.now = constant(0), constant(0)
        self.found: dict[tuple[int, int], tuple[list[Val], list[Val]]] = {}

    def after(self, steps: Val) -> Reader:
        """Steps are counted from here on."""
        self.base = steps * self.per_step
        return self

    def at_step(self, step: Val) -> Reader:
        """Loads are of this step."""
        self.now, self.found = self.base + step * self.per_step, {}
        return self

    def load(self, place: Val | int, lanes: int) -> Val:
        """The vector that a dense panel has at ``place`` from the start of the step."""
        assert isinstance(place, int)
        step, column = divmod(place, self.size)
        block, half = divmod(column // self.vector, self.expander.halves)
        if (block, step) not in self.found:
            self.found[block, step] = self._read(block, step)
        return self.expander.word(*self.found[block, step], half)

    def _read(self, block: int, step: int) -> tuple[list[Val], list[Val]]:
        """Where the values of a load are, and its masks; the block's next values are behind them."""
        count = self.own // self.weight.layout.pair
        at, places = (self.now + step) * count, []
        masks = [self.masks[block].load(at + i) for i in range(count)]
        for mask in masks:
            places.append(self.carried[block])
            self.carried[block] = self.carried[block] + self.expander.advance(mask)
        return places, masks

    def prefetch(self, ahead: Val | int, masks: bool) -> None:
        """Ask for the values that the blocks have ``ahead`` bytes later, and perhaps for the masks."""
        size = SIZES[self.weight.values.dtype]
        for mask, at in zip(self.masks, self.carried):
            self.weight.values.prefetch(at + ahead // size, locality=2)
            if masks:
                mask.prefetch(self.now + ahead // (_MASK_AHEAD * SIZES[mask.dtype]), locality=2)


def emit_expand_function(kernel: Kernel, weight: Sparse, width: int, out: Buffer) -> Function:
    """The inner function that expands part of a panel of ``width`` features to ``out``, as dense panels have it.

    Numbers of a call: the panel, the first step (of a segment) and how many.
    """
    with kernel.function("expand", [*weight.buffers, out], numbers=3) as made:
        *buffers, out = made.buffers
        panel, first, count = made.numbers
        weight = weight.inside(*buffers)
        vectors = width // kernel.lanes
        for vector in range(0, vectors, ROWS // kernel.lanes):
            _expand_block(kernel, weight, panel * vectors + vector, vector, width, (first, count), out)
    return made


def _expand_block(kernel: Kernel, weight: Sparse, at: Val, vector: int, width: int, steps: tuple[Val, Val],
                  out: Buffer) -> None:  # fmt: skip
    """Some steps of 16 features from the vector ``at`` of the weight on, ``vector`` of the panel."""
    halves, (first, count) = ROWS // kernel.lanes, steps
    reader = Reader(kernel, weight, at, halves, width, weight.layout.pair * (2 if weight.layout.nibbles else 1))
    reader.carried = [weight.start(block, first) for block in reader.blocks]
    per = reader.own // weight.layout.pair
    loops = (count + (per - 1)) // per
    with kernel.loop(0, loops, carry=reader.carried) as loop:
        reader.carried = list(loop.values)
        reader.after(first // per).at_step(loop.index).prefetch(_AHEAD, True)
        for half in range(halves):
            place = loop.index * reader.size + (vector + half) * reader.vector
            out.store(reader.load(half * reader.vector, reader.vector).bitcast(out.dtype), place)
        loop.next(*reader.carried)
