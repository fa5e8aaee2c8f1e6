"""Attention without a cache: encoders, and causal models run over a whole sequence.

A task is a run of queries of one sequence and one group of heads. It walks over the keys that any of its queries sees,
packs each block of keys and values, and attends to it (`Flash`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tilewright.codegen.attention_pattern import DENSE, Slice
from tilewright.codegen.cache import panel_for
from tilewright.codegen.cache_slots import VALUE_STEP, round_up
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.flash import Flash
from tilewright.codegen.mlir.flash_rows import Adjust, Shape, Visible
from tilewright.codegen.mlir.flash_sources import Straight
from tilewright.codegen.mlir.kv_blocks import Rows, pack_keys, pack_values
from tilewright.codegen.mlir.rows import Angles, Rope, Row
from tilewright.codegen.mlir.value import Val, constant
from tilewright.codegen.schedule import AttentionSchedule
from tilewright.codegen.target import CpuTarget


@dataclass(frozen=True)
class AttentionSpec:
    """q ``[B, S, heads, dim]``, k ``[B, T, kv_heads, dim]``, v ``[B, T, kv_heads, vdim]`` -> ``[B, S, heads, vdim]``.

    B, S and T are dims; ``s`` is S when it is static. ``mask`` (bool) and ``bias`` name the axes they have, out of
    "bhst"; absent axes broadcast.
    Query i stands at ``i + T - S``; ``window`` and ``window_right`` > 0 keep keys above ``position - window`` and below
    ``position + window_right``, ``chunk`` > 0 those of the query's own chunk.
    """

    heads: int
    kv_heads: int
    dim: int
    vdim: int
    dtype: str = "f32"
    out_dtype: str = "f32"
    scale: float = 1.0
    causal: bool = False
    window: int = -1
    window_right: int = -1
    chunk: int = 0
    softcap: float = 0.0
    mask: str | None = None
    bias: str | None = None
    bias_dtype: str = "f32"
    sinks: str | None = None
    padding: bool = False
    s: int | None = None
    rope: Rope | None = None
    q: Slice = DENSE
    k: Slice = DENSE
    v: Slice = DENSE
    out: Slice = DENSE

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.kv_heads

    def queries(self, schedule: AttentionSchedule) -> int:
        """Queries of one task."""
        return max(schedule.rows // self.group, 1)

    def tasks(self, schedule: AttentionSchedule, b: Any, s: Any) -> Any:
        """Number of tasks: an int, or an expression when ``b`` or ``s`` is symbolic."""
        return b * self.kv_heads * -(-s // self.queries(schedule))


@dataclass(frozen=True)
class AttentionBuffers:
    """Arguments of the kernel."""

    q: Buffer
    k: Buffer
    v: Buffer
    out: Buffer
    mask: Buffer | None = None
    bias: Buffer | None = None
    sinks: Buffer | None = None
    padding: Buffer | None = None
    cos: Buffer | None = None
    sin: Buffer | None = None


@dataclass(frozen=True)
class Extents:
    """The dims of one call."""

    b: Val
    s: Val
    t: Val


def attention_kernel(name: str, target: CpuTarget, spec: AttentionSpec, schedule: AttentionSchedule) -> Kernel:
    """The whole kernel: dims B, S, T; buffers q, k, v, then mask, bias, sinks, padding, cos, sin (as in the spec), out."""
    extra = {"mask": spec.mask and "bool", "bias": spec.bias and spec.bias_dtype, "sinks": spec.sinks,
             "padding": spec.padding and "bool"} | dict.fromkeys(("cos", "sin"), spec.rope.dtype if spec.rope else None)
    extra = {key: dtype for key, dtype in extra.items() if dtype}
    given = [*((key, spec.dtype) for key in "qkv"), *extra.items(), ("out", spec.out_dtype)]
    with Kernel(name, target, ("B", "S", "T"), given) as kernel:
        q, k, v, *rest, out = kernel.buffers
        buffers = AttentionBuffers(q, k, v, out, **dict(zip(extra, rest)))
        emit_attention(kernel, spec, schedule, Extents(*kernel.dims.values()), buffers)
    return kernel


def emit_attention(kernel: Kernel, spec: AttentionSpec, schedule: AttentionSchedule, extents: Extents,
                   buffers: AttentionBuffers) -> None:
    """Emit the task loop into ``kernel``."""
    schedule.validate(kernel.target)
    _Attention(kernel, spec, schedule, extents, buffers).emit()


class _Attention:
    """The state of one emission."""

    def __init__(self, kernel: Kernel, spec: AttentionSpec, schedule: AttentionSchedule, extents: Extents,
                 buffers: AttentionBuffers) -> None:
        self.kernel, self.spec, self.schedule, self.extents, self.buffers = kernel, spec, schedule, extents, buffers
        dot = kernel.target.has_bf16_dot and spec.dtype == "bf16"
        stored = "bf16" if dot else "f32"
        pair = 2 if dot else 1
        self.keys = kernel.scratch(schedule.keys * round_up(spec.dim, pair), stored)
        self.values = kernel.scratch(schedule.keys * round_up(spec.vdim, VALUE_STEP), stored)
        self.panel = panel_for(kernel.target)
        shape = Shape(spec.group, spec.dim, spec.vdim, stored, self.panel, dot, spec.scale, spec.softcap, spec.s)
        self.angles = None
        if spec.rope is not None and buffers.cos is not None and buffers.sin is not None:
            self.angles = Angles(spec.rope, buffers.cos, buffers.sin)
        self.flash = Flash(kernel, shape, schedule, (self.keys, self.values))

    def emit(self) -> None:
        kernel, spec, extents = self.kernel, self.spec, self.extents
        queries = spec.queries(self.schedule)
        runs = ((extents.s + (queries - 1)) // queries).max(1)
        with kernel.loop(kernel.begin, kernel.end) as tasks:
            run, head = tasks.index % runs, tasks.index // runs % spec.kv_heads
            batch, first = tasks.index // (runs * spec.kv_heads), run * queries
            self._task(batch, head, first, (extents.s - first).min(constant(queries)))

    def _task(self, batch: Val, head: Val, first: Val, queries: Val) -> None:
        flash, extents, step = self.flash, self.extents, self.schedule.keys
        rows = queries * self.spec.group
        flash.reset(rows)
        for_rows(self.kernel, queries, self.spec.group, lambda query, member, row: flash.load_query(
            row, self._query(batch, first + query, head * self.spec.group + member)))
        shift = extents.t - extents.s + first
        visible = _visibility(self.spec, extents.t)
        low, high = visible(shift).low, visible(shift + (queries - 1)).high
        start = constant(0) if low is None else low.max(0) // step * step
        with self.kernel.loop(start, high, step) as blocks:
            key = blocks.index
            count = (high - key).min(constant(step))
            self._pack(batch, head, key, count)
            source = Straight(self.keys, self.values, constant(0), constant(0), step, constant(0))
            flash.block(source, key, count, rows,
                        lambda query: visible(shift + query), self._adjust(batch, head, first))
        for_rows(self.kernel, queries, self.spec.group, lambda query, member, row: self._finish(
            row, batch, first + query, head * self.spec.group + member))

    def _query(self, batch: Val, token: Val, head: Val) -> Row:
        at = self.spec.rope.place(batch, token, self.extents.s) if self.spec.rope else None
        return Row(self.kernel, self.buffers.q, self._place("q", batch, token, head), self.spec.dim, self.angles, at)

    def _place(self, name: str, batch: Val, token: Val, head: Val) -> Val:
        """First element of one head of one token of q, k, v or out."""
        spec = self.spec
        size = spec.vdim if name in ("v", "out") else spec.dim
        heads = spec.kv_heads if name in ("k", "v") else spec.heads
        where: Slice = getattr(spec, name)
        length = self.extents.t if name in ("k", "v") else self.extents.s
        return (batch * length + token) * (where.stride or heads * size) + (head * size + where.offset)

    def _pack(self, batch: Val, head: Val, key: Val, count: Val) -> None:
        spec, step = self.spec, self.schedule.keys
        for name, memory, size in (("k", self.buffers.k, spec.dim), ("v", self.buffers.v, spec.vdim)):
            stride = getattr(spec, name).stride or spec.kv_heads * size
            rows = Rows(memory, self._place(name, batch, key, head), stride, size)
            if name == "k":
                pack_keys(self.kernel, rows, count, self.panel, self.keys)
            else:
                pack_values(self.kernel, rows, count, self.panel, step, self.values)

    def _finish(self, row: Val, batch: Val, token: Val, head: Val) -> None:
        sink = self.buffers.sinks.load(head).to("f32") if self.buffers.sinks else None
        self.flash.finish(row, self.buffers.out, self._place("out", batch, token, head), sink)

    def _adjust(self, batch: Val, head: Val, first: Val) -> Adjust | None:
        spec, buffers, extents = self.spec, self.buffers, self.extents
        if not (buffers.mask or buffers.bias or buffers.padding):
            return None

        def adjust(score: Val, row: Val, key: Val, lanes: int) -> Val:
            place = {"b": batch, "h": head * spec.group + row % spec.group, "s": first + row // spec.group, "t": key}
            size = {"b": extents.b, "h": constant(spec.heads), "s": extents.s, "t": extents.t}
            if buffers.bias is not None:
                score = score + load_broadcast(self.kernel, buffers.bias, spec.bias, place, size, lanes).to("f32")
            for memory, axes in ((buffers.mask, spec.mask), (buffers.padding, "bt")):
                if memory is not None:
                    keep = load_broadcast(self.kernel, memory, axes, place, size, lanes)
                    score = keep.select(score, float("-inf"))
            return score

        return adjust


def for_rows(kernel: Kernel, queries: Val, group: int, body: Callable[[Val, Val, Val], None]) -> None:
    """``body(query, member of the group, row)`` for all rows of a task."""
    with kernel.loop(0, queries) as outer, kernel.loop(0, group) as inner:
        body(outer.index, inner.index, outer.index * group + inner.index)


def load_broadcast(kernel: Kernel, memory: Buffer, axes: str, place: dict[str, Val], size: dict[str, Val],
                   lanes: int) -> Val:
    """``lanes`` elements along "t" of a dense array that has only ``axes``; those past the end of "t" read as zero."""
    at = constant(0)
    for axis in axes:
        at = at * size[axis] + place[axis]
    if "t" not in axes:
        return memory.load(at).splat(lanes)
    left = size["t"] - place["t"]
    (value,) = kernel.branch(left >= lanes, lambda: [memory.load(at, lanes)],
                             lambda: [memory.load(at, lanes, kernel.mask(left, lanes))])
    return value


def _visibility(spec: AttentionSpec, t: Val) -> Callable[[Val], Visible]:
    """Which of ``t`` keys a query at a position sees."""

    def visible(position: Val) -> Visible:
        low, high = None, t
        if spec.causal:
            high = high.min(position + 1)
        if spec.window_right > 0:
            high = high.min(position + spec.window_right)
        if spec.window > 0:
            low = (position - (spec.window - 1)).max(constant(0))
        if spec.chunk > 0:
            chunk = position.max(constant(0)) // spec.chunk * spec.chunk
            low = chunk if low is None else low.max(chunk)
            high = (position < 0).select(constant(0), high.min(chunk + spec.chunk))
        return Visible(low, high)

    return visible
