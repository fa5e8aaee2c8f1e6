"""Linear kernels as a cost model sees them, and the schedules worth trying."""

from __future__ import annotations

from collections.abc import Callable

from tilewright.codegen.features import log2
from tilewright.codegen.mlir.linear_lossless import ROWS
from tilewright.codegen.mlir.linear_spec import LinearSpec
from tilewright.codegen.schedule import LinearSchedule, Schedule, Space, registers
from tilewright.codegen.target import CpuTarget

_LOW = 2  # rows of tiles that wait for memory rather than multiply


def linear_space(spec: LinearSpec, target: CpuTarget, rows: int) -> Space:
    """With one row there are no blocks of rows; with many there is nothing to wait for."""
    default = spec.schedule(target)
    idle = {"tile_m", "block_m"} if rows == 1 else {"prefetch", "unroll"} if rows >= default.tile_m else set()
    if rows <= min(LinearSchedule.domains()["block_m"]):
        idle |= {"block_m", "first"}
    narrow = {key: (getattr(default, key),) for key in idle}
    if (spec.compressed or spec.sparse) and target.lanes % ROWS:
        narrow["tile_v"] = tuple(v for v in LinearSchedule.domains()["tile_v"] if v * target.lanes % ROWS == 0)
    longest = next((k for k in LinearSchedule.domains()["block_k"] if k >= spec.k), None)
    if longest:  # one block: longer ones are the same
        narrow["block_k"] = tuple(k for k in LinearSchedule.domains()["block_k"] if k <= longest)
    return Space(LinearSchedule, target, default, narrow)


def linear_features(spec: LinearSpec, target: CpuTarget, rows: int, tail: int) -> Callable[[Schedule], dict[str, float]]:
    """``rows`` of x; ``tail``: operations of the epilogue."""
    bits = spec.packing(spec.schedule(target), target).bits
    fixed = {
        "rows": log2(rows), "n": log2(spec.n), "k": log2(spec.k), "parts": float(spec.parts), "tail": float(tail),
        "bits": float(bits), "group": log2(spec.group), "dynamic": float(spec.dynamic),
        "asymmetric": float(spec.asymmetric), "x_bytes": float(_BYTES[spec.x_dtype]),
    }  # fmt: skip

    def describe(schedule: Schedule) -> dict[str, float]:
        assert isinstance(schedule, LinearSchedule)
        panel, tile = spec.panel(schedule, target), min(schedule.tile_m, rows)
        panels, blocks = -(-spec.n // panel), -(-rows // schedule.block_m)
        height = -(-rows // blocks)
        depth = min(schedule.block_k, spec.k)
        return {
            **fixed,
            "tasks": float(panels * blocks),
            "sums": float(tile * schedule.tile_v),
            "registers": (tile + 1) * schedule.tile_v / registers(target),
            "padding": panels * panel / spec.n,
            "row_padding": -(-height // tile) * tile * blocks / rows,
            "k_blocks": float(-(-spec.k // depth)),
            "panel_bytes": log2(panel * depth * bits / 8),
            "x_block_bytes": log2(height * (spec.k if schedule.first == "rows" else depth) * _BYTES[spec.x_dtype]),
            "sums_bytes": log2(4 * height * panel),
            "weight_bytes": log2(spec.n * spec.k * spec.parts * bits / 8),
            "weight_reads": float(blocks),
        }

    return describe


_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "i8": 1}
