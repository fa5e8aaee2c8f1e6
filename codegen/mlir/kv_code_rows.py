"""What rows of attention over codes keep, and how scores in integers become digits of p (see kv_codes.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.codegen.cache_codes import CodeLayout
from tilewright.codegen.cache_slots import round_up
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.flash_rows import LOG2E, LOWEST, Adjust, Shape, SoftRows, Visible
from tilewright.codegen.mlir.kv_residual import Residuals
from tilewright.codegen.mlir.math import exp2_in_bits, exp2_of_negative
from tilewright.codegen.mlir.rows import Row
from tilewright.codegen.mlir.value import Val, constant
from tilewright.codegen.schedule import AttentionSchedule, registers

_DIGIT = 256
_FULL = 254.5  # what the largest digit is made of: rough powers are up to 1.8e-3 too large
_LEAST = 1e-30  # of a scale: that of a row of zeros
_LOWEST_POWER = -125.0
_INTEGERS = 2.0**23  # in f32 no fractions are left from here on


@dataclass(frozen=True)
class Digits:
    """How many digits of 8 bits a query, and a weight p, are made of: 1 or 2."""

    q: int = 1
    p: int = 1


ONE_DIGIT = Digits()


class FloatView:
    """A buffer of i32 as one of f32."""

    def __init__(self, memory: Buffer) -> None:
        self.memory = memory

    def load(self, index: Val | int, lanes: int = 0) -> Val:
        return self.memory.load(index, lanes).bitcast("f32")

    def store(self, value: Val, index: Val | int) -> None:
        self.memory.store(value.bitcast("i32"), index)


class CodeRows(SoftRows):
    """The rows of one task: queries as digits, products of a block, digits of p.

    A block has a reference for each row, the logarithm under which the largest p fills its digits, and a row has one for
    what it keeps, the largest so far.
    """

    def __init__(self, kernel: Kernel, shape: Shape, schedule: AttentionSchedule, cache: CodeLayout,
                 digits: Digits) -> None:
        super().__init__(kernel, shape, schedule)
        self.cache, self.digits, lanes = cache, digits, self.lanes
        self.key_zeros, self.bias = cache.has_zeros and not cache.channels, 128 if cache.channels else cache.bias
        self.q_stride = -(-cache.key_size // lanes) * lanes
        self.row = kernel.scratch(self.q_stride, "f32")
        self.q = kernel.scratch(self.rows * digits.q * self.q_stride, "i8")
        self.excess = kernel.scratch(self.rows * digits.q, "i32")  # what the bias of keys' codes adds to a score
        self.factor, self.total = (kernel.scratch(self.rows, "f32") for _ in range(2))  # of a query's digits
        self.dots = kernel.scratch(self.rows * digits.q * self.keys, "i32")
        self.scores = FloatView(self.dots)  # in the place of the highest digit's
        self.p = kernel.scratch(self.rows * digits.p * self.keys, "u8")
        self.reference, self.keep, self.share = (kernel.scratch(round_up(self.rows, lanes), "f32") for _ in range(3))
        self.weights, self.zeros = (kernel.scratch(self.rows * lanes, "f32") for _ in range(2))  # of a block
        self.products = kernel.scratch(self.rows * digits.p * self.out_size, "i32")
        self.scales = {name: kernel.scratch(self.keys, "f32") for name in self._scale_names()}
        self.v_logs = kernel.scratch(self.keys, "f32")
        sizes = self.rows, self.keys, self.out_size
        self.residuals = Residuals(kernel, cache, *sizes) if cache.has_residual else None

    def _scale_names(self) -> Sequence[str]:
        zeros = [name for name, held in (("k zero", self.key_zeros), ("v zero", self.cache.has_zeros)) if held]
        return ("k", "v", *zeros)

    def reset(self, rows: Val) -> None:
        """Forget everything: no key has been seen."""
        super().reset(rows)
        for memory in (*self.scales.values(), self.v_logs):  # those of keys that no block reached are multiplied by zero
            with self.kernel.loop(0, self.keys, self.lanes) as loop:
                memory.store(constant(0.0, "f32", self.lanes), loop.index)

    def store_scales(self, name: str, scales: Val, place: Val) -> None:
        """Take one vector of scales or zeros of a block."""
        self.scales[name].store(scales, place)
        if name == "v":
            self.v_logs.store(_log2_above(scales.max(_LEAST)), place)

    def load_query(self, row: Val, source: Row) -> None:
        """Take the query of ``row``: its digits, their scale and sums."""
        if self.residuals is not None:
            self.residuals.load_query(row, source)
        starts, lanes = range(0, self.q_stride, self.lanes), self.lanes
        most = constant(_LEAST, "f32", lanes)
        for start in starts:
            x = source.load(start).to("f32")
            self.row.store(x, start)
            most = most.max(x.abs())
        top = 127.0 * _DIGIT ** (self.digits.q - 1)
        scale = most.reduce("max") * (1 / top)
        self.factor.store(scale, row)
        sums = [constant(0, "i32", lanes)] * (self.digits.q + 1)
        for start in starts:
            number = (self.row.load(start, lanes) * (1.0 / scale).splat(lanes)).round_even().to("i32")
            digits = self._split_signed(number)
            for i, digit in enumerate(digits):
                self.q.store(digit.to("i8"), (row + i * self.rows) * self.q_stride + start)
            sums = [total + x for total, x in zip(sums, (*digits, number))]
        *excess, total = (x.reduce("sum") for x in sums)
        for i, x in enumerate(excess):
            self.excess.store(x * self.bias, row + i * self.rows)
        self.total.store(total.to("f32"), row)

    def _split_signed(self, number: Val) -> list[Val]:
        """The digits of a query, the highest first, each from -128 to 127."""
        if self.digits.q == 1:
            return [number]
        high = (number + _DIGIT // 2) >> 8
        return [high, number - (high << 8)]

    def _unit(self, plain: bool) -> float:
        """What products are multiplied with at once, of scores that are ``plain``."""
        return self.shape.scale * LOG2E if plain else 1.0

    def _plain(self, adjust: Adjust | None) -> bool:
        """Whether a score is a product and a scale."""
        return not self.shape.softcap and adjust is None and self.shape.scale > 0

    # --- scores -------------------------------------------------------------------------------------------------------

    def _scores(self, rows: Val, keys: Val, plain: bool) -> None:
        """Products become scores in f32, final ones if ``plain``, and the largest p of each row is known."""
        if not self.exact:
            with self.kernel.loop(0, rows) as loop:
                self._scores_of(1, loop.index, keys, plain)
            return
        most = registers(self.kernel.target) // 8
        for first in range(0, self.rows, most):
            self._scores_of(min(most, self.rows - first), constant(first), keys, plain)

    def _scores_of(self, height: int, first: Val, keys: Val, plain: bool) -> None:
        """So many rows, which share what is loaded of the keys."""
        rows, lanes, count = [first + r for r in range(height)], self.lanes, max(4 // height, 1)
        facts = [self._facts(row, plain) for row in rows]
        with self.kernel.loop(0, keys, count * lanes, [constant(LOWEST, "f32", lanes)] * height) as loop:
            tops = loop.values
            for start in (loop.index + i * lanes for i in range(count)):
                k, log = self.scales["k"].load(start, lanes), self.v_logs.load(start, lanes)
                zero = self.scales["k zero"].load(start, lanes) if self.key_zeros else None
                scores = []
                for row, (factor, total, excess) in zip(rows, facts):
                    dot = self._dot(row, start, excess)
                    scores.append((dot * k if zero is None else dot.fma(k, zero * total)) * factor)
                if self.residuals is not None:
                    scores = self.residuals.score(scores, rows, start)
                for r, (row, score) in enumerate(zip(rows, scores)):
                    self.scores.store(score, row * self.keys + start)
                    tops[r] = tops[r].max(score + log)
            loop.next(*tops)
        for row, top in zip(rows, loop.results):
            self._refer(row, top)

    def _refer(self, row: Val, tops: Val) -> None:
        """The reference of a row, from the largest logarithms of p in each lane."""
        self.reference.store(tops.reduce("max") - math.log2(_FULL * _DIGIT ** (self.digits.p - 1)), row)

    def _facts(self, row: Val, plain: bool) -> tuple[Val, Val, list[Val]]:
        """The factor of a row's scores, the sum of its query, and what to take from the products of each digit."""
        factor = self.factor.load(row) * self._unit(plain)
        excess = [self.excess.load(row + i * self.rows).splat(self.lanes) for i in range(self.digits.q)]
        return factor.splat(self.lanes), self.total.load(row).splat(self.lanes), excess

    def _dot(self, row: Val, start: Val, excess: Sequence[Val]) -> Val:
        places = [(row + i * self.rows) * self.keys + start for i in range(self.digits.q)]
        dots = [self.dots.load(place, self.lanes) for place in places]
        high, *low = ((dot - x if self.bias else dot).to("f32") for dot, x in zip(dots, excess))
        return high.fma(float(_DIGIT), low[0]) if low else high

    def _mask(self, row: Val, key: Val, keys: Val, seen: Visible, adjust: Adjust | None) -> None:
        """Scores of a row become final, and those of keys that it does not see the least of all."""
        plain = self._plain(adjust)
        partly = seen.high < key + keys
        if seen.low is not None:
            partly = partly | (seen.low > key)
        with self.kernel.when(partly if plain else constant(True, "bool")):
            self._adjust(row, key, keys, seen, adjust, plain)
            with self._vectors(keys, constant(LOWEST, "f32", self.lanes)) as (loop, starts):
                (top,) = loop.values
                for start in starts:
                    score = self.scores.load(row * self.keys + start, self.lanes)
                    top = top.max(score + self.v_logs.load(start, self.lanes))
                loop.next(top)
            self._refer(row, loop.results[0])

    # --- weights ------------------------------------------------------------------------------------------------------

    def _settle(self, rows: Val) -> None:
        """References of the rows after this block, and what is to be multiplied with which."""
        lanes = self.lanes
        with self.kernel.loop(0, rows, lanes) as loop:
            block, old = self.reference.load(loop.index, lanes), self.top.load(loop.index, lanes)
            new = old.max(block)
            self.top.store(new, loop.index)
            self.keep.store(exp2_of_negative(old - new), loop.index)
            self.share.store(exp2_of_negative(block - new), loop.index)

    def _weigh(self, row: Val, keys: Val) -> None:
        """Scores become weights, and these times the scales of values digits."""
        lanes, none = self.lanes, constant(0.0, "f32", self.lanes)
        reference = self.reference.load(row).splat(lanes)
        with self._vectors(keys, none, none) as (loop, starts):
            total, zeros = loop.values
            for start in starts:
                score = self.scores.load(row * self.keys + start, lanes) - reference
                weight = exp2_in_bits(score.max(_LOWEST_POWER), rough=self.digits.p == 1)
                total = total + weight
                if self.residuals is not None:
                    self.scores.store(weight, row * self.keys + start)
                if self.cache.has_zeros:
                    zeros = weight.fma(self.scales["v zero"].load(start, lanes), zeros)
                # The sum's lowest bits are the nearest integer.
                number = weight.fma(self.scales["v"].load(start, lanes), _INTEGERS).bitcast("i32")
                digits = [number] if self.digits.p == 1 else [number >> 8, number]
                for i, digit in enumerate(digits):
                    self.p.store(digit.to("u8"), (row + i * self.rows) * self.keys + start)
            loop.next(total, zeros)
        for memory, value in zip((self.weights, self.zeros), loop.results):
            memory.store(value, row * lanes)

    def _clear_products(self) -> None:
        with self.kernel.loop(0, self.digits.p * self.rows * self.out_size, self.lanes) as loop:
            self.products.store(constant(0, "i32", self.lanes), loop.index)

    def _flush(self, row: Val) -> None:
        """The block's weights and products join those of the row."""
        at, keep, share = row * self.lanes, self.keep.load(row), self.share.load(row)
        self.weight.store(self.weights.load(at, self.lanes).fma(share, self.weight.load(at, self.lanes) * keep), at)
        zero = self.zeros.load(at, self.lanes).reduce("sum")
        for start in range(0, self.out_size, self.lanes):
            places = [(row + i * self.rows) * self.out_size + start for i in range(self.digits.p)]
            high, *low = (self.products.load(place, self.lanes).to("f32") for place in places)
            high = high.fma(float(_DIGIT), low[0]) if low else high
            high = high + zero if self.cache.has_zeros else high
            place = row * self.out_size + start
            high = high if self.residuals is None else high + self.residuals.sum(place)
            self.sums.store(high.fma(share, self.sums.load(place, self.lanes) * keep), place)


def _log2_above(x: Val) -> Val:
    """The logarithm of positive numbers, or up to 0.0861 more: that of the fraction is taken for a straight line."""
    return x.bitcast("i32").to("f32").fma(2.0**-23, 0.0861 - 127)
