"""Kernels over a key/value cache in the layout of `CacheLayout`: append new tokens, attend to all of them."""

from dataclasses import dataclass
from typing import Any

from tilewright.codegen.cache import CacheLayout, value_panels
from tilewright.codegen.mlir.attention import DENSE, Slice, for_rows, load_broadcast
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.flash import Adjust, Flash, Keys, Shape, Values, Visible
from tilewright.codegen.mlir.value import Val, constant
from tilewright.codegen.schedule import AttentionSchedule
from tilewright.codegen.target import CpuTarget


@dataclass(frozen=True)
class AttendSpec:
    """q ``[B, S, heads, dim]`` over a cache -> ``[B, S, heads, vdim]``; query s of sequence b stands at start[b] + s.

    ``bias`` names the axes it has, out of "bhst" with t the cache's length. ``s`` is S when it is static, as in decoding.
    """

    heads: int
    cache: CacheLayout
    dtype: str = "f32"
    out_dtype: str = "f32"
    scale: float = 1.0
    window: int = -1
    chunk: int = 0
    softcap: float = 0.0
    bias: str | None = None
    bias_dtype: str = "f32"
    sinks: str | None = None
    s: int | None = None
    q: Slice = DENSE
    out: Slice = DENSE

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.cache.heads

    def queries(self, schedule: AttentionSchedule) -> int:
        """Queries of one task."""
        return max(schedule.rows // self.group, 1)

    def tasks(self, schedule: AttentionSchedule, b: Any, s: Any) -> Any:
        """Number of tasks: an int, or an expression when ``b`` or ``s`` is symbolic."""
        return b * self.cache.heads * -(-s // self.queries(schedule))


@dataclass(frozen=True)
class AttendBuffers:
    """Arguments of the kernel; ``k`` and ``v`` are the cache, ``start`` is i64 [B]."""

    q: Buffer
    k: Buffer
    v: Buffer
    start: Buffer
    out: Buffer
    bias: Buffer | None = None
    sinks: Buffer | None = None


def attend_kernel(name: str, target: CpuTarget, spec: AttendSpec, schedule: AttentionSchedule) -> Kernel:
    """The whole kernel: dims B, S; buffers q, cache k and v, start, then bias and sinks as the spec has them, out."""
    extra = {"bias": spec.bias and spec.bias_dtype, "sinks": spec.sinks}
    extra = {key: dtype for key, dtype in extra.items() if dtype}
    stored = spec.cache.dtype
    given = [("q", spec.dtype), ("k", stored), ("v", stored), ("start", "i64"), *extra.items(), ("out", spec.out_dtype)]
    with Kernel(name, target, ("B", "S"), given) as kernel:
        q, k, v, start, *rest, out = kernel.buffers
        buffers = AttendBuffers(q, k, v, start, out, **dict(zip(extra, rest)))
        emit_attend(kernel, spec, schedule, kernel.dims["B"], kernel.dims["S"], buffers)
    return kernel


def emit_attend(kernel: Kernel, spec: AttendSpec, schedule: AttentionSchedule, b: Val, s: Val,
                buffers: AttendBuffers) -> None:
    """Emit the task loop into ``kernel``."""
    schedule.validate(kernel.target)
    _Attend(kernel, spec, schedule, b, s, buffers).emit()


class _Attend:
    """The state of one emission."""

    def __init__(self, kernel: Kernel, spec: AttendSpec, schedule: AttentionSchedule, b: Val, s: Val,
                 buffers: AttendBuffers) -> None:
        self.kernel, self.spec, self.schedule, self.b, self.s, self.buffers = kernel, spec, schedule, b, s, buffers
        cache = spec.cache
        dot = kernel.target.has_bf16_dot and spec.dtype == cache.dtype == "bf16"
        shape = Shape(spec.group, cache.dim, cache.vdim, cache.dtype, cache.panel, dot, spec.scale, spec.softcap, spec.s)
        self.flash = Flash(kernel, shape, schedule, (buffers.k, buffers.v))

    def emit(self) -> None:
        kernel, heads, queries = self.kernel, self.spec.cache.heads, self.spec.queries(self.schedule)
        runs = ((self.s + (queries - 1)) // queries).max(1)
        with kernel.loop(kernel.begin, kernel.end) as tasks:
            run, head = tasks.index % runs, tasks.index // runs % heads
            batch, first = tasks.index // (runs * heads), run * queries
            self._task(batch, head, first, (self.s - first).min(constant(queries)))

    def _task(self, batch: Val, head: Val, first: Val, queries: Val) -> None:
        spec, cache, flash, step = self.spec, self.spec.cache, self.flash, self.schedule.keys
        rows = queries * spec.group
        flash.reset(rows)
        for_rows(self.kernel, queries, spec.group, lambda query, member, row: flash.load_query(
            row, self.buffers.q, self._place(spec.q, cache.dim, batch, first + query, head * spec.group + member)))
        position = self.buffers.start.load(batch).to("index") + first
        low, high = self._visible(position).low, self._visible(position + (queries - 1)).high
        begin = constant(0) if low is None else low // step * step
        lane = (batch * cache.heads + head) * cache.slots
        with self.kernel.loop(begin, high, step) as blocks:
            key = blocks.index
            keys = Keys(self.buffers.k, (lane + key) * cache.key_size)
            values = Values(self.buffers.v, lane * cache.value_size, cache.slots, key)
            flash.block(keys, values, key, (high - key).min(constant(step)), rows,
                        lambda query: self._visible(position + query), self._adjust(batch, head, first))
        for_rows(self.kernel, queries, spec.group, lambda query, member, row: self._finish(
            row, batch, first + query, head * spec.group + member))

    def _place(self, where: Slice, size: int, batch: Val, token: Val, head: Val) -> Val:
        return (batch * self.s + token) * (where.stride or self.spec.heads * size) + (head * size + where.offset)

    def _visible(self, position: Val) -> Visible:
        """Keys up to the query's own position, from its window and chunk on."""
        low = None
        if self.spec.window > 0:
            low = (position - (self.spec.window - 1)).max(constant(0))
        if self.spec.chunk > 0:
            chunk = position // self.spec.chunk * self.spec.chunk
            low = chunk if low is None else low.max(chunk)
        return Visible(low, position + 1)

    def _finish(self, row: Val, batch: Val, token: Val, head: Val) -> None:
        sink = self.buffers.sinks.load(head).to("f32") if self.buffers.sinks else None
        place = self._place(self.spec.out, self.spec.cache.vdim, batch, token, head)
        self.flash.finish(row, self.buffers.out, place, sink)

    def _adjust(self, batch: Val, head: Val, first: Val) -> Adjust | None:
        spec, bias = self.spec, self.buffers.bias
        if bias is None:
            return None

        def adjust(score: Val, row: Val, key: Val, lanes: int) -> Val:
            place = {"b": batch, "h": head * spec.group + row % spec.group, "s": first + row // spec.group, "t": key}
            size = {"b": self.b, "h": constant(spec.heads), "s": self.s, "t": constant(spec.cache.length)}
            return score + load_broadcast(self.kernel, bias, spec.bias, place, size, lanes).to("f32")

        return adjust


@dataclass(frozen=True)
class AppendSpec:
    """k ``[B, S, heads, dim]`` and v ``[B, S, heads, vdim]`` into slots ``start[b]`` and on; S and B are dims."""

    cache: CacheLayout
    dtype: str = "f32"
    k: Slice = DENSE
    v: Slice = DENSE

    def tasks(self, b: Any) -> Any:
        """Number of tasks: one for each head of each sequence."""
        return b * self.cache.heads


@dataclass(frozen=True)
class AppendBuffers:
    """Arguments of the kernel: the cache, the new keys and values, ``start`` i64 [B]."""

    cache_k: Buffer
    cache_v: Buffer
    k: Buffer
    v: Buffer
    start: Buffer


def append_kernel(name: str, target: CpuTarget, spec: AppendSpec) -> Kernel:
    """The whole kernel: dims B, S; buffers cache k, cache v, k, v, start."""
    given = [("cache_k", spec.cache.dtype), ("cache_v", spec.cache.dtype), ("k", spec.dtype), ("v", spec.dtype)]
    with Kernel(name, target, ("B", "S"), [*given, ("start", "i64")]) as kernel:
        emit_append(kernel, spec, kernel.dims["S"], AppendBuffers(*kernel.buffers))
    return kernel


def emit_append(kernel: Kernel, spec: AppendSpec, s: Val, buffers: AppendBuffers) -> None:
    """Emit the task loop into ``kernel``."""
    cache = spec.cache
    row = kernel.scratch(-(-cache.key_size // kernel.lanes) * kernel.lanes, cache.dtype)
    with kernel.loop(kernel.begin, kernel.end) as tasks:
        batch, head = tasks.index // cache.heads, tasks.index % cache.heads
        start = buffers.start.load(batch).to("index")
        with kernel.loop(0, s) as tokens:
            token, slot = batch * s + tokens.index, start + tokens.index
            k_from = token * (spec.k.stride or cache.heads * cache.dim) + (head * cache.dim + spec.k.offset)
            v_from = token * (spec.v.stride or cache.heads * cache.vdim) + (head * cache.vdim + spec.v.offset)
            lane = tasks.index * cache.slots
            _append_key(kernel, cache, buffers.k.at(k_from), row, buffers.cache_k.at(lane * cache.key_size), slot)
            _append_value(kernel, cache, buffers.v.at(v_from), buffers.cache_v.at(lane * cache.value_size), slot)


def _load(kernel: Kernel, source: Buffer, start: int, size: int, dtype: str) -> Val:
    left = size - start
    mask = None if left >= kernel.lanes else kernel.mask(constant(left), kernel.lanes)
    return source.load(start, kernel.lanes, mask).to("f32").to(dtype)


def _append_key(kernel: Kernel, cache: CacheLayout, source: Buffer, row: Buffer, k: Buffer, slot: Val) -> None:
    """Scatter one key over its panel, a pair at a time."""
    for start in range(0, cache.key_size, kernel.lanes):
        row.store(_load(kernel, source, start, cache.dim, cache.dtype), start)
    place = slot // cache.panel * (cache.panel * cache.key_size) + slot % cache.panel * cache.pair
    with kernel.loop(0, cache.key_size, cache.pair) as loop:
        k.store(row.load(loop.index, cache.pair), place + loop.index * cache.panel)


def _append_value(kernel: Kernel, cache: CacheLayout, source: Buffer, v: Buffer, slot: Val) -> None:
    """Write one value; in a pair, the first clears the second, which it precedes, and the second keeps the first."""
    for start, width in value_panels(cache.value_size, cache.panel):
        for column in range(0, width, kernel.lanes):
            if start + column >= cache.vdim:
                return
            value = _load(kernel, source, start + column, cache.vdim, cache.dtype)
            at = slot // cache.pair * (cache.pair * width) + (start * cache.slots + column * cache.pair)
            v.store(value if cache.pair == 1 else _paired(kernel, value, v, at, slot), at)


def _paired(kernel: Kernel, value: Val, v: Buffer, at: Val, slot: Val) -> Val:
    wide = value.bitcast("i16").to("i32") & 0xFFFF
    kept = v.load(at, 2 * kernel.lanes).bitcast("i32") & 0xFFFF
    return (slot % 2).eq(0).select(wide, (wide << 16) | kept).bitcast("bf16")
