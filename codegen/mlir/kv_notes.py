"""One head of kept tokens: the notes on its slots, and moving what lies in one slot to another (see `CacheLayout`)."""

from dataclasses import dataclass

from tilewright.codegen.cache import CacheLayout, value_panels
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.value import SIZES, Val, constant
from tilewright.ir.kv_kept import NOTES

WORTH, POSITION = range(NOTES)


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
        self._move_key(source, to)
        self._move_value(source, to)
        for note in range(NOTES):
            self.store(note, self.load(note, source), to)

    def _move_key(self, source: Val, to: Val) -> None:
        cache, panel = self.cache, self.cache.key_panel
        k = self.k.at(self.lane * (cache.slots * cache.key_size) + self.batch * cache.notes_size)
        begins = [slot // panel * (panel * cache.key_size) + slot % panel * cache.pair for slot in (source, to)]
        with self.kernel.loop(0, cache.key_size // cache.pair) as loop:
            at = loop.index * (panel * cache.pair)
            k.store(k.load(begins[0] + at, cache.pair), begins[1] + at)

    def _move_value(self, source: Val, to: Val) -> None:
        cache, lanes = self.cache, self.kernel.lanes
        v = self.v.at(self.lane * (cache.slots * cache.value_size))
        for start, width in value_panels(cache.value_size, cache.panel):
            for column in range(0, width, lanes):
                if start + column >= cache.vdim:
                    return
                at, into = (slot // cache.pair * (cache.pair * width) + (start * cache.run + column * cache.pair)
                            for slot in (source, to))  # fmt: skip
                found = v.load(at, cache.pair * lanes)
                v.store(found if cache.pair == 1 else self._half(found, v.load(into, 2 * lanes), source, to), into)

    def _half(self, pairs: Val, old: Val, source: Val, to: Val) -> Val:
        """``old`` pairs of neighbours with the one of slot ``to`` from ``pairs``, where it is that of ``source``."""
        found = pairs.bitcast("i32").shift_right_logical((source % 2 * 16).to("i32")) & 0xFFFF
        place = (to % 2 * 16).to("i32")
        kept = old.bitcast("i32") & ~(constant(0xFFFF, "i32") << place)
        return (kept | (found << place)).bitcast(pairs.dtype)
