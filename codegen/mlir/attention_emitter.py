"""IR kernels around ``nn.attention``, ``kv.attend`` and ``kv.append`` -> attention kernels.

An operand may be a slice of whole columns of a wider tensor (a fused QKV projection): the kernel reads through it.
Queries, and keys that are appended, may come through ``nn.rope``, which the kernel does on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tilewright.codegen.cache import CacheLayout, cache_layout
from tilewright.codegen.features import log2
from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.mlir.attention import (
    DENSE,
    AttentionBuffers,
    AttentionSpec,
    Extents,
    Slice,
    emit_attention,
)
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.elementwise import dim_value
from tilewright.codegen.mlir.kv import AttendBuffers, AttendSpec, emit_attend
from tilewright.codegen.mlir.kv_append import AppendBuffers, AppendSpec, emit_append
from tilewright.codegen.mlir.lower import compile_kernel
from tilewright.codegen.mlir.rows import Rope
from tilewright.codegen.schedule import AttentionSchedule, Schedule, Space
from tilewright.codegen.target import CpuTarget
from tilewright.ir import Argument, CodegenError, Dim, Function, KVType, Op, Return, Value, as_dim, eval_dim, ops, same_dim

_DTYPES = ("f32", "bf16", "f16")
_KINDS = (ops.Attention, ops.Attend, ops.Append)
_INLINE_APPENDS = 8  # tokens of heads that are written sooner than another thread has heard of them


@dataclass(frozen=True)
class View:
    """Where an operand lies: an argument of the kernel, seen through a slice of columns."""

    source: Value
    place: Slice


def view_of(value: Value) -> View | str:
    """The argument behind ``value``, or why there is none that a kernel can read directly."""
    if isinstance(value, Argument):
        return View(value, DENSE)
    op = value.owner
    if isinstance(op, ops.Reshape):
        inner = view_of(op.x)
        return inner if isinstance(inner, str) or keeps_rows(op) else "a reshape changes rows"
    if not isinstance(op, ops.Slice) or not isinstance(op.x, Argument) or op.x.tensor.rank != 3:
        return f"operand {value!r} is computed in the kernel"
    width, start = op.x.shape[-1], op.starts[-1]
    if not (isinstance(width, int) and isinstance(start, int)) or any(s != 1 for s in op.steps):
        return "a slice that is not of whole columns"
    if not all(a == 0 and same_dim(b, n) for a, b, n in zip(op.starts[:-1], op.stops[:-1], op.x.shape[:-1])):
        return "a slice of rows"
    return View(op.x, Slice(width, start))


def rope_before(value: Value) -> ops.Rope | None:
    """The rotation that gives ``value``, if one does."""
    return value.owner if isinstance(value.owner, ops.Rope) else None


def unrotated(value: Value) -> Value:
    """``value`` before its rotation."""
    rope = rope_before(value)
    return value if rope is None else rope.x


def rotation(value: Value) -> Rope | None:
    """How the kernel is to rotate ``value``."""
    rope = rope_before(value)
    if rope is None:
        return None
    return Rope(int(rope.cos.shape[2]), rope.style, rope.cos.shape[0] != 1, rope.cos.dtype.value)


def rotated_operand(op: Op) -> Value:
    """The operand that may come through a rotation."""
    return op.k if isinstance(op, ops.Append) else op.q  # type: ignore[attr-defined]


def refusal_of_rope(op: Op) -> str | None:
    """Why the rotations around ``op`` cannot be done on the way, or None."""
    ropes = [rope for v in op.operands if (rope := rope_before(v))]
    if any(rope is not rope_before(rotated_operand(op)) for rope in ropes):
        return "a rotation of keys or values that are not appended"
    for value in (v for rope in ropes for v in (rope.cos, rope.sin)):
        if isinstance(view := view_of(value), str) or view.place != DENSE or value.dtype.value not in _DTYPES:
            return f"no rotation by {value!r}"
    return None


def keeps_rows(op: ops.Reshape) -> bool:
    """Whether a reshape only splits the last axis."""
    lead = op.x.shape[:-1]
    return len(op.shape) >= len(lead) and all(map(same_dim, lead, op.shape))


def axes_of(value: Value | None) -> str | None:
    """The axes of ``[B, Hq, S, T]`` that a broadcast operand has."""
    if value is None:
        return None
    shape = (1,) * (4 - value.tensor.rank) + value.shape
    return "".join(name for name, d in zip("bhst", shape) if d != 1)


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
            if isinstance(value.type, KVType):
                if value.type.layout != "contiguous" or value.dtype.value not in _DTYPES:
                    return f"no kernel for {value.type}"
            elif isinstance(view := view_of(value), str):
                return view
        narrow = [v for v in tensors(found) if v.dtype.value not in _DTYPES]
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
        if isinstance(anchor, ops.Append):
            idle = set(AttentionSchedule.domains())
        elif isinstance(anchor, ops.Attend) and anchor.q.shape[1] == 1:
            idle = {"rows"}
        return Space(AttentionSchedule, target, default, {key: (getattr(default, key),) for key in idle})

    def layouts(self, kernel: Function, schedule: Schedule, target: CpuTarget) -> Mapping[int, str]:
        return {}

    def features(self, kernel: Function, target: CpuTarget, sizes: Mapping[str, int]
                 ) -> Callable[[Schedule], dict[str, float]]:  # fmt: skip
        anchor = find(kernel)
        assert isinstance(anchor, _KINDS)
        return lambda schedule: _features(anchor, schedule, target, sizes)

    def emit(self, kernel: Function, schedule: Schedule, target: CpuTarget, symbol: str) -> KernelCode:
        if (reason := self.match(kernel, target)) or not isinstance(schedule, AttentionSchedule):
            raise CodegenError(f"{self.name} cannot lower @{kernel.name} with {schedule}: {reason}")
        anchor = find(kernel)
        dims = tuple(kernel.symbols())
        parts = isinstance(anchor, ops.Attend) and _attend_spec(anchor, target).parts(schedule) > 1
        with Kernel(symbol, target, dims, arguments(kernel) + [("parts", "f32")] * parts) as k:
            place = places(kernel, k.buffers)
            emitters = {ops.Attention: _attention, ops.Attend: _attend, ops.Append: _append}
            facts = emitters[type(anchor)](anchor, k, place, schedule, target)  # type: ignore[index]
        return KernelCode(symbol, compile_kernel(k), dims, **facts)


def find(kernel: Function) -> Op | str:
    """The attention operation of ``kernel``, or why it has none."""
    anchors = [op for op in kernel.body if isinstance(op, _KINDS)]
    if len(anchors) != 1:
        return "not one attention operation"
    inside = (ops.Slice, ops.Reshape, ops.Rope, Return)
    others = [op for op in kernel.body if op is not anchors[0] and not isinstance(op, inside)]
    if others:
        return f"{others[0].name} does not run in an attention kernel"
    return anchors[0] if kernel.returns == anchors[0].results else "the attention's result is used in the kernel"


def tensors(op: Op) -> list[Value]:
    """The operands that hold queries, keys and values."""
    names = {"q", "k", "v"}
    return [unrotated(getattr(op, f.name)) for f in op.fields if f.name in names]


def arguments(kernel: Function) -> list[tuple[str, str]]:
    """Names and element types of the pointers: two for a cache."""
    pairs = []
    for i, value in enumerate(kernel.args):
        parts = ("k", "v") if isinstance(value.type, KVType) else ("",)
        pairs += [(f"a{i}{part}", value.dtype.value) for part in parts]
    return pairs + [("out", v.dtype.value) for v in kernel.returns if not isinstance(v.type, KVType)]


def places(kernel: Function, buffers: Sequence[Buffer]) -> dict[Any, Any]:
    """Buffers by argument (a pair for a cache), the result's under ``"out"`` and that of parts under ``"parts"``."""
    found: dict[Any, Any] = {}
    rest = iter(buffers)
    for value in kernel.args:
        found[value] = (next(rest), next(rest)) if isinstance(value.type, KVType) else next(rest)
    found["out"] = None if all(isinstance(v.type, KVType) for v in kernel.returns) else next(rest)
    found["parts"] = next(rest, None)
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


Places = dict[Any, Any]
Facts = dict[str, Any]
"""The fields of KernelCode that say how many tasks there are."""


def static(dim: Dim) -> int | None:
    """A size when it is known while compiling: decode has one query, and gets tiles for that."""
    return dim if isinstance(dim, int) else None


def _features(op: Op, schedule: Schedule, target: CpuTarget, sizes: Mapping[str, int]) -> dict[str, float]:
    """What a cost model sees of attention."""
    assert isinstance(schedule, AttentionSchedule)
    if isinstance(op, ops.Append):
        b, s, heads, dim = (eval_dim(d, sizes) for d in op.k.shape)
        return {"tasks": float(b * heads), "queries": log2(s), "dim": float(dim), "kind": 0.0}
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
        out_dtype=op.result.dtype.value, scale=op.scale, window=op.window, chunk=op.chunk, softcap=op.softcap,
        bias=axes_of(op.bias), bias_dtype=op.bias.dtype.value if op.bias else "f32",
        sinks=op.sinks.dtype.value if op.sinks else None, s=static(op.q.shape[1]), rope=rotation(op.q),
        q=_view(op.q).place,
    )  # fmt: skip


def _attend(op: ops.Attend, k: Kernel, place: Places, schedule: AttentionSchedule, target: CpuTarget) -> Facts:
    spec = _attend_spec(op, target)
    b, s = op.q.shape[:2]
    extra = (*(_at(place, v) for v in (op.bias, op.sinks)), *_tables(place, op.q), place["parts"])
    buffers = AttendBuffers(place[_view(op.q).source], *place[op.cache], _at(place, op.start), place["out"], *extra)
    emit_attend(k, spec, schedule, dim_value(b, k.dims), dim_value(s, k.dims), buffers)
    scratch = tuple(map(as_dim, spec.scratch(schedule, b)))
    return {"tasks": as_dim(spec.tasks(schedule, b, s)), "last": as_dim(spec.last(schedule, b)), "scratch": scratch}


def _append(op: ops.Append, k: Kernel, place: Places, schedule: AttentionSchedule, target: CpuTarget) -> Facts:
    key, value = _view(op.k), _view(op.v)
    b, s = op.k.shape[:2]
    layout: CacheLayout = cache_layout(op.cache.cache, target)
    spec = AppendSpec(layout, op.k.dtype.value, static(s), rotation(op.k), k=key.place, v=value.place)
    sources = place[key.source], place[value.source], _at(place, op.start)
    emit_append(k, spec, dim_value(s, k.dims), AppendBuffers(*place[op.cache], *sources, *_tables(place, op.k)))
    return {"tasks": as_dim(spec.tasks(b, s)), "grain": _INLINE_APPENDS if s == 1 else 1}
