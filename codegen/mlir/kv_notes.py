"""One head of kept tokens: the notes on its slots, and moving what lies in one slot to another (see `CacheLayout`)."""

from collections.abc import Callable
from dataclasses import dataclass

from tilewright.codegen.cache import CacheLayout, value_panels
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.value import SIZES, Val, constant
from tilewright.ir.kv_kept import NOTES

WORTH, POSITION = range(NOTES)
Change = Callable[[Val, Val], Val]
"""``(found, old) -> new``: what becomes of what lies in a slot, by what lies in another."""


@dataclass(frozen=True)
class Head:
    """The slots of one head of one sequence in the memory ``k`` and ``v`` of a cache."""

    kernel: Kernel
    cache: CacheLayout
    k: Buffer
    v: Buffer
    batch: Val
    head: Val

    @property
    def lane(self) -> Val:
        """The number of the head among those of all sequences."""
        return self.batch * self.cache.heads + self.head

    # --- notes, f32 in memory of the cache's own type -----------------------------------------------------------------

    def load(self, note: int, slot: Val, lanes: int = 0) -> Val:
        """The notes on some slots, or one as a scalar."""
        unit = 4 // SIZES[self.k.dtype]
        found = self.k.load(self._note(note, slot), max(lanes, 1) * unit).bitcast("f32")
        return found if lanes else found.lane(0)

    def store(self, note: int, value: Val, slot: Val) -> None:
        self.k.store(value.splat(value.lanes or 1).bitcast(self.k.dtype), self._note(note, slot))

    def _note(self, note: int, slot: Val) -> Val:
        cache = self.cache
        at = (self.head * NOTES + note) * cache.slots + slot
        whole = cache.keys_size + cache.notes_size
        return self.batch * whole + (at * (4 // SIZES[self.k.dtype]) + cache.keys_size)

    # --- slots --------------------------------------------------------------------------------------------------------

    def move(self, source: Val, to: Val) -> None:
        """What lies in a slot, notes included, into another."""
        self._change(source, to, lambda found, old: found)
        for note in range(NOTES):
            self.store(note, self.load(note, source), to)

    def blend(self, source: Val, to: Val, share: Val) -> None:
        """A slot's key and value go this share (f32) of the way to those of another."""
        def between(found: Val, old: Val) -> Val:
            start = old.to("f32")
            return (found.to("f32") - start).fma(share, start).to(self.k.dtype).to(found.dtype)

        self._change(source, to, between)

    def _change(self, source: Val, to: Val, change: Change) -> None:
        self._change_key(source, to, change)
        self._change_value(source, to, change)

    @property
    def keys(self) -> Buffer:
        """The keys of the head."""
        return self.k.at(self.lane * (self.cache.slots * self.cache.key_size) + self.batch * self.cache.notes_size)

    def key_place(self, slot: Val) -> Val:
        """Where a key begins among ``keys``; further components come a panel of pairs later."""
        cache, panel = self.cache, self.cache.key_panel
        return slot // panel * (panel * cache.key_size) + slot % panel * cache.pair

    def _change_key(self, source: Val, to: Val, change: Change) -> None:
        cache, k, begins = self.cache, self.keys, [self.key_place(slot) for slot in (source, to)]
        with self.kernel.loop(0, cache.key_size // cache.pair) as loop:
            at = loop.index * (cache.key_panel * cache.pair)
            found, old = (k.load(begin + at, cache.pair) for begin in begins)
            k.store(change(found, old), begins[1] + at)

    def _change_value(self, source: Val, to: Val, change: Change) -> None:
        cache, lanes = self.cache, self.kernel.lanes
        v = self.v.at(self.lane * (cache.slots * cache.value_size))
        for start, width in value_panels(cache.value_size, cache.panel):
            for column in range(0, width, lanes):
                if start + column >= cache.vdim:
                    return
                at, into = (slot // cache.pair * (cache.pair * width) + (start * cache.run + column * cache.pair)
                            for slot in (source, to))  # fmt: skip
                found, old = (v.load(place, cache.pair * lanes) for place in (at, into))
                v.store(change(found, old) if cache.pair == 1 else self._half(found, old, source, to, change), into)

    def _half(self, pairs: Val, old: Val, source: Val, to: Val, change: Change) -> Val:
        """``old`` pairs of neighbours, where that of slot ``to`` changes by that of ``source`` in ``pairs``.

        A bf16 is the upper half of an f32, as which both are given to ``change``.
        """
        shifts = [(slot % 2 * 16).to("i32") for slot in (source, to)]
        both = pairs.bitcast("i32"), old.bitcast("i32")
        found, mine = ((x.shift_right_logical(shift) << 16).bitcast("f32") for x, shift in zip(both, shifts))
        changed = change(found, mine).bitcast("i32").shift_right_logical(16) << shifts[1]
        return (both[1] & ~(constant(0xFFFF, "i32") << shifts[1]) | changed).bitcast(pairs.dtype)
