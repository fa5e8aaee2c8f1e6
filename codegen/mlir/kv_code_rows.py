"""What rows of attention over codes keep, and how scores in integers become digits of p (see kv_codes.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.codegen.cache_codes import CodeLayout
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.flash_rows import LOG2E, Adjust, Shape, SoftRows, Visible, power_of_two
from tilewright.codegen.mlir.rows import Row
from tilewright.codegen.mlir.value import Val, constant
from tilewright.codegen.schedule import AttentionSchedule

_DIGIT = 256
_LEAST = 1e-30  # of a scale: that of a row of zeros


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
    """The rows of one task: queries as digits, products of a block, digits of p."""

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
        self.p_scale = kernel.scratch(self.rows, "f32")
        self.most, self.zeros = (kernel.scratch(self.rows * lanes, "f32") for _ in range(2))
        self.products = kernel.scratch(self.rows * digits.p * self.out_size, "i32")
        self.scales = {name: kernel.scratch(self.keys, "f32") for name in self._scale_names()}

    def _scale_names(self) -> Sequence[str]:
        zeros = [name for name, held in (("k zero", self.key_zeros), ("v zero", self.cache.has_zeros)) if held]
        return ("k", "v", *zeros)

    def reset(self, rows: Val) -> None:
        """Forget everything: no key has been seen."""
        super().reset(rows)
        self._clear(self.products, constant(self.digits.p * self.rows * self.out_size))
        for memory in self.scales.values():  # those of keys that no block reached are multiplied by zero
            self._clear(memory, constant(self.keys))

    def _clear(self, memory: Buffer, count: Val) -> None:
        with self.kernel.loop(0, count, self.lanes) as loop:
            memory.store(constant(0, memory.dtype, self.lanes), loop.index)

    def load_query(self, row: Val, source: Row) -> None:
        """Take the query of ``row``: its digits, their scale and sums."""
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

    def _plain(self, adjust: Adjust | None) -> bool:
        """Whether a score is a product and a scale."""
        return not self.shape.softcap and adjust is None and self.shape.scale > 0

    def _soften(self, row: Val, key: Val, keys: Val, seen: Visible, adjust: Adjust | None) -> None:
        """One row of products becomes scores, and the row's top and sums follow."""
        plain = self._plain(adjust)
        top = self._scores(row, keys, plain)
        partly = seen.high < key + keys
        if seen.low is not None:
            partly = partly | (seen.low > key)

        def adjusted() -> list[Val]:
            self._adjust(row, key, keys, seen, adjust, plain)
            return [self._top(row, keys)]

        (top,) = self.kernel.branch(partly, adjusted, lambda: [top]) if plain else adjusted()
        top = top.reduce("max")
        old = self.top.load(row)
        new = old.max(top * self._factor(row, plain))
        with self.kernel.when(new > old):
            self._rescale(row, old, new)

    def _scores(self, row: Val, keys: Val, plain: bool) -> Val:
        """Products as scores in f32, the largest of every lane; but for the factor of the row if ``plain``."""
        excess = [self.excess.load(row + i * self.rows).splat(self.lanes) for i in range(self.digits.q)]
        total, factor = self.total.load(row), self.factor.load(row)
        with self._vectors(keys, constant(float("-inf"), "f32", self.lanes)) as (loop, starts):
            (top,) = loop.values
            for start in starts:
                dots = [self._dots(row + i * self.rows, start, x) for i, x in enumerate(excess)]
                dot = dots[0] if len(dots) == 1 else dots[0].fma(float(_DIGIT), dots[1])
                score = dot * self.scales["k"].load(start, self.lanes)
                if self.key_zeros:
                    zero = self.scales["k zero"].load(start, self.lanes) * total
                    score = dot.fma(self.scales["k"].load(start, self.lanes), zero)
                score = score if plain else score * factor
                self.scores.store(score, row * self.keys + start)
                top = top.max(score)
            loop.next(top)
        return loop.results[0]

    def _dots(self, row: Val, start: Val, excess: Val) -> Val:
        dots = self.dots.load(row * self.keys + start, self.lanes)
        return (dots - excess if self.bias else dots).to("f32")

    def _factor(self, row: Val, plain: bool) -> Val:
        """What makes scores as they are kept those in runs of log 2."""
        return self.factor.load(row) * (self.shape.scale * LOG2E) if plain else constant(1.0, "f32")

    def _top(self, row: Val, keys: Val) -> Val:
        with self._vectors(keys, constant(float("-inf"), "f32", self.lanes)) as (loop, starts):
            (top,) = loop.values
            for start in starts:
                top = top.max(self.scores.load(row * self.keys + start, self.lanes))
            loop.next(top)
        return loop.results[0]

    def _weigh(self, row: Val, keys: Val, plain: bool) -> None:
        """Scores become weights times the scales of values."""
        lanes, none = self.lanes, constant(0.0, "f32", self.lanes)
        factor, top = self._factor(row, plain).splat(lanes), self.top.load(row).splat(lanes)
        with self._vectors(keys, self.weight.load(row * lanes, lanes), none, none) as (loop, starts):
            total, most, zeros = loop.values
            for start in starts:
                score = self.scores.load(row * self.keys + start, lanes)
                p = power_of_two(score.fma(factor, -top), rough=self.digits.p == 1)
                total = total + p
                if self.cache.has_zeros:
                    zeros = p.fma(self.scales["v zero"].load(start, lanes), zeros)
                p = p * self.scales["v"].load(start, lanes)
                most = most.max(p)
                self.scores.store(p, row * self.keys + start)
            loop.next(total, most, zeros)
        for memory, value in zip((self.weight, self.most, self.zeros), loop.results):
            memory.store(value, row * lanes)

    def _digits(self, row: Val, keys: Val) -> None:
        """Weights become digits, under a scale that the largest fills."""
        most = self.most.load(row * self.lanes, self.lanes).reduce("max").max(_LEAST)
        scale = most * (1 / (255.0 * _DIGIT ** (self.digits.p - 1)))
        self.p_scale.store(scale, row)
        factor = (1.0 / scale).splat(self.lanes)
        with self._vectors(keys) as (_, starts):
            for start in starts:
                number = self.scores.load(row * self.keys + start, self.lanes).fma(factor, 0.5).to("i32")
                digits = [number] if self.digits.p == 1 else [number >> 8, number & (_DIGIT - 1)]
                for i, digit in enumerate(digits):
                    self.p.store(digit.to("u8"), (row + i * self.rows) * self.keys + start)

    def _flush(self, row: Val) -> None:
        """The block's products join the row's sums."""
        scale, none = self.p_scale.load(row), constant(0, "i32", self.lanes)
        zero = self.zeros.load(row * self.lanes, self.lanes).reduce("sum").splat(self.lanes)
        for start in range(0, self.out_size, self.lanes):
            places = [(row + i * self.rows) * self.out_size + start for i in range(self.digits.p)]
            high, *low = (self.products.load(place, self.lanes).to("f32") for place in places)
            for digit in low:
                high = high.fma(float(_DIGIT), digit)
            for place in places:
                self.products.store(none, place)
            place = row * self.out_size + start
            sums = self.sums.load(place, self.lanes)
            self.sums.store(high.fma(scale, sums + zero if self.cache.has_zeros else sums), place)
