"""Panels of bf16 weights from what ``quant.decompress`` keeps of them.

A step decodes the 64 numbers of 16 features and four k's, byte by byte: planes of bits are masks that add to the
exponents; escapes, which a few of them need, are expanded into their places where there is such an instruction, and put in
one by one elsewhere. Exponents and the rest then make the upper and the lower byte of each number, which interleave to two
pairs of k's as a panel has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.value import Val, constant, intrinsic, literals, shuffle

ROWS = 16
"""Features that are compressed together: panels hold a multiple of them."""
_COLUMNS, _NUMBERS = 4, 64
_AHEAD = 192  # steps that are fetched ahead
_SIGN, _REST = -0x80, 0x7F


@dataclass(frozen=True)
class Compressed:
    """Buffers of one weight, ``blocks`` of 16 features by ``steps`` of four k's."""

    low: Buffer
    planes: Buffer
    escapes: Buffer
    starts: Buffer
    base: Buffer
    blocks: int
    steps: int


def panel_room(k: int, width: int) -> int:
    """Elements that a decompressed panel of ``width`` features takes."""
    return -(-k // _COLUMNS) * _COLUMNS * width


def emit_decompress(kernel: Kernel, weight: Compressed, panel: Val, width: int, out: Buffer) -> None:
    """Write the panel of ``width`` features, a multiple of 16, to ``out``: ``[2 * steps][width][2]`` of bf16.

    Features past the last block are those of the last block again.
    """
    if width % ROWS:
        raise ValueError(f"panels of {width} features; compressed weights take a multiple of {ROWS}")
    base = weight.base.load(constant(0)).splat(4 * kernel.lanes)
    for part in range(width // ROWS):
        block = (panel * (width // ROWS) + part).min(constant(weight.blocks - 1))
        start = weight.starts.load(block).to("index")
        with kernel.loop(0, weight.steps, carry=[start]) as loop:
            places = [loop.index * (4 * width) + (part * 2 * ROWS + pair * 2 * width) for pair in range(2)]
            at = block * weight.steps + loop.index
            loop.next(_step(kernel, weight, base, at, loop.values[0], [out.at(place) for place in places], width))


def _step(kernel: Kernel, weight: Compressed, base: Val, at: Val, escape: Val, pairs: Sequence[Buffer], width: int) -> Val:
    """Decode 64 numbers; gives where the next escapes are."""
    weight.low.prefetch((at + _AHEAD) * _NUMBERS, locality=2)
    weight.planes.prefetch((at + _AHEAD) * 3, locality=2)
    planes = [weight.planes.load(at * 3 + bit) for bit in range(3)]
    escaped = planes[0] & planes[1] & planes[2]
    lanes = 4 * kernel.lanes
    expands = "avx512vbmi2" in kernel.target.features and lanes == _NUMBERS
    for first in range(0, _NUMBERS, lanes):
        low, exponent = weight.low.load(at * _NUMBERS + first, lanes), base
        for bit, plane in enumerate(planes):
            inside = _lanes_of(plane, first, lanes)
            exponent = inside.select(exponent + (1 << bit), exponent)
        if expands:
            exponent = _expand(weight.escapes.load(escape, lanes), exponent, escaped)
        words = exponent.bitcast("i16")  # shifts of bytes: neighbours' bits are masked away
        upper = low & _SIGN | words.shift_right_logical(1).bitcast("u8") & _REST
        lower = low & _REST | (words << 7).bitcast("u8") & _SIGN
        for half, pair in enumerate(pairs):
            order = [16 * lane + 8 * half + i for lane in range(lanes // 16) for i in range(8)]
            both = shuffle(lower, upper, [place for i in order for place in (i, lanes + i)])
            pair.store(both.bitcast("bf16"), first // 2)
    count = intrinsic("llvm.ctpop.i64", "i64", 0, escaped).to("index")
    if not expands:
        _put_in(kernel, weight, escaped, count, escape, pairs[0], 2 * width)
    return escape + count


def _lanes_of(plane: Val, first: int, lanes: int) -> Val:
    """Bits ``first`` and on of a plane as lanes that are true or false."""
    if lanes == _NUMBERS:
        return plane.splat(1).bitcast("bool")
    part = (plane.shift_right_logical(first) if first else plane).to("i32").splat(lanes // 4).bitcast("u8")
    spread = shuffle(part, part, [i // 8 for i in range(lanes)])  # the byte that has the lane's bit
    bits = literals([1 << i % 8 if i % 8 < 7 else -128 for i in range(lanes)], "u8")
    return (spread & bits).ne(0)


def _expand(known: Val, others: Val, mask: Val) -> Val:
    """``known`` in order in the lanes that ``mask`` names, elsewhere ``others``."""
    return intrinsic("llvm.x86.avx512.mask.expand.v64i8", "u8", _NUMBERS, known, others, mask.splat(1).bitcast("bool"))


def _put_in(kernel: Kernel, weight: Compressed, escaped: Val, count: Val, escape: Val, out: Buffer, stride: int) -> None:
    """Give the escaped numbers their exponents, in memory; ``stride`` elements lie between the two pairs."""
    words = out.view("i16")
    with kernel.loop(0, count, carry=[escaped]) as loop:
        left = loop.values[0]
        lane = intrinsic("llvm.cttz.i64", "i64", 0, left, constant(0, "bool")).to("index")
        at = lane // 16 * 8 + lane % 8 + lane // 8 % 2 * stride
        exponent = weight.escapes.load(escape + loop.index).to("i16") << 7
        words.store(words.load(at) & (0x807F - 0x10000) | exponent, at)
        loop.next(left & (left - 1))
