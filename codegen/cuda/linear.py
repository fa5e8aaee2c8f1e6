"""IR kernels around ``nn.linear`` and ``nn.gated_linear`` -> CUDA, with what comes after in the epilogue.

Tensor cores multiply 16-bit floats by 16-bit floats or codes, and 8-bit codes by codes; f32 and the rest are multiplied
plainly. A kernel holds a function for each range of numbers of rows that it may run with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

from tilewright.codegen.cuda.linear_forms import (
    FEW,
    SOME,
    SOME_ROWS,
    SPLIT_ROWS,
    Form,
    Tile,
    default_schedule,
    form_for,
    forms,
    refusal,
)
from tilewright.codegen.cuda.linear_layer import Layer, Struct, plain_reason
from tilewright.codegen.cuda.linear_layer import refusal as pattern_refusal
from tilewright.codegen.cuda.linear_schedule import CudaLinearSchedule
from tilewright.codegen.cuda.source import Source
from tilewright.codegen.cuda.target import CudaTarget
from tilewright.codegen.features import log2
from tilewright.codegen.index import floor_div
from tilewright.codegen.index_shapes import as_dim, size
from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.linear_pattern import Pattern, find
from tilewright.codegen.schedule import Schedule, Space
from tilewright.ir import CodegenError, Dim, Function, eval_dim

_ADDING_THREADS = 256
_RESIDENT = 2048  # threads of a multiprocessor


class CudaLinearEmitter:
    """Linear layers, plain and gated, of floats or of quantized weights and activations, with elementwise epilogues."""

    name: ClassVar[str] = "cuda.linear"

    def match(self, kernel: Function, target: CudaTarget) -> str | None:
        found = find(kernel, pattern_refusal)
        return found if isinstance(found, str) else None

    def default_schedule(self, kernel: Function, target: CudaTarget) -> CudaLinearSchedule:
        found = find(kernel, pattern_refusal)
        if isinstance(found, str):
            return CudaLinearSchedule()
        return default_schedule(Layer.of(found), target, plain_reason(found) is None)

    def space(self, kernel: Function, target: CudaTarget, sizes: Mapping[str, int]) -> Space:
        found, default = matched(kernel), self.default_schedule(kernel, target)
        rows, fast = eval_dim(found.rows, sizes), plain_reason(found) is None
        matter = knobs_for(rows, fast)
        fixed = {key: () for key in CudaLinearSchedule.domains() if key not in matter}
        return Space(CudaLinearSchedule, target, default, fixed, lambda s: refusal(needed(found, s, target), target))

    def layouts(self, kernel: Function, target: CudaTarget) -> Callable[[Schedule], Mapping[int, str]]:
        return lambda schedule: {}

    def features(self, kernel: Function, target: CudaTarget, sizes: Mapping[str, int]
                 ) -> Callable[[Schedule], dict[str, float]]:  # fmt: skip
        found = matched(kernel)
        rows = eval_dim(found.rows, sizes)

        def describe(schedule: Schedule) -> dict[str, float]:
            assert isinstance(schedule, CudaLinearSchedule)
            form = form_for(forms(Layer.of(found), schedule, target, plain_reason(found) is None), rows)
            return {"tail": float(len(found.tail)), **of_form(form, target, rows)}

        return describe

    def emit(self, kernel: Function, schedule: Schedule, target: CudaTarget, symbol: str) -> KernelCode:
        found = find(kernel, pattern_refusal)
        if isinstance(found, str) or not isinstance(schedule, CudaLinearSchedule):
            raise CodegenError(f"{self.name} cannot lower @{kernel.name} with {schedule}: {found}")
        chosen, fast = needed(found, schedule, target), plain_reason(found) is None
        if reason := schedule.refusal(target) or refusal(chosen, target):
            raise CodegenError(f"{schedule} on {target}: {reason}", found.anchor.loc)
        source = Source(kernel, symbol, target)
        partial = [4 * f.splits * f.layer.parts * f.layer.n * f.most for f in chosen if f.splits > 1]
        source.scratch = (max(partial),) if partial else ()
        source.parts += [library(fast), Struct(source, found, fast).text]
        for form in chosen:
            launch(source, form, found.rows)
        return source.code()


def matched(kernel: Function) -> Pattern:
    """The pattern of a kernel that ``match`` accepts."""
    found = find(kernel, pattern_refusal)
    if isinstance(found, str):
        raise CodegenError(f"@{kernel.name} is no linear kernel: {found}")
    return found


def library(on_tensor_cores: bool) -> str:
    """The C that the struct of a layer goes into."""
    names = ("linear.cuh", "linear_stream.cuh", "linear_mma.cuh") if on_tensor_cores else ("linear_plain.cuh",)
    return "".join((Path(__file__).parent / name).read_text() for name in names)


def needed(found: Pattern, schedule: CudaLinearSchedule, target: CudaTarget) -> list[Form]:
    """All forms, or the one for the number of rows that there will be."""
    every = forms(Layer.of(found), schedule, target, plain_reason(found) is None)
    return [form_for(every, found.rows)] if isinstance(found.rows, int) else every


def launch(source: Source, form: Form, rows: Dim) -> None:
    """Add a form's grid, and the function unless it is that of a form before; then one that adds up splits."""
    when = None if isinstance(rows, int) else (rows, form.least, form.most)
    layer = f"(tw_layer{{{source.passed}}});"
    grid = tiles(rows, form.m), -(-form.layer.n // form.n), form.splits
    source.function([f"{form.call}{layer}"], form.threads, grid, form.shared, when, form.resident)
    if form.splits > 1:
        blocks = tiles(as_dim(size(rows) * form.layer.n), _ADDING_THREADS)
        body = [f"tw_add_splits<tw_layer, {form.splits}>{layer}"]
        source.function(body, _ADDING_THREADS, (blocks, 1, 1), 0, when)


def tiles(count: Dim, each: int) -> Dim:
    """How many tiles cover ``count``."""
    return as_dim(floor_div(size(count) + (each - 1), each))


def knobs_for(rows: int, on_tensor_cores: bool) -> set[str]:
    """What makes a difference with so many rows."""
    if rows <= FEW[-1]:
        return {"few_n", "few_warps"} | ({"few_bytes", "few_stages"} if on_tensor_cores else set())
    if not on_tensor_cores:
        return {"block_m", "block_n"} if rows > SOME[-1] else set()
    if rows <= SOME_ROWS:
        return {"some_n", "some_warps", "some_k", "some_stages"} | ({"fill"} if rows <= SPLIT_ROWS else set())
    return {"block_m", "block_n", "block_k", "stages", "warps_m", "warps_n"}


def of_form(form: Form, target: CudaTarget, rows: int) -> dict[str, float]:
    """What a cost model gets to see of a form: sizes, waste, traffic, how the GPU is filled."""
    layer, blocks = form.layer, form.blocks(rows)
    at_once = min(target.shared_bytes // max(form.shared, 1), _RESIDENT // form.threads)
    waves = blocks / (target.multiprocessors * max(at_once, 1))
    row_blocks, column_blocks = -(-rows // form.m), -(-layer.n // form.n)
    return {
        "rows": log2(rows), "n": log2(layer.n), "k": log2(layer.k), "bits": float(layer.bits), "parts": float(layer.parts),
        "x_bits": float(layer.x_bits), "group": log2(layer.group if layer.grouped else 0), "shifted": float(layer.shifted),
        "tensor_cores": float(isinstance(form, Tile)), "block_threads": log2(form.threads), "sums": float(form.sums),
        "shared": log2(form.shared), "splits": float(form.splits), "tasks": float(blocks), "waves": waves,
        "last_wave": math.ceil(waves) / waves, "row_waste": row_blocks * form.m / rows,
        "column_waste": column_blocks * form.n / layer.n, "weight_bytes": log2(layer.weight_bytes),
        "weight_reads": float(row_blocks), "x_reads": float(column_blocks),
        "x_traffic": log2(column_blocks * rows * layer.k * layer.x_bits / 8),
        "block_flops": log2(2.0 * form.m * form.n * layer.parts * layer.k / form.splits),
        "under_way": log2(form.under_way * min(at_once, math.ceil(blocks / target.multiprocessors))),
    }  # fmt: skip
