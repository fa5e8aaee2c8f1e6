"""What a linear kernel computes, and the layouts that its weights come in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tilewright.codegen.mlir import math
from tilewright.codegen.mlir.linear_codes import CODES, is_integer
from tilewright.codegen.mlir.linear_groups import Groups
from tilewright.codegen.mlir.narrow import F8_FACTORS
from tilewright.codegen.mlir.value import Val, constant
from tilewright.codegen.packing import AnyPacking, Packing, RowPacking, code_pair
from tilewright.codegen.schedule import LinearSchedule
from tilewright.codegen.target import CpuTarget
from tilewright.ir.ops.sparse_expand import MaskLayout

_SHARED = 28  # panels that threads share evenly
_SPARSEST = 0.4  # share of numbers up to which masks are so much of what is read that fetching far ahead disturbs
_CACHED = 4 << 20  # bytes of a weight that may well be read again for each block of rows
_FLOATS = ("f32", "bf16", "f16")
_SCALES = ("f32", "f16", "f8e8m0")


def _relu(x: Val) -> Val:
    return constant(0.0, "f32", x.lanes).max(x)


ACTIVATIONS: dict[str, Callable[[Val], Val]] = {**math.FUNCTIONS, "relu": _relu}


@dataclass(frozen=True)
class LinearSpec:
    """What a linear kernel computes; M is a dim of the kernel, everything else is static.

    ``weight`` is f32, bf16, f16, or codes: i8, i4, i3, i2 (symmetric), u8, u4, u3, u2 (with a u8 zero point, or else an f32
    ``offset``), f8e4m3, f8e5m2, f4e2m1, one ``scale`` (f32, f16 or f8e8m0) for each ``group`` of k's, 0 being a whole row.
    With a ``table`` (of that element type) unsigned codes of four bits or fewer are places in it, and there may be no
    scale; ``row_tables``: each row has a table of its own (see linear_rows.py). ``x_dtype`` i8 are codes too, with one f32
    scale a row. ``expands``: codes expand to i8 by u8 steps, one for each so many k's (see linear_expand.py). ``gated``:
    two weights g and u, and ``activation(x @ g.T) * (x @ u.T)``. Strides and offsets, in elements, place x and y inside
    wider rows (0 = dense). ``compressed`` bf16 weights are decompressed a panel at a time (see linear_lossless.py), those
    with a layout ``sparse`` expanded, of which they keep a share ``kept`` (see linear_sparse.py).
    """

    n: int
    k: int
    x_dtype: str = "f32"
    weight: str = "f32"
    out_dtype: str = "f32"
    bias: str | None = None
    activation: str | None = None
    gated: bool = False
    group: int = 0
    scale: str | None = "f32"
    x_stride: int = 0
    x_offset: int = 0
    y_stride: int = 0
    y_offset: int = 0
    compressed: bool = False
    table: str | None = None
    row_tables: bool = False
    expands: int = 0
    offset: bool = False
    sparse: MaskLayout | None = None
    kept: float = 1.0

    def __post_init__(self) -> None:
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; known: {', '.join(sorted(ACTIVATIONS))}")
        if self.gated and self.activation is None:
            raise ValueError("a gated linear needs an activation")
        if reason := self.refusal():
            raise ValueError(reason)

    def refusal(self) -> str | None:
        """What of the quantization the kernels do not do."""
        if self.sparse and (self.table or self.expands or self.weight != self.sparse.dtype.value):
            return f"sparse weights of {self.weight} with tables or steps"
        if self.dynamic and (not is_integer(self.weight) or self.table):
            return f"int8 activations with {f'a table of {self.table}' if self.table else self.weight} weights"
        if not self.coded:
            return None if self.weight in _FLOATS else f"no kernel for {self.weight} weights"
        if self.table and (self.table not in _FLOATS or self.bits > 4):
            return f"no kernel for {self.weight} codes with a table of {self.table}"
        if self.row_tables and self.groups.count > 1:
            return "scales of groups beside a table for each row"
        if self.scale not in _SCALES and not (self.table and self.scale is None and self.groups.count == 1):
            return f"no kernel for {self.scale} scales"
        if self.expands:
            return self._expand_refusal()
        step = code_pair(self.bits)
        size = self.groups.size
        if (self.group and self.k % self.group) or (self.grouped and size % step):
            return f"groups of {size} do not divide K = {self.k} into multiples of {step}"
        most = (1 << 31) // (((1 << self.bits) - 1) * 128)  # products that surely fit i32
        if self.dynamic and self.groups.size > most:
            return f"{self.groups.size} products of codes may overflow; at most {most}"
        return None

    def _expand_refusal(self) -> str | None:
        if not self.dynamic:
            return f"codes that expand to i8 with {self.x_dtype} activations"
        if self.k % self.expands or self.expands % code_pair(self.bits):
            return f"groups of {self.expands} do not divide K = {self.k} into multiples of {code_pair(self.bits)}"
        return f"{self.k} products of codes may overflow" if self.k > (1 << 31) // (255 * 128) else None

    @property
    def parts(self) -> int:
        """How many weights: 2 when gated."""
        return 2 if self.gated else 1

    @property
    def coded(self) -> bool:
        """Whether weights are codes with scales."""
        return self.weight in CODES

    @property
    def bits(self) -> int:
        """Of a code; 0 when weights are none."""
        return CODES.get(self.weight, 0)

    @property
    def dynamic(self) -> bool:
        """Whether x is int8 codes with a scale a row."""
        return self.x_dtype == "i8"

    @property
    def has_zeros(self) -> bool:
        """Whether codes have zero points."""
        return self.weight.startswith("u") and self.table is None and not self.offset

    @property
    def asymmetric(self) -> bool:
        """Whether what is multiplied has zero points."""
        return self.has_zeros and not self.expands

    @property
    def grouped(self) -> bool:
        """Whether sums of groups are scaled while sums of rows are made."""
        return self.coded and (self.groups.count > 1 or self.offset)

    @property
    def groups(self) -> Groups:
        """Of what is multiplied."""
        if self.expands:
            return Groups(self.k, 1, 8)
        size = self.group or self.k
        return Groups(size, self.k // size if size else 1, self.bits, F8_FACTORS.get(self.weight, 1.0))

    def schedule(self, target: CpuTarget) -> LinearSchedule:
        """A good schedule, by rule: narrow panels where wide ones would be too few to share evenly.

        With small weights a thread finishes its rows, which the next kernel then finds in its cache. Groups and codes of
        few bits take their time between memory accesses, for which the hardware fetches ahead by itself.
        """
        grouped = self.grouped
        wide = LinearSchedule.default(target)
        busy = grouped or (self.coded and (CODES[self.weight] < 4 or not self.dynamic))
        if target.vector_bits == 512 and not busy:
            wide = replace(wide, prefetch=2048)
        if self.dynamic and self.bits == 8 and not grouped and not target.has_vnni:
            wide = replace(wide, tile_m=4)  # both factors of 16-bit products take registers
        if self.dynamic or self.asymmetric or self.offset or self.parts * self.packing(wide, target).nbytes <= _CACHED:
            wide = replace(wide, first="rows")  # the sums of x are found once a block of rows
        if self.sparse and target.vector_bits == 512 and not grouped:
            wide = replace(wide, prefetch=8192 if self.kept > _SPARSEST else 2048)
        if self.expands or self.sparse:
            wide = replace(wide, block_m=516 if self.sparse else 240)  # each block of rows expands the weights once
        enough = _SHARED // 2 if grouped else _SHARED
        return wide if self.n >= enough * self.panel(wide, target) else replace(wide, tile_v=2)

    def panel(self, schedule: LinearSchedule, target: CpuTarget) -> int:
        """Output features of one panel."""
        return schedule.tile_v * target.lanes

    def packing(self, schedule: LinearSchedule, target: CpuTarget) -> AnyPacking:
        """The layout in which each weight must come."""
        if self.row_tables:
            return RowPacking(self.weight, self.n, self.k, self.panel(schedule, target), target.lanes)
        pair = code_pair(self.bits) if self.coded else 0
        split = self.coded and not self.dynamic
        return Packing(self.weight, self.n, self.k, self.panel(schedule, target), pair, split)

    @property
    def steps(self) -> Groups:
        """The groups that expand together."""
        return Groups(self.expands, self.k // self.expands, self.bits)

    def group_packing(self, dtype: str, schedule: LinearSchedule, target: CpuTarget) -> Packing:
        """The layout of scales and zero points, ``dtype`` [N, G]."""
        return Packing(dtype, self.n, self.groups.count, self.panel(schedule, target), 1)

    def step_packing(self, schedule: LinearSchedule, target: CpuTarget, most: int = 0) -> Packing:
        """The layout of the steps that codes expand by, and of the zero points with them."""
        return Packing("u8", self.n, self.steps.count, self.panel(schedule, target), 1, most=most)

    def tasks(self, schedule: LinearSchedule, target: CpuTarget, m: Any) -> Any:
        """Number of tasks for ``m`` rows: an int, or an expression when ``m`` is symbolic."""
        return self.packing(schedule, target).panels * -(-m // schedule.block_m)
