"""Tokens that leave go on in the kept ones that they are most like (D2O, arXiv:2406.13035; `ir.ops.kv_merge`)."""

from collections.abc import Callable

from tilewright.codegen.mlir import math
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.flash_rows import LOG2E
from tilewright.codegen.mlir.kv_notes import WORTH, Head
from tilewright.codegen.mlir.value import Val, constant, iota
from tilewright.ir.ops.kv_merge import PACE, TINY

Stays = Callable[[Val], Val]
"""``slot -> bools``: which of the slots from one on, a vector of them, stay."""


class Merging:
    """Merges slots of one head after the other, in one kernel."""

    def __init__(self, kernel: Kernel, components: int) -> None:
        self.kernel, self.lanes = kernel, kernel.lanes
        self.key = kernel.scratch(components, "f32")
        """The key that is compared with others."""

    def begin(self, head: Head, start: Val) -> None:
        """Keep the threshold in mind that earlier calls left, if some did."""
        self.head, self.place = head, constant(head.cache.budget)
        self.is_first, self.before = start <= head.cache.budget, head.load(WORTH, self.place)

    def one(self, slot: Val, slots: Val) -> None:
        """A slot of ``slots``."""
        stays = self._among(slots)
        like, to = self._nearest(slot, slots, lambda at: stays(at) & self._numbers(at).ne(slot.to("i32")))
        self.level = self._level(like)
        with self.kernel.when(like >= self.level):
            weight = self._weight(like)
            self.head.blend(slot, to, weight / (weight + 1.0))

    def many(self, weights: Buffer, count: Val, slots: Val, likes: Buffer, places: Buffer) -> None:
        """The ``count`` of ``slots`` whose ``weights`` are 0 and not 1, which come to be those of all that is in a slot.

        ``likes`` and ``places`` are room for a number a slot.
        """
        kernel = self.kernel
        among, zero = self._among(slots), constant(0.0, "f32")
        with kernel.loop(0, slots, carry=[zero]) as loop:
            slot, (total,) = loop.index, loop.values

            def find() -> list[Val]:
                like, to = self._nearest(slot, slots, lambda at: among(at) & (weights.load(at, self.lanes) > 0.0))
                likes.store(like, slot)
                places.store(to.to("i32").to("f32"), slot)
                return [like]

            (like,) = kernel.branch(weights.load(slot).eq(0.0), find, lambda: [zero])
            loop.next(total + like)
        self.level = self._level(loop.results[0] / count.to("i32").to("f32"))
        with kernel.loop(0, slots) as loop, kernel.when(weights.load(loop.index).eq(0.0)):
            like = likes.load(loop.index)
            with kernel.when(like >= self.level):
                weight, to = self._weight(like), places.load(loop.index).to("i32").to("index")
                total = weights.load(to) + weight
                weights.store(total, to)
                self.head.blend(loop.index, to, weight / total)

    def end(self) -> None:
        """Leave the threshold to calls to come, where a token has been that has left or moved."""
        self.head.store(WORTH, self.level, self.place)

    def _weight(self, like: Val) -> Val:
        """Relative to that of the token itself, which is as like itself as can be."""
        return math.exp2_of_negative((like - 1.0).min(constant(0.0, "f32")) * LOG2E)

    def _level(self, mean: Val) -> Val:
        return self.is_first.select(mean, self.before + (mean - self.before) * PACE)

    def _numbers(self, slot: Val) -> Val:
        return iota(self.lanes) + slot.to("i32")

    def _among(self, slots: Val) -> Stays:
        return lambda at: self._numbers(at) < slots.to("i32")

    # --- likeness -----------------------------------------------------------------------------------------------------

    def _nearest(self, slot: Val, slots: Val, stays: Stays) -> tuple[Val, Val]:
        """How like a slot the one is that is most like it, by cosine, and which it is; of equals the first."""
        cache, own = self.head.cache, self._take(slot)
        starts = range(0, cache.key_panel, self.lanes)
        lowest, nowhere = constant(-2.0, "f32", self.lanes), constant(0, "i32", self.lanes)
        with self.kernel.loop(0, slots, cache.key_panel, carry=[lowest, nowhere]) as panels:
            most, place = panels.values
            for start, like in zip(starts, self._panel(panels.index, own)):
                at = panels.index + start
                more = stays(at) & (like > most)
                most, place = more.select(like, most), more.select(self._numbers(at), place)
            panels.next(most, place)
        most, place = panels.results
        best = most.reduce("max")
        found = most.eq(best.splat(self.lanes)).select(place, constant(1 << 30, "i32", self.lanes)).reduce("min")
        return best, found.to("index")

    def _panel(self, first: Val, own: Val) -> list[Val]:
        """How like the key at hand those of a panel are; its square is ``own``."""
        cache, keys, place = self.head.cache, self.head.keys, self.head.key_place(first)
        vectors = range(0, cache.key_panel, self.lanes)
        none = [constant(0.0, "f32", self.lanes)] * (2 * len(vectors))
        with self.kernel.loop(0, cache.key_size // cache.pair, carry=none) as loop:
            sums, at = list(loop.values), place + loop.index * (cache.key_panel * cache.pair)
            for n, start in enumerate(vectors):
                parts = self._components(keys.load(at + start * cache.pair, cache.pair * self.lanes))
                for half, x in enumerate(parts):
                    mine = self.key.load(loop.index * cache.pair + half).splat(self.lanes)
                    sums[2 * n], sums[2 * n + 1] = x.fma(mine, sums[2 * n]), x.fma(x, sums[2 * n + 1])
            loop.next(*sums)
        pairs = zip(loop.results[::2], loop.results[1::2])
        return [product / (square * own).max(constant(TINY, "f32", self.lanes)).sqrt() for product, square in pairs]

    def _components(self, found: Val) -> list[Val]:
        """The components in a vector of keys, as f32: of bf16 two, the lower and the upper halves."""
        if self.head.cache.pair == 1:
            return [found.to("f32")]
        bits = found.bitcast("i32")
        return [(bits << 16).bitcast("f32"), (bits & ~constant(0xFFFF, "i32")).bitcast("f32")]

    def _take(self, slot: Val) -> Val:
        """Make a slot's key the one at hand: its square."""
        cache, keys, place = self.head.cache, self.head.keys, self.head.key_place(slot)
        with self.kernel.loop(0, cache.key_size // cache.pair, carry=[constant(0.0, "f32")]) as loop:
            (square,) = loop.values
            found = keys.load(place + loop.index * (cache.key_panel * cache.pair), cache.pair).to("f32")
            for half in range(cache.pair):
                x = found.lane(half)
                self.key.store(x, loop.index * cache.pair + half)
                square = x.fma(x, square)
            loop.next(square)
        return loop.results[0]
