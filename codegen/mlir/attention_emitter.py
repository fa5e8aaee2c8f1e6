"""IR kernels around ``nn.attention``, ``kv.attend`` and ``kv.append`` -> attention kernels.

An operand may be a slice of whole columns of a wider tensor (a fused QKV projection): the kernel reads through it.
Queries, and keys that are appended, may come through ``nn.rope``, which the kernel does on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from tilewright.codegen.attention_pattern import (
    DTYPES,
    KINDS,
    View,
    axes_of,
    find,
    refusal_of_rope,
    rope_before,
    static,
    tensors,
    unrotated,
    view_of,
)
from tilewright.codegen.cache import cache_layout
from tilewright.codegen.cache_codes import CodeLayout
from tilewright.codegen.features import log2
from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.mlir.attention import AttentionBuffers, AttentionSpec, Extents, emit_attention
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.elementwise import dim_value
from tilewright.codegen.mlir.kv import emit_attend
from tilewright.codegen.mlir.kv_append import AppendBuffers, AppendSpec, emit_append
from tilewright.codegen.mlir.kv_choose import emit_choose
from tilewright.codegen.mlir.kv_choose_spec import ChooseBuffers, ChooseSpec
from tilewright.codegen.mlir.kv_chosen import Blocks
from tilewright.codegen.mlir.kv_kept import emit_retain
from tilewright.codegen.mlir.kv_select import SelectBuffers, SelectSpec, emit_select
from tilewright.codegen.mlir.kv_spec import AttendBuffers, AttendSpec
from tilewright.codegen.mlir.lower import compile_kernel
from tilewright.codegen.mlir.rows import Rope
from tilewright.codegen.program import pointers
from tilewright.codegen.schedule import AttentionSchedule, Schedule, Space
from tilewright.codegen.target import CpuTarget
from tilewright.ir import CONTIGUOUS, CodegenError, Function, KVType, Op, Value, as_dim, eval_dim, ops

_INLINE_APPENDS = 8  # tokens of heads that are written sooner than another thread has heard of them


def rotation(value: Value) -> Rope | None:
    """How the kernel is to rotate ``value``."""
    rope = rope_before(value)
    if rope is None:
        return None
    return Rope(int(rope.cos.shape[2]), rope.style, rope.cos.shape[0] != 1, rope.cos.dtype.value)


class AttentionEmitter:
    """Attention over tensors or a cache, and appending to a cache."""

    name: ClassVar[str] = "mlir.attention"

    def match(self, kernel: Function, target: CpuTarget) -> str | None:
        found = find(kernel)
        if isinstance(found, str):
            return found
        if reason := refusal_of_rope(found):
            return reason
        for value in map(unrotated, found.operands):
            if not isinstance(value.type, KVType) and isinstance(view := view_of(value), str):
                return view
        if isinstance(found, ops.Attention) and found.first:
            return f"no kernel for the first {found.first} tokens beside a window, but over a cache of kind=ring"
        if isinstance(found, ops.Choose) and found.cache.cache.is_coded and set(found.kinds) != {"a-shape"}:
            return f"no kernel that chooses blocks by products with codes: {found.cache.type}; give pattern=a-shape"
        if isinstance(found, ops.Attend) and (reason := _refusal_of_blocks(found, target)):
            return reason
        narrow = [v for v in tensors(found) if v.dtype.value not in DTYPES]
        return f"no attention of {narrow[0].dtype.value}" if narrow else None

    def default_schedule(self, kernel: Function, target: CpuTarget) -> Schedule:
        anchor = find(kernel)
        if not isinstance(anchor, ops.Attend) or anchor.q.shape[1] != 1:
            return AttentionSchedule.default(target)
        heads, cache = int(anchor.q.shape[2]), anchor.cache.cache
        return AttentionSchedule.decoding(target, cache.dtype.value, cache.heads, heads // cache.heads)

    def space(self, kernel: Function, target: CpuTarget, sizes: Mapping[str, int]) -> Space:
        anchor, default = find(kernel), self.default_schedule(kernel, target)
        idle = {"parts", "prefetch"}
        if isinstance(anchor, (ops.Append, ops.Select, ops.Choose)):
            idle = set(AttentionSchedule.domains())
        elif isinstance(anchor, ops.Attend) and anchor.q.shape[1] == 1:
            idle = {"rows"}
        return Space(AttentionSchedule, target, default, {key: (getattr(default, key),) for key in idle})

    def layouts(self, kernel: Function, target: CpuTarget) -> Callable[[Schedule], Mapping[int, str]]:
        return lambda schedule: {}

    def features(self, kernel: Function, target: CpuTarget, sizes: Mapping[str, int]
                 ) -> Callable[[Schedule], dict[str, float]]:  # fmt: skip
        anchor = find(kernel)
        assert isinstance(anchor, KINDS)
        return lambda schedule: _features(anchor, schedule, target, sizes)

    def emit(self, kernel: Function, schedule: Schedule, target: CpuTarget, symbol: str) -> KernelCode:
        if (reason := self.match(kernel, target)) or not isinstance(schedule, AttentionSchedule):
            raise CodegenError(f"{self.name} cannot lower @{kernel.name} with {schedule}: {reason}")
        anchor = find(kernel)
        dims = tuple(kernel.symbols())
        spec = _attend_spec(anchor, target) if isinstance(anchor, ops.Attend) else None
        more = [(name, "f32") for name in spec.temporaries(schedule)] if spec else []
        more += [("parts", "i32")] * isinstance(anchor, ops.Select) + [("parts", "f32")] * isinstance(anchor, ops.Choose)
        with Kernel(symbol, target, dims, arguments(kernel) + more) as k:
            place = places(kernel, k.buffers, [name for name, _ in more])
            emitters = {ops.Attention: _attention, ops.Attend: _attend, ops.Retain: _attend, ops.Append: _append,
                        ops.Select: _select, ops.Choose: _choose}  # fmt: skip
            facts = emitters[type(anchor)](anchor, k, place, schedule, target)  # type: ignore[index]
        return KernelCode(symbol, compile_kernel(k), dims, **facts)


def arguments(kernel: Function) -> list[tuple[str, str]]:
    """Names and element types of the pointers: two for a cache, and two for its windows beside pages."""
    pairs = []
    for i, value in enumerate(kernel.args):
        if isinstance(value.type, KVType):
            stored = "u8" if value.type.is_coded else value.dtype.value
            pairs += [(f"a{i}{part}", stored) for part in pointers(value)]
        else:
            pairs.append((f"a{i}", value.dtype.value))
    return pairs + [("out", v.dtype.value) for v in kernel.returns if not isinstance(v.type, KVType)]


def places(kernel: Function, buffers: Sequence[Buffer], temporaries: Sequence[str]) -> dict[Any, Any]:
    """Buffers by argument (all of a cache), the result's under ``"out"``, and ``"temporaries"``, these by name."""
    found: dict[Any, Any] = {}
    rest = iter(buffers)
    for value in kernel.args:
        found[value] = tuple(next(rest) for _ in pointers(value)) if isinstance(value.type, KVType) else next(rest)
    found["out"] = None if all(isinstance(v.type, KVType) for v in kernel.returns) else next(rest)
    found["temporaries"] = dict(zip(temporaries, rest))
    return found


def _view(value: Value) -> View:
    found = view_of(unrotated(value))
    assert isinstance(found, View)
    return found


def _at(place: dict[Any, Any], value: Value | None) -> Any:
    return None if value is None else place[_view(value).source]


def _tables(place: dict[Any, Any], value: Value) -> tuple[Any, Any]:
    """The buffers of cos and sin of the rotation that gives ``value``."""
    rope = rope_before(value)
    return (None, None) if rope is None else (_at(place, rope.cos), _at(place, rope.sin))


def _memory(place: dict[Any, Any], cache: Value) -> tuple[Any, Any, dict[str, Any]]:
    """The buffers of K and V, and, by name, those of windows beside pages."""
    k, v, *more = place[cache]
    return k, v, dict(zip(("kw", "vw"), more))


def _pages(k: Kernel, place: dict[Any, Any], table: Value | None) -> tuple[Any, Any]:
    """The buffer of a table of pages, and how many a sequence has there."""
    return (None, None) if table is None else (place[table], dim_value(table.shape[1], k.dims))


def _refusal_of_blocks(op: ops.Attend, target: CpuTarget) -> str | None:
    """Why the kernel cannot walk along the blocks chosen for ``op``, or None."""
    if op.blocks is None:
        return None
    layout = cache_layout(op.cache.cache, target)
    if op.bias is not None:
        return "no kernel for a bias over chosen blocks"
    if isinstance(layout, CodeLayout) and layout.keeps_recent:
        return f"no kernel for recent tokens over chosen blocks: {op.cache.type}"
    run = layout.run if layout.run < layout.slots or layout.layout != CONTIGUOUS else Blocks(op.block, 1, 1).run
    if op.queries & (op.queries - 1) or op.block % run or run % layout.key_panel:
        return f"no kernel for blocks of {op.queries} queries and {op.block} keys, which lie in runs of {run}"
    return None


Places = dict[Any, Any]
Facts = dict[str, Any]
"""The fields of KernelCode that say how many tasks there are."""


def _features(op: Op, schedule: Schedule, target: CpuTarget, sizes: Mapping[str, int]) -> dict[str, float]:
    """What a cost model sees of attention."""
    assert isinstance(schedule, AttentionSchedule)
    if isinstance(op, ops.Append):
        b, s, heads, dim = (eval_dim(d, sizes) for d in op.k.shape)
        return {"tasks": float(b * heads), "queries": log2(s), "dim": float(dim), "kind": 0.0}
    if isinstance(op, (ops.Select, ops.Choose)):
        kv, b = op.cache.cache, eval_dim(op.q.shape[0], sizes)
        return {"tasks": float(b * kv.heads), "length": log2(kv.length), "dim": float(kv.dim), "kind": 3.0}
    assert isinstance(op, (ops.Attention, ops.Attend))
    b, s, heads, dim = (eval_dim(d, sizes) for d in op.q.shape)
    if isinstance(op, ops.Attend):
        cache = op.cache.cache
        spec = _attend_spec(op, target)
        kv_heads, length, dtype, parts = cache.heads, cache.length, cache.dtype, spec.parts(schedule)
        tasks = eval_dim(as_dim(spec.tasks(schedule, b, s)), sizes)
    else:
        kv_heads, length, dtype, parts = int(op.k.shape[2]), eval_dim(op.k.shape[1], sizes), op.k.dtype, 1
        tasks = b * kv_heads * -(-s // max(schedule.rows * kv_heads // heads, 1))
    group, rows = heads // kv_heads, heads // kv_heads if s == 1 else schedule.rows
    return {
        "kind": 1.0 + isinstance(op, ops.Attend), "tasks": float(tasks), "queries": log2(s), "length": log2(length),
        "heads": float(heads), "kv_heads": float(kv_heads), "group": float(group), "dim": float(dim),
        "bits": float(dtype.bits), "parts": float(parts), "causal": float(getattr(op, "causal", True)),
        "window": log2(op.window), "extras": float(sum(v is not None for v in (op.bias, op.sinks))),
        "key_block_bytes": log2(schedule.keys * dim * dtype.bits / 8), "scores_bytes": log2(rows * schedule.keys * 4),
        "sums_bytes": log2(rows * dim * 4), "rows_waste": -(-s * group // rows) * rows / (s * group),
        "blocks": log2(length / schedule.keys), "part_keys": log2(length / parts),
    }  # fmt: skip


def _attention(op: ops.Attention, k: Kernel, place: Places, schedule: AttentionSchedule, target: CpuTarget) -> Facts:
    q, key, value = _view(op.q), _view(op.k), _view(op.v)
    heads, dim = op.q.shape[2:]
    spec = AttentionSpec(
        heads=int(heads), kv_heads=int(op.k.shape[2]), dim=int(dim), vdim=int(op.v.shape[3]),
        dtype=op.q.dtype.value, out_dtype=op.result.dtype.value, scale=op.scale, causal=op.causal, window=op.window,
        window_right=op.window_right, chunk=op.chunk, softcap=op.softcap, mask=axes_of(op.mask), bias=axes_of(op.bias),
        bias_dtype=op.bias.dtype.value if op.bias else "f32", sinks=op.sinks.dtype.value if op.sinks else None,
        padding=op.padding is not None, s=static(op.q.shape[1]), rope=rotation(op.q), q=q.place, k=key.place, v=value.place,
    )  # fmt: skip
    b, s, t = op.q.shape[0], op.q.shape[1], op.k.shape[1]
    extra = (_at(place, v) for v in (op.mask, op.bias, op.sinks, op.padding))
    sources = place[q.source], place[key.source], place[value.source], place["out"]
    buffers = AttentionBuffers(*sources, *extra, *_tables(place, op.q))
    emit_attention(k, spec, schedule, Extents(*(dim_value(d, k.dims) for d in (b, s, t))), buffers)
    return {"tasks": as_dim(spec.tasks(schedule, b, s))}


def _attend_spec(op: ops.Attend, target: CpuTarget) -> AttendSpec:
    return AttendSpec(
        heads=int(op.q.shape[2]), cache=cache_layout(op.cache.cache, target), dtype=op.q.dtype.value,
        out_dtype=op.results[0].dtype.value, scale=op.scale, window=op.window, chunk=op.chunk, softcap=op.softcap,
        bias=axes_of(op.bias), bias_dtype=op.bias.dtype.value if op.bias else "f32",
        sinks=op.sinks.dtype.value if op.sinks else None, s=static(op.q.shape[1]), rope=rotation(op.q),
        q=_view(op.q).place, far=_view(op.q_sinks).place if op.q_sinks else None,
        chosen=int(op.pages.shape[2]) if op.pages else 0,
        blocks=Blocks(op.block, op.queries, int(op.blocks.shape[3]) - 1) if op.blocks else None,
        **({"rule": op.rule, "temperature": op.temperature} if isinstance(op, ops.Retain) else {}),
    )  # fmt: skip


def _attend(op: ops.Attend, k: Kernel, place: Places, schedule: AttentionSchedule, target: CpuTarget) -> Facts:
    spec = _attend_spec(op, target)
    b, s = op.q.shape[:2]
    extra = (*(_at(place, v) for v in (op.bias, op.sinks)), *_tables(place, op.q))
    (*cache, windows) = _memory(place, op.cache)
    found = place[_view(op.q).source], *cache, _at(place, op.start), place["out"], *extra
    table, width = _pages(k, place, op.table)
    more = {"far": _at(place, op.q_sinks), "count": _at(place, getattr(op, "count", None)), **place["temporaries"]}
    more |= {"pages": op.pages and place[op.pages], "blocks": _at(place, op.blocks), **windows}
    buffers = AttendBuffers(*found, table=table, width=width, **more)
    emit = emit_retain if isinstance(op, ops.Retain) else emit_attend
    emit(k, spec, schedule, dim_value(b, k.dims), dim_value(s, k.dims), buffers)
    scratch = tuple(map(as_dim, spec.scratch(schedule, b)))
    return {"tasks": as_dim(spec.tasks(schedule, b, s)), "last": as_dim(spec.last(schedule, b)), "scratch": scratch}


def _append(op: ops.Append, k: Kernel, place: Places, schedule: AttentionSchedule, target: CpuTarget) -> Facts:
    b, s = op.k.shape[:2]
    where = {name: _view(x).place for name, x in (("k", op.k), ("v", op.v)) if x is not None}
    spec = AppendSpec(cache_layout(op.cache.cache, target), op.k.dtype.value, static(s), rotation(op.k), **where)
    sources = _at(place, op.k), _at(place, op.v), _at(place, op.start)
    (*cache, windows) = _memory(place, op.cache)
    buffers = AppendBuffers(*cache, *sources, *_tables(place, op.k), *_pages(k, place, op.table), **windows)
    emit_append(k, spec, dim_value(s, k.dims), buffers)
    return {"tasks": as_dim(spec.tasks(b, s)), "grain": _INLINE_APPENDS if s == 1 else 1}


def _select(op: ops.Select, k: Kernel, place: Places, schedule: AttentionSchedule, target: CpuTarget) -> Facts:
    kv, heads, q = op.cache.cache, int(op.q.shape[2]), _view(op.q)
    spec = SelectSpec(heads, cache_layout(kv, target), kv.pages, op.share, op.least, op.spread, op.most, q.place)
    table, width = _pages(k, place, op.table)
    keys, _ = place[op.cache]
    sources = place[q.source], keys, _at(place, op.start), table, place["out"], place["temporaries"]["parts"]
    emit_select(k, spec, dim_value(op.q.shape[0], k.dims), width, SelectBuffers(*sources))
    b = op.q.shape[0]
    return {"tasks": as_dim(spec.tasks(b)), "last": as_dim(spec.last(b)), "scratch": (as_dim(spec.scratch(b)),)}


def _choose(op: ops.Choose, k: Kernel, place: Places, schedule: AttentionSchedule, target: CpuTarget) -> Facts:
    view, b = _view(op.q), op.q.shape[0]
    spec = ChooseSpec.of(op, cache_layout(op.cache.cache, target), schedule, view.place)
    given = place[view.source], *place[op.cache][:2], _at(place, op.start), place["out"], place["temporaries"]["parts"]
    emit_choose(k, spec, schedule, dim_value(op.q.shape[1], k.dims), ChooseBuffers(*given, *_pages(k, place, op.table)))
    return {"tasks": as_dim(spec.tasks(b)), "scratch": (as_dim(spec.scratch(b)),)}
