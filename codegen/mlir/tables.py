"""A smooth function by 32 cubic pieces whose coefficients are looked up in registers (AVX-512)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np

from tilewright.codegen.mlir.value import Val, constant, fma, intrinsic, literals

_PIECES, _DEGREE = 32, 3
_MAGIC = 1.5 * 2.0**23
"""Added to a small number this leaves the nearest integer in the lowest bits."""
_EVERY_LANE, _THIS_ROUNDING, _LESSER_MAGNITUDE = -1, 4, 0b1010

Tail = Callable[[float], float]


def erf_tail(x: float) -> float:
    """The share of x that gelu(-x) is of -x."""
    return 0.5 * math.erfc(x / math.sqrt(2))


def tanh_tail(x: float) -> float:
    """The same of gelu in its approximation by tanh."""
    return 1 / (1 + math.exp(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gated(x: Val, tail: Tail, bound: float) -> Val:
    """x times a share between 0 and 1: ``tail(-x)`` below zero, ``1 - tail(x)`` above; 0 or 1 beyond ``bound``.

    x is one vector of 16 f32. The share is right to 2.5e-7 for tails as smooth as the two above.
    """
    pieces = _PIECES - 1  # the last one is zero
    most, every, rounding = constant(bound, "f32", 16), constant(_EVERY_LANE, "i16"), constant(_THIS_ROUNDING, "i32")
    range_ = "llvm.x86.avx512.mask.range.ps.512"
    size = intrinsic(range_, "f32", 16, x, most, constant(_LESSER_MAGNITUDE, "i32"), most, every, rounding)
    steps, magic = constant(pieces / bound, "f32", 16), constant(_MAGIC, "f32", 16)
    nearest = fma(size, steps, magic)
    at = fma(size, steps, magic - nearest)
    highest, *lower = (_look_up(row, nearest.bitcast("i32")) for row in reversed(_table(tail, bound / pieces)))
    share = highest
    for row in lower:
        share = fma(share, at, row)
    return fma(-size, share, constant(0.0, "f32", 16).max(x))


def _look_up(row: tuple[float, ...], index: Val) -> Val:
    """``row[index % 32]``."""
    low, high = literals(row[:16], "f32"), literals(row[16:], "f32")
    return intrinsic("llvm.x86.avx512.vpermi2var.ps.512", "f32", 16, low, index, high)


@cache
def _table(tail: Tail, width: float) -> tuple[tuple[float, ...], ...]:
    """Rows of coefficients, the constant first: piece k is about ``k * width``, its argument from -1/2 to 1/2."""
    nodes = 0.5 * np.cos(np.pi * (np.arange(_DEGREE + 1) + 0.5) / (_DEGREE + 1))
    columns = []
    for piece in range(_PIECES - 1):
        at = nodes if piece else (nodes + 0.5) / 2  # nothing is below zero
        values = [tail((piece + t) * width) for t in at]
        columns.append(np.linalg.solve(np.vander(at, increasing=True), values))
    columns.append(np.zeros(_DEGREE + 1))
    return tuple(tuple(map(float, row)) for row in np.array(columns, np.float32).T)
