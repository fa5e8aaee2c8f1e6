"""Where the positions of a sequence lie in a GPU's cache: in its own region in order, or in pages by a table."""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.codegen.cuda.evaluate import Writer
from tilewright.codegen.cuda.source import Source
from tilewright.codegen.index_shapes import size
from tilewright.ir import CONTIGUOUS, KVType, Layout, Paged, ops


@dataclass(frozen=True)
class Places:
    """Positions up to ``length``. Pages come with ``table``, C for i32 ``[B, width]``."""

    length: int
    layout: Layout = CONTIGUOUS
    table: str = ""
    width: str = ""

    @classmethod
    def of(cls, source: Source, op: ops.Append | ops.Attend) -> Places:
        """Those of the cache that an operation looks into."""
        kind: KVType = op.cache.cache
        if op.table is None:
            return cls(kind.length)
        return cls(kind.length, kind.layout, source.pointers[op.table], Writer().number(size(op.table.shape[1])))

    @property
    def room(self) -> str:
        """C: how many positions a sequence has a place for."""
        if isinstance(self.layout, Paged):
            return f"tw_min({self.length}, {self.width} * {self.layout.page})"
        return str(self.length)

    def place(self, batch: str, position: str) -> tuple[str, str]:
        """C: the region and the slot there of a position that there is room for, all i64."""
        if not isinstance(self.layout, Paged):
            return batch, position
        page = self.layout.page
        return f"(i64)__ldg({self.table} + {batch} * {self.width} + {position} / {page})", f"({position} % {page})"
