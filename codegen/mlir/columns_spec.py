"""What a linear kernel computes that leaves out small inputs: schedule, layout and tasks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import sympy

from tilewright.codegen.column_packing import LINES, ColumnPacking
from tilewright.codegen.mlir.columns_feed import FACTORS
from tilewright.codegen.mlir.linear_groups import Groups
from tilewright.codegen.mlir.linear_spec import LinearSpec
from tilewright.codegen.schedule import LinearSchedule, Schedule, knob
from tilewright.codegen.target import CpuTarget
from tilewright.ir import Dim, DType, as_dim

WEIGHTS = ("f32", "bf16", "f16", "i8", "i4")
FINISHED = 256
"""Features of a task that puts sums together."""
ROWS = 8
"""Of x that a task copies without its small elements."""
_FEATURES = 64  # of the panels that many rows of x multiply
_SHARED = 8  # tasks that threads share evenly


@dataclass(frozen=True)
class ColumnsSchedule(Schedule):
    """``panel`` features at most and ``depth`` inputs are one task while x has ``rows`` rows or fewer.

    ``unroll`` inputs that count are multiplied together, ``ahead`` more are being fetched.
    """

    name: ClassVar[str] = "columns"
    panel: int = knob(8192, (256, 512, 1024, 2048, 4096, 8192))
    depth: int = knob(256, (64, 128, 256, 512, 1024, 2048))
    rows: int = knob(4, (1, 2, 4))
    unroll: int = knob(8, (1, 2, 4, 8))
    ahead: int = knob(8, (0, 2, 4, 8, 16))


@dataclass(frozen=True)
class ColumnsSpec:
    """A linear kernel behind a threshold; ``m`` are the rows of x."""

    linear: LinearSpec
    m: Dim

    @property
    def stored(self) -> DType:
        """Of the packed weights."""
        return DType(self.linear.weight)

    def schedule(self, target: CpuTarget) -> ColumnsSchedule:
        """A good schedule, by rule: panels as wide as can be, since memory gives long pieces fastest, and enough tasks."""
        wide = ColumnsSchedule(panel=4096 if self.stored is DType.f32 else 8192)
        panels = self.packing(wide).panels
        depth = next((d for d in (512, 256) if panels * (self.linear.k // d) >= _SHARED), 128)
        return replace(wide, depth=depth)

    def dense(self, target: CpuTarget) -> LinearSchedule:
        """How many rows are multiplied."""
        own = self.linear.schedule(target)
        return replace(own, tile_v=self.features // target.lanes, block_m=516, prefetch=0)

    @property
    def groups(self) -> Groups:
        """Of the weights as the kernels see them."""
        return replace(self.linear.groups, factor=FACTORS.get(self.linear.weight, 1.0))

    # --- layout -------------------------------------------------------------------------------------------------------

    @property
    def line(self) -> int:
        """Features of one k in a cache line."""
        return LINES[self.linear.weight]

    @property
    def features(self) -> int:
        """Of the panels that many rows of x multiply, and that results leave in."""
        return max(_FEATURES, self.line)

    def panel(self, schedule: ColumnsSchedule) -> int:
        """Features of a panel: as many in each, in whole cache lines and whole panels of many rows."""
        count = -(-self.linear.n // schedule.panel)
        return -(-self.linear.n // (count * self.features)) * self.features

    def packing(self, schedule: ColumnsSchedule) -> ColumnPacking:
        """The layout in which each weight must come."""
        return ColumnPacking(self.linear.weight, self.linear.n, self.linear.k, self.panel(schedule))

    def depth(self, schedule: ColumnsSchedule) -> int:
        """k's of a task, in whole groups."""
        size = self.linear.groups.size if self.linear.grouped else 1
        return min(max(schedule.depth // size, 1) * size, self.linear.k)

    # --- tasks --------------------------------------------------------------------------------------------------------

    def splits(self, schedule: ColumnsSchedule) -> int:
        """Tasks that share a panel."""
        return -(-self.linear.k // self.depth(schedule))

    def sums(self, schedule: ColumnsSchedule) -> int:
        """f32 sums that one task leaves."""
        return self.linear.parts * schedule.rows * self.panel(schedule)

    def few(self, schedule: ColumnsSchedule) -> Any:
        """1 if x has few rows, else 0."""
        if isinstance(self.m, int):
            return int(self.m <= schedule.rows)
        return sympy.Max(0, sympy.Min(1, schedule.rows + 1 - self.m))

    def tasks(self, schedule: ColumnsSchedule, target: CpuTarget) -> Dim:
        """Of few rows sums of some inputs; of many rows x with its small elements made zero."""
        few = self.packing(schedule).panels * self.splits(schedule)
        return self._either(schedule, few, (self.m + (ROWS - 1)) // ROWS)

    def last(self, schedule: ColumnsSchedule, target: CpuTarget) -> Dim:
        """Of few rows results; of many rows products and results."""
        many = self.linear.tasks(self.dense(target), target, self.m)
        return self._either(schedule, -(-self.linear.n // FINISHED), many)

    def scratch(self, schedule: ColumnsSchedule, target: CpuTarget) -> tuple[Dim, Dim]:
        """Bytes of sums of few rows, and of many rows without small elements."""
        few = self.packing(schedule).panels * self.splits(schedule) * self.sums(schedule) * 4
        many = self.m * self.linear.k * DType(self.linear.x_dtype).size
        return as_dim(few), self._either(schedule, 0, many)

    def _either(self, schedule: ColumnsSchedule, few: Any, many: Any) -> Dim:
        flag = self.few(schedule)
        return as_dim(flag * few + (1 - flag) * many)
