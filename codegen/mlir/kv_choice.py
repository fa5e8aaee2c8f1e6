"""The slots of one head that are worth least are given up, and those that stay moved to the front."""

from collections.abc import Callable
from dataclasses import dataclass

from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.kv_merge import Merging
from tilewright.codegen.mlir.kv_notes import POSITION, WORTH, Head
from tilewright.codegen.mlir.kv_spec import POOL_SPACE
from tilewright.codegen.mlir.value import Val, constant, iota
from tilewright.ir.ops.kv_policies import Rule

_BITS = 31  # of a float that is not negative: such floats are in the order of their bits
_INFINITE = float("inf")


@dataclass(frozen=True)
class Choice:
    """``slots`` slots of ``head``, of a text of ``length`` tokens; ``space`` is what a `Chooser` has to work in."""

    kernel: Kernel
    rule: Rule
    head: Head
    space: Buffer
    length: Val
    slots: Val
    merging: Merging | None = None

    def drop_one(self) -> None:
        """The least worthy, the oldest of equals; the last slot takes its place."""
        kernel, lanes = self.kernel, self.kernel.lanes
        most = constant(_INFINITE, "f32", lanes)
        with kernel.loop(0, self.slots, lanes, carry=[most, most, constant(0, "i32", lanes)]) as loop:
            least, oldest, place = loop.values
            slots = iota(lanes) + loop.index.to("i32")
            position = self.head.load(POSITION, loop.index, lanes)
            worth = self._fixed(self.head.load(WORTH, loop.index, lanes), position, slots)
            less = (worth < least) | (worth.eq(least) & (position < oldest))
            loop.next(less.select(worth, least), less.select(position, oldest), less.select(slots, place))
        least, oldest, place = loop.results
        of_least = least.eq(least.reduce("min").splat(lanes))
        oldest = of_least.select(oldest, most)
        found = of_least & oldest.eq(oldest.reduce("min").splat(lanes))
        slot = found.select(place, constant(1 << 30, "i32", lanes)).reduce("min").to("index")
        if self.merging is not None:
            self.merging.one(slot, self.slots)
        with kernel.when(slot.ne(self.slots - 1)):
            self.head.move(self.slots - 1, slot)
        if self.merging is not None:
            self.merging.end()

    def drop(self, count: Val) -> None:
        """The ``count`` least worthy, each as worthy as the most of its pool; the others move up in order."""
        kernel = self.kernel
        worths = self._worths()
        least = self._smallest(count, lambda at: worths.load(at, kernel.lanes), None)
        rest = count - self._count(lambda at: worths.load(at, kernel.lanes) < least.splat(kernel.lanes))
        oldest = self._smallest(rest, lambda at: self.head.load(POSITION, at, kernel.lanes),
                                lambda at: worths.load(at, kernel.lanes).eq(least.splat(kernel.lanes)))  # fmt: skip

        def leaves(at: Val, lanes: int = 0) -> Val:
            worth, position = worths.load(at, lanes), self.head.load(POSITION, at, lanes)
            return (worth < least.splat(lanes)) | (worth.eq(least.splat(lanes)) & (position <= oldest.splat(lanes)))

        if self.merging is not None:
            self._merge(self.merging, count, leaves)
        with kernel.loop(0, self.slots, carry=[constant(0)]) as loop:
            (to,), gone = loop.values, leaves(loop.index)
            with kernel.when(~gone & loop.index.ne(to)):
                self.head.move(loop.index, to)
            loop.next(gone.select(to, to + 1))
        if self.merging is not None:
            self.merging.end()

    def _merge(self, merging: Merging, count: Val, leaves: Callable[[Val, int], Val]) -> None:
        """Merge what leaves into what stays; of the space, only the worths are still wanted."""
        lanes = self.kernel.lanes
        weights, _, likes, places = (self._part(n) for n in range(4))
        with self.kernel.loop(0, self.slots, lanes) as loop:
            weights.store(leaves(loop.index, lanes).select(constant(0.0, "f32", lanes), 1.0), loop.index)
        merging.many(weights, count, self.slots, likes, places)

    def _part(self, number: int) -> Buffer:
        """Memory for one number a slot."""
        size = self.head.cache.slots + 2 * POOL_SPACE
        parts = 2 if self.merging is None else 4
        return self.space.at(self.head.lane * (parts * size) + (number * size + POOL_SPACE))

    def _fixed(self, worth: Val, position: Val, slots: Val) -> Val:
        """Worths, without end for slots that are not to go."""
        stays = slots >= self.slots.to("i32")
        stays = stays | (position >= (self.length - self.rule.recent).to("i32").to("f32").splat(worth.lanes))
        if self.rule.first:
            stays = stays | (position < float(self.rule.first))
        return stays.select(constant(_INFINITE, "f32", worth.lanes), worth)

    def _worths(self) -> Buffer:
        """The worths that are compared, in memory of their own."""
        lanes, plain, out = self.kernel.lanes, self._part(0), self._part(1)
        lowest = constant(-_INFINITE, "f32", lanes)
        for start in range(-POOL_SPACE, 0, lanes):
            plain.store(lowest, start)
        with self.kernel.loop(0, self.slots + POOL_SPACE, lanes) as loop:
            inside = iota(lanes) + loop.index.to("i32") < self.slots.to("i32")
            near = loop.index.min(constant(self.head.cache.slots - lanes))
            plain.store(inside.select(self.head.load(WORTH, near, lanes), lowest), loop.index)
        with self.kernel.loop(0, self.slots, lanes) as loop:
            around = range(-(self.rule.pool // 2), self.rule.pool // 2 + 1)
            worth = lowest
            for step in around:
                worth = worth.max(plain.load(loop.index + step, lanes))
            position, slots = self.head.load(POSITION, loop.index, lanes), iota(lanes) + loop.index.to("i32")
            out.store(self._fixed(worth, position, slots), loop.index)
        return out

    def _smallest(self, number: Val, load, among) -> Val:
        """The ``number``-th smallest of the floats that ``load(slot)`` gives: bit by bit, how many are below."""
        lanes = self.kernel.lanes
        with self.kernel.loop(0, _BITS, carry=[constant(0, "i32")]) as bits:
            (found,) = bits.values
            guess = found | (constant(1, "i32") << (constant(_BITS - 1) - bits.index).to("i32"))

            def below(at: Val) -> Val:
                is_less = load(at).bitcast("i32") < guess.splat(lanes)
                return is_less if among is None else is_less & among(at)

            bits.next((self._count(below) < number).select(guess, found))
        return bits.results[0].bitcast("f32")

    def _count(self, holds) -> Val:
        """In how many slots something holds; those behind the last have worths without end."""
        lanes = self.kernel.lanes
        with self.kernel.loop(0, self.slots, lanes, carry=[constant(0, "i32", lanes)]) as loop:
            one = holds(loop.index).select(constant(1, "i32", lanes), 0)
            loop.next(loop.values[0] + one)
        return loop.results[0].reduce("sum").to("index")
