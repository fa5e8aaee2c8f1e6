"""IR kernels around ``nn.attention``, ``kv.attend`` and ``kv.append`` -> CUDA.

Operands may come through any operations that compute elements one by one: slices of a fused projection, rotations, casts.
Attention of 16-bit floats runs in tensor cores; f32, mixed types and very large heads take the plain form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from tilewright.codegen import reads as rd
from tilewright.codegen.attention_pattern import DTYPES, KINDS, find, static, tensors
from tilewright.codegen.cache import cache_layout
from tilewright.codegen.cuda import cache
from tilewright.codegen.cuda.attention_append import emit_append
from tilewright.codegen.cuda.attention_problem import Problem, library, sight_of
from tilewright.codegen.cuda.attention_schedule import Codes, CudaAttentionSchedule, Heads, Tiling, default_schedule
from tilewright.codegen.cuda.cache_codes import CodeRows
from tilewright.codegen.cuda.loops import refusal
from tilewright.codegen.cuda.source import Source
from tilewright.codegen.cuda.target import CudaTarget
from tilewright.codegen.features import log2
from tilewright.codegen.index import floor_div
from tilewright.codegen.index_shapes import as_dim, size
from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.schedule import Schedule, Space
from tilewright.ir import Argument, CodegenError, Dim, Function, Op, Value, eval_dim, ops, product

_COMBINING_THREADS = 128
_CACHE_FIELDS = ("q", "k", "v", "cache", "start", "table", "bias", "sinks", "scale", "window", "chunk", "softcap")


class CudaAttentionEmitter:
    """Attention over tensors or a cache, and appending to a cache."""

    name: ClassVar[str] = "cuda.attention"

    def match(self, kernel: Function, target: CudaTarget) -> str | None:
        found = find(kernel, is_elementwise)
        if isinstance(found, str):
            return found
        if not isinstance(found, (ops.Attention, ops.Attend, ops.Append)):
            return f"no {found.name} on a GPU"
        if isinstance(found, ops.Attend) and found.blocks is not None:
            return "no kernel for attention over chosen blocks"
        if not isinstance(found, ops.Attention) and (reason := refusal_of_cache(found)):
            return reason
        if reason := next((reason for op in kernel.body if is_elementwise(op) and (reason := refusal(op))), None):
            return reason
        if isinstance(found, ops.Attention) and found.first:
            return f"no kernel for the first {found.first} tokens beside a window"
        narrow = [v for v in tensors(found) if v.dtype.value not in DTYPES]
        if narrow or isinstance(found, ops.Append):
            return f"no attention of {narrow[0].dtype.value}" if narrow else None
        return Tiling(self.default_schedule(kernel, target), heads_of(found)).refusal(target)

    def default_schedule(self, kernel: Function, target: CudaTarget) -> CudaAttentionSchedule:
        op = find(kernel, is_elementwise)
        if not isinstance(op, (ops.Attention, ops.Attend)):
            return CudaAttentionSchedule()
        length = static(sight_of(op).length)
        return default_schedule(heads_of(op), static(op.q.shape[1]), length, refusal_of_mma(op) is None, target)

    def space(self, kernel: Function, target: CudaTarget, sizes: Mapping[str, int]) -> Space:
        op, default = find(kernel, is_elementwise), self.default_schedule(kernel, target)
        if not isinstance(op, (ops.Attention, ops.Attend)):
            return Space(CudaAttentionSchedule, target, default, {k: () for k in CudaAttentionSchedule.domains()})
        most = max(eval_dim(sight_of(op).length, sizes) // (2 * default.keys), 1)
        domains = {
            "form": ("plain",) if refusal_of_mma(op) else ("mma", "plain"),
            "parts": tuple(n for n in CudaAttentionSchedule.domains()["parts"] if n <= most),
        }
        heads = heads_of(op)
        return Space(CudaAttentionSchedule, target, default, domains, lambda s: Tiling(s, heads).refusal(target))

    def layouts(self, kernel: Function, target: CudaTarget) -> Callable[[Schedule], Mapping[int, str]]:
        return lambda schedule: {}

    def features(self, kernel: Function, target: CudaTarget, sizes: Mapping[str, int]
                 ) -> Callable[[Schedule], dict[str, float]]:  # fmt: skip
        op = find(kernel, is_elementwise)
        assert isinstance(op, KINDS)
        return lambda schedule: _features(op, schedule, target, sizes)

    def emit(self, kernel: Function, schedule: Schedule, target: CudaTarget, symbol: str) -> KernelCode:
        if (reason := self.match(kernel, target)) or not isinstance(schedule, CudaAttentionSchedule):
            raise CodegenError(f"{self.name} cannot lower @{kernel.name} with {schedule}: {reason}")
        op, source = find(kernel, is_elementwise), Source(kernel, symbol, target)
        if isinstance(op, ops.Append):
            emit_append(source, op, cache_layout(op.cache.cache, target))
        else:
            assert isinstance(op, (ops.Attention, ops.Attend))
            _emit_attention(source, op, schedule)
        return source.code()


def is_elementwise(op: Op) -> bool:
    """Whether an operand's elements can be computed one by one, where they are needed."""
    return rd.is_plain(op) or isinstance(op, (*rd.CREATION, *rd.PIECES, ops.Rope))


def refusal_of_cache(op: ops.Append | ops.Attend) -> str | None:
    """Why an operation on a cache has no form here, or None."""
    if reason := cache.refusal(op.cache.cache):
        return reason
    if op.table is not None and not isinstance(op.table, Argument):
        return "a table of pages that is computed in the kernel"
    others = [f.name for f in op.fields if f.name not in _CACHE_FIELDS and getattr(op, f.name) != f.default]
    return f"no {op.name} with {others[0]} on a GPU" if others else None


def heads_of(op: ops.Attention | ops.Attend) -> Heads:
    if not isinstance(op, ops.Attend):
        heads, codes = int(op.k.shape[2]), None
    else:
        layout, heads = cache.CudaCacheLayout.of(op.cache.cache), op.cache.cache.heads
        keys, values = layout.keys, layout.values
        coded = isinstance(keys, CodeRows)
        codes = Codes(keys.bits, keys.row, values.row, keys.scale_bytes) if coded else None
    return Heads(heads, int(op.q.shape[2]) // heads, int(op.q.shape[3]), int(op.result.shape[3]), codes)


def refusal_of_mma(op: ops.Attention | ops.Attend) -> str | None:
    """Why tensor cores cannot run ``op`` exactly enough, or None."""
    heads = heads_of(op)
    stored: list[Value] = [op.q, *[op.cache] * (not heads.codes)] if isinstance(op, ops.Attend) else [op.q, op.k, op.v]
    if op.q.dtype.value == "f32" or any(v.dtype is not op.q.dtype for v in stored):
        return f"tensor cores multiply 16-bit floats of one type, not {', '.join(v.dtype.value for v in stored)}"
    return None if heads.fits_tensor_cores else "heads too large for the registers"


def _emit_attention(source: Source, op: ops.Attention | ops.Attend, schedule: CudaAttentionSchedule) -> None:
    heads = heads_of(op)
    tiling, target = Tiling(schedule, heads), source.target
    reason = schedule.refusal(target) or (refusal_of_mma(op) if tiling.is_mma else None) or tiling.refusal(target)
    if reason:
        raise CodegenError(f"{schedule} on {target}: {reason}", op.loc)
    batch, queries = op.q.shape[:2]
    rows = product((batch, heads.heads, queries, heads.group))
    blocks = product((batch, heads.heads, _tiles(queries, heads, schedule)))
    parts = tiling.parts(blocks, target)
    if schedule.parts > 1:
        source.scratch = (product((rows, parts, 4 * tiling.constants["RECORD"])),)
    layout = cache_layout(op.cache.cache, target) if isinstance(op, ops.Attend) else None
    source.parts += [library(schedule.form, heads.codes is not None), Problem(source, op, tiling, parts, layout).text]
    problem, grid = f"tw_problem{{{source.passed}}}", (blocks, 1, parts)
    source.function([f"tw_attend_{schedule.form}({problem});"], 32 * schedule.warps, grid, tiling.shared_bytes)
    if schedule.parts > 1:
        source.function([f"tw_combine({problem});"], _COMBINING_THREADS, (rows, 1, 1))


def _tiles(queries: Dim, heads: Heads, schedule: CudaAttentionSchedule) -> Dim:
    """Row tiles of one key head of one sequence."""
    return as_dim(floor_div(size(queries) * heads.group + (schedule.rows - 1), schedule.rows))


def _features(op: Op, schedule: Schedule, target: CudaTarget, sizes: Mapping[str, int]) -> dict[str, float]:
    """What a cost model sees of attention."""
    assert isinstance(schedule, CudaAttentionSchedule)
    if not isinstance(op, (ops.Attention, ops.Attend)):
        count = eval_dim(product(op.operands[1].shape[:3]), sizes)
        return {"tasks": float(count), "kind": 0.0}
    heads, sight = heads_of(op), sight_of(op)
    tiling = Tiling(schedule, heads)
    batch, queries, length = (eval_dim(d, sizes) for d in (*op.q.shape[:2], sight.length))
    tiles = eval_dim(_tiles(queries, heads, schedule), sizes)
    blocks = batch * heads.heads * tiles
    parts = eval_dim(tiling.parts(blocks, target), {})
    blocks *= parts
    resident = max(min(target.shared_bytes // tiling.shared_bytes, 2048 // (32 * schedule.warps)), 1)
    return {
        "kind": 1.0 + isinstance(op, ops.Attend), "tasks": float(blocks), "queries": log2(queries), "length": log2(length),
        "heads": float(heads.heads), "group": float(heads.group), "dim": float(heads.dim), "vdim": float(heads.vdim),
        "bits": float(op.q.dtype.bits), "causal": float(sight.causal), "window": log2(sight.window),
        "extras": float(sum(v is not None for v in (op.bias, op.sinks, sight.mask, sight.padding))),
        "shared": log2(tiling.shared_bytes), "resident": float(resident), "accumulators": float(tiling.accumulators),
        "holds_queries": float(tiling.holds_queries), "stage_bytes": log2(tiling.stage_bytes * tiling.slices),
        "steps": log2(length / (parts * tiling.step)), "part_keys": log2(length / parts),
        "rows_waste": tiles * schedule.rows / max(queries * heads.group, 1),
        "waves": log2(1 + blocks / (resident * target.multiprocessors)),
    }  # fmt: skip
