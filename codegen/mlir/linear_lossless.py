"""Panels of bf16 weights from what ``quant.decompress`` keeps of them.

The 32 numbers of 16 features and a pair of k's lie in memory as a panel has them, so that a vector of 16-bit lanes is
decoded at once: planes of bits are masks that add to the exponent, and escapes, which a few lanes need, are expanded into
them where there is such an instruction, and put in one by one elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.value import Val, constant, intrinsic, literals

ROWS = 16
"""Features that are compressed together: panels hold a multiple of them."""
_PAIR = 2 * ROWS
_LOW, _EXPONENT = 0x807F, 7  # the bits that are not the exponent's, and where that begins


@dataclass(frozen=True)
class Compressed:
    """Buffers of one weight, ``blocks`` of 16 features by ``pairs`` of k's."""

    low: Buffer
    planes: Buffer
    escapes: Buffer
    starts: Buffer
    base: Buffer
    blocks: int
    pairs: int


def emit_decompress(kernel: Kernel, weight: Compressed, panel: Val, width: int, out: Buffer) -> None:
    """Write the panel of ``width`` features, a multiple of 16, to ``out``: ``[pairs][width][2]`` of bf16.

    Features past the last block are those of the last block again.
    """
    if width % ROWS:
        raise ValueError(f"panels of {width} features; compressed weights take a multiple of {ROWS}")
    base = weight.base.load(constant(0)).to("i16").splat(2 * kernel.lanes)
    for part in range(width // ROWS):
        block = (panel * (width // ROWS) + part).min(constant(weight.blocks - 1))
        start = weight.starts.load(block).to("index")
        with kernel.loop(0, weight.pairs, carry=[start]) as loop:
            place = loop.index * (2 * width) + part * _PAIR
            loop.next(_pair(kernel, weight, base, block * weight.pairs + loop.index, loop.values[0], out.at(place)))


def _pair(kernel: Kernel, weight: Compressed, base: Val, pair: Val, escape: Val, out: Buffer) -> Val:
    """Decode 32 numbers; gives where the next escapes are."""
    planes = [weight.planes.load(pair * 3 + bit) for bit in range(3)]
    escaped = planes[0] & planes[1] & planes[2]
    lanes = 2 * kernel.lanes
    expands = {"avx512vbmi2", "avx512bw"} <= kernel.target.features and lanes == _PAIR
    for first in range(0, _PAIR, lanes):
        low = weight.low.load(pair * _PAIR + first, lanes).to("i16")
        exponent = base
        for bit, plane in enumerate(planes):
            exponent = exponent + _lanes_of(plane, first, lanes).select(constant(1 << bit, "i16", lanes), 0)
        if expands:
            known = weight.escapes.load(escape, lanes).to("i16")
            exponent = _expand(known, exponent, escaped)
        bits = (low | low << 8) & (_LOW - 0x10000) | exponent << _EXPONENT
        out.store(bits.bitcast("bf16"), first)
    count = intrinsic("llvm.ctpop.i32", "i32", 0, escaped)
    if not expands:
        _put_in(kernel, weight, (escaped, count, escape), out)
    return escape + count.to("index")


def _lanes_of(plane: Val, first: int, lanes: int) -> Val:
    """Bits ``first`` and on of a plane as lanes that are true or false."""
    if lanes == _PAIR:
        return plane.splat(1).bitcast("bool")
    bits = literals([1 << i if i < 15 else -(1 << 15) for i in range(lanes)], "i16")
    part = plane.shift_right_logical(first) if first else plane
    return (part.to("i16").splat(lanes) & bits).ne(0)


def _expand(known: Val, others: Val, mask: Val) -> Val:
    """``known`` in order in the lanes that ``mask`` names, elsewhere ``others``."""
    return intrinsic("llvm.x86.avx512.mask.expand.v32i16", "i16", _PAIR, known, others, mask.splat(1).bitcast("bool"))


def _put_in(kernel: Kernel, weight: Compressed, escapes: Sequence[Val], out: Buffer) -> None:
    """Give the escaped lanes their exponents, in memory."""
    escaped, count, escape = escapes
    words = out.view("i16")
    with kernel.loop(0, count.to("index"), carry=[escaped]) as loop:
        left = loop.values[0]
        lane = intrinsic("llvm.cttz.i32", "i32", 0, left, constant(0, "bool"))
        at = lane.to("index")
        exponent = weight.escapes.load(escape + loop.index).to("i16") << _EXPONENT
        words.store(words.load(at) & (_LOW - 0x10000) | exponent, at)
        loop.next(left & (left - 1))
