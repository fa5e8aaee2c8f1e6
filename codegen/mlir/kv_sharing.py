"""Which sequences of a call go through a piece of their keys together: neighbours whose pages are the same ones there.

What all of them share is then read once for the queries of all (Hydragen, arXiv:2402.05099; ChunkAttention,
arXiv:2402.15220): each of the tables says it, page by page, whatever made the pages the same. The first of such neighbours
does the work for all; what a row gets does not depend on that.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.kv_spec import AttendBuffers, AttendSpec
from tilewright.codegen.mlir.value import Val, constant
from tilewright.codegen.schedule import AttentionSchedule


@dataclass(frozen=True)
class Sharing:
    """Of ``batch`` sequences at ``start`` (i64 [B]) with ``table`` (i32 [B, width]): ``most`` at a time, from multiples on.

    A piece has ``keys`` keys, the pages of ``entries`` entries.
    """

    kernel: Kernel
    batch: Val
    start: Buffer
    table: Buffer
    width: Val
    keys: int
    entries: int
    most: int

    @staticmethod
    def of(kernel: Kernel, spec: AttendSpec, schedule: AttentionSchedule, batch: Val,
           buffers: AttendBuffers) -> Sharing | None:
        """None where each sequence goes alone."""
        most, keys = spec.together(schedule), spec.piece(schedule)
        if most == 1 or buffers.table is None or buffers.width is None:
            return None
        return Sharing(kernel, batch, buffers.start, buffers.table, buffers.width, keys, keys // spec.cache.run, most)

    def count(self, first: Val, piece: Val) -> Val:
        """How many sequences from ``first`` on go through a piece together; 0 when an earlier one takes that along."""
        kernel = self.kernel
        end = (self.batch - first).min(self._left(first))
        stop = kernel.branch(self._same(first, piece), lambda: [constant(0)], lambda: [
            self._same(first + 1, piece).select(end, constant(1))])[0]
        with kernel.loop(2, stop, carry=[stop.min(constant(2)), constant(True, "bool")]) as others:
            count, unbroken = others.values
            unbroken = unbroken & self._same(first + others.index, piece)
            others.next(count + unbroken.select(constant(1), constant(0)), unbroken)
        return others.results[0]

    def _left(self, sequence: Val) -> Val:
        """Sequences up to the next multiple of ``most``."""
        return constant(self.most) - sequence % self.most

    def _same(self, sequence: Val, piece: Val) -> Val:
        """Whether a sequence has the pages of the one before it, all of whose keys both see."""
        no = constant(False, "bool")

        def seen() -> list[Val]:
            position = self.start.load(sequence).min(self.start.load(sequence - 1)).to("index")
            return self.kernel.branch(position >= (piece + 1) * self.keys, lambda: [self._same_pages(sequence, piece)],
                                      lambda: [no])

        follows = (sequence < self.batch) & (sequence % self.most).ne(0)
        return self.kernel.branch(follows, seen, lambda: [no])[0]

    def _same_pages(self, sequence: Val, piece: Val) -> Val:
        place = sequence * self.width + piece * self.entries
        own, before = (self.table.load(at, self.entries) for at in (place, place - self.width))
        return (own ^ before).reduce("max").eq(0)
