"""What a kernel that chooses blocks of keys is: its facts while compiling, and its arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tilewright.codegen.attention_pattern import DENSE, Slice
from tilewright.codegen.cache import CacheLayout
from tilewright.codegen.cache_codes import CodeLayout
from tilewright.codegen.cache_slots import round_up
from tilewright.codegen.mlir.builder import Buffer
from tilewright.codegen.mlir.value import Val
from tilewright.codegen.schedule import AttentionSchedule
from tilewright.ir import ops

_ARRAYS = 6
_VECTOR = 16


@dataclass(frozen=True)
class ChooseSpec:
    """``op`` over a cache in the layout ``cache``; q lies at ``q``, and so many ``rows`` are estimated at a time."""

    op: ops.Choose
    cache: CacheLayout | CodeLayout
    rows: int
    q: Slice = DENSE

    @classmethod
    def of(cls, op: ops.Choose, cache: CacheLayout | CodeLayout, schedule: AttentionSchedule, q: Slice) -> ChooseSpec:
        group = int(op.q.shape[2]) // cache.heads
        return cls(op, cache, max(schedule.rows // group, 1) * group, q)

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return int(self.op.q.shape[2]) // self.cache.heads

    @property
    def estimates(self) -> bool:
        """Whether some head looks at keys."""
        return any(kind != "a-shape" for kind in self.op.kinds)

    @property
    def most(self) -> int:
        """The most blocks of a list."""
        return int(self.op.result.shape[3]) - 1

    @property
    def row(self) -> int:
        """Elements of an array with one for each block: a diagonal may begin some blocks further on."""
        further = max(self.op.sample, self.op.queries) // self.op.block + 2
        return round_up(self.most + further, _VECTOR) + _VECTOR

    @property
    def task_size(self) -> int:
        """f32 elements that a task takes: arrays, then tops and sums of each row's blocks."""
        return self.row * (_ARRAYS + 2 * self.rows * self.estimates)

    def rows_at(self, sums: bool) -> int:
        """Where the arrays of tops, or those of sums, of all rows begin."""
        return self.row * (_ARRAYS + self.rows * sums)

    def tasks(self, b: Any) -> Any:
        """Number of tasks."""
        return b * self.cache.heads

    def scratch(self, b: Any) -> Any:
        """Bytes of what tasks keep."""
        return b * self.cache.heads * self.task_size * 4


@dataclass(frozen=True)
class ChooseBuffers:
    """Arguments of the kernel: q, the cache, ``start`` i64 [B], the result, f32 memory, and perhaps a table of pages."""

    q: Buffer
    k: Buffer
    v: Buffer
    start: Buffer
    out: Buffer
    memory: Buffer
    table: Buffer | None = None
    width: Val | None = None
