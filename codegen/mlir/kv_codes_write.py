"""Write keys and values as codes into runs of a `CodeLayout`, a token at a time, as `ir.ops.kv_codes` defines them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tilewright.codegen.cache import value_panels
from tilewright.codegen.cache_codes import CodeLayout
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.value import Val, constant, iota

_MOST = {"f16": 65504.0, "f32": 3.4028234663852886e38}
Source = Callable[[int], Val]
"""One vector of f32 components from a place on."""
Limits = tuple[Val, Val] | None
"""The least and the greatest number that a scale is made for."""


@dataclass(frozen=True)
class Scale:
    """What turns numbers into codes, splat or a vector of channels: codes are ``(x - zero) / scale``, nearest even."""

    dtype: str
    scale: Val
    zero: Val | None

    def codes(self, x: Val) -> Val:
        """Codes of f32 numbers, i32."""
        low, high = code_range(self.dtype)
        shifted = x if self.zero is None else x - self.zero
        return (shifted / self.scale).round_even().max(float(low)).min(float(high)).to("i32")

    def error(self, x: Val) -> Val:
        """What codes leave of numbers."""
        found = self.codes(x).to("f32") * self.scale
        return x - (found if self.zero is None else found + self.zero)


def code_range(dtype: str) -> tuple[int, int]:
    """The least and the greatest code."""
    return {"i8": (-127, 127), "i4": (0, 15), "i2": (0, 3)}[dtype]


def make_scale(cache: CodeLayout, low: Val, high: Val) -> Scale:
    """The scale of numbers from ``low`` to ``high``, as it will be read back."""
    if not cache.has_zeros:
        return Scale(cache.dtype, _stored(cache, (-low).max(high) / 127.0), None)
    zero = held(cache, low)
    return Scale(cache.dtype, _stored(cache, (high - low) / float(code_range(cache.dtype)[1])), zero)


def held(cache: CodeLayout, x: Val) -> Val:
    """Numbers as the type of scales holds them, f32."""
    most = _MOST[cache.scales]
    return x.max(-most).min(most).to(cache.scales).to("f32")


def _stored(cache: CodeLayout, x: Val) -> Val:
    found = held(cache, x)
    return (found > 0.0).select(found, constant(1.0, "f32", found.lanes))


class CodeWriter:
    """Writes tokens into the runs of one cache."""

    def __init__(self, kernel: Kernel, cache: CodeLayout) -> None:
        self.kernel, self.cache, self.lanes = kernel, cache, kernel.lanes
        stride = -(-cache.key_size // self.lanes) * self.lanes
        self.bytes = kernel.scratch(stride, "u8")

    def key(self, source: Source, k: Buffer, row: Val, limits: Limits = None) -> Scale:
        """One key as token ``row`` of the run at ``k``, with a scale of its own, from ``limits`` if these are given."""
        cache = self.cache
        scale = self._scale(limits or self._limits_of(source, cache.dim))
        self.key_codes(source, lambda start: scale, k, row)
        self._store_scale(scale, k.at(cache.k_codes), row, cache.run)
        return scale

    def key_codes(self, source: Source, scale: Callable[[int], Scale], k: Buffer, row: Val) -> None:
        """The codes alone, under the scales of components from a place on."""
        cache = self.cache
        for start in range(0, cache.key_size, self.lanes):
            self.bytes.store((scale(start).codes(source(start)) + cache.bias).to("u8"), start)
        panel = cache.key_panel
        place = row // panel * (panel * cache.key_size * cache.bits // 8) + row % panel * 4
        with self.kernel.loop(0, cache.key_size // cache.pair) as loop:
            word = constant(0, "i32")
            for quad in range(cache.pair // 4):
                codes = self.bytes.load(loop.index * cache.pair + 4 * quad, 4).bitcast("i32").lane(0)
                word = word | codes << cache.bits * quad
            k.store(word.splat(1).bitcast("u8"), place + loop.index * (4 * panel))

    def value(self, source: Source, v: Buffer, row: Val, limits: Limits = None) -> Scale:
        """One value as token ``row`` of the run at ``v``: its bits of each word."""
        cache, lanes = self.cache, self.lanes
        scale = self._scale(limits or self._limits_of(source, cache.vdim))
        mask = (1 << cache.bits) - 1
        shift = (row % 4 * 8 + row % cache.pair // 4 * cache.bits).to("i32").splat(lanes)
        kept = ~(constant(mask, "i32", lanes) << shift)
        for start, width in value_panels(cache.value_size, cache.panel):
            for column in range(start, min(start + width, cache.vdim), lanes):
                at = row // cache.pair * (4 * width) + (start * cache.run * cache.bits // 8 + (column - start) * 4)
                code = (scale.codes(source(column)) & mask) << shift
                word = v.load(at, 4 * lanes).bitcast("i32") & kept | code
                v.store(word.bitcast("u8"), at)
        self._store_scale(scale, v.at(cache.v_codes), row, cache.run)
        return scale

    def _limits_of(self, source: Source, size: int) -> tuple[Val, Val]:
        """The least and the greatest component of one row."""
        infinity = constant(float("inf"), "f32", self.lanes)
        low, high = infinity, -infinity
        for start in range(0, size, self.lanes):
            x, inside = source(start), iota(self.lanes) < size - start
            low, high = low.min(inside.select(x, infinity)), high.max(inside.select(x, -infinity))
        return low.reduce("min"), high.reduce("max")

    def _scale(self, limits: tuple[Val, Val]) -> Scale:
        """The scale of all components of one row, splat."""
        made = make_scale(self.cache, *limits)
        zero = None if made.zero is None else made.zero.splat(self.lanes)
        return Scale(made.dtype, made.scale.splat(self.lanes), zero)

    def _store_scale(self, scale: Scale, memory: Buffer, index: Val, apart: int) -> None:
        """A scale, and a zero ``apart`` scales further on."""
        size = self.cache.scale_size
        for number, first in ((scale.scale, 0), (scale.zero, apart)):
            if number is not None:
                held = number.slice(0, 1).to(self.cache.scales).bitcast("u8")
                memory.store(held, (index + first) * size)
