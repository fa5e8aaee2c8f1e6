"""The knobs of linear layers on a GPU. What they mean for a layer is in linear_forms.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tilewright.codegen.cuda.target import CudaTarget
from tilewright.codegen.schedule import Schedule, constraint, knob

MOST_SUMS = 128
"""That a thread keeps; its other registers are for fragments and addresses."""


@dataclass(frozen=True)
class CudaLinearSchedule(Schedule):
    """Tiles of a linear layer, by how many rows there are.

    Up to 8 rows: ``few_warps`` of a block divide K, each over ``few_n`` features, ``few_bytes`` of each at a time and
    ``few_stages`` of these under way. Up to 512 rows: a warp has ``some_n`` features and up to 64 rows; the ``some_warps``
    and, up to 128 rows, ``fill`` blocks for each multiprocessor divide K. Else a block of ``warps_m * warps_n`` has
    ``block_m`` rows and ``block_n`` features, fewer where these do not fit the registers. ``some_k`` and ``block_k`` are
    elements of K of a stage.
    """

    name: ClassVar[str] = "cuda_linear"
    few_n: int = knob(16, (16, 32, 64))
    few_warps: int = knob(8, (2, 4, 8, 16))
    few_bytes: int = knob(64, (64, 128, 256))
    few_stages: int = knob(4, (2, 3, 4, 6, 8))
    some_n: int = knob(32, (16, 32, 64))
    some_warps: int = knob(8, (4, 8, 16))
    some_k: int = knob(64, (32, 64, 128))
    some_stages: int = knob(4, (2, 3, 4, 6))
    fill: int = knob(1, (0, 1, 2, 4))
    block_m: int = knob(128, (64, 128, 256))
    block_n: int = knob(128, (64, 128, 256))
    block_k: int = knob(64, (32, 64, 128))
    stages: int = knob(3, (2, 3, 4, 5))
    warps_m: int = knob(2, (1, 2, 4))
    warps_n: int = knob(4, (1, 2, 4))

    @constraint
    def keeps_sums_in_registers(self, target: CudaTarget) -> str | None:
        sums = self.block_m * self.block_n // (32 * self.warps_m * self.warps_n)
        return f"{sums} sums a thread, at most {MOST_SUMS}" if sums > MOST_SUMS else None

    @constraint
    def fills_warps(self, target: CudaTarget) -> str | None:
        if self.block_n < 16 * self.warps_n:
            return f"{self.warps_n} warps share {self.block_n} features, by 16"
        return None
