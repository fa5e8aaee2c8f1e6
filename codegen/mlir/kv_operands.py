"""What attention to a cache reads: where each query, each block of keys and each bias is, and which keys a query sees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tilewright.codegen.attention_pattern import Slice
from tilewright.codegen.cache import CacheLayout
from tilewright.codegen.cache_codes import CodeLayout
from tilewright.codegen.mlir.attention import load_broadcast
from tilewright.codegen.mlir.builder import Kernel
from tilewright.codegen.mlir.flash import Flash
from tilewright.codegen.mlir.flash_rows import Adjust, Shape, Visible
from tilewright.codegen.mlir.flash_sources import Picked, Scattered, Straight
from tilewright.codegen.mlir.kv_chosen import Listed
from tilewright.codegen.mlir.kv_codes import CodeFlash
from tilewright.codegen.mlir.kv_codes_recent import RecentRows, Windows
from tilewright.codegen.mlir.kv_places import Chosen, Places, key_place
from tilewright.codegen.mlir.kv_sharing import Sharing
from tilewright.codegen.mlir.kv_spec import AttendBuffers, AttendSpec
from tilewright.codegen.mlir.rows import Angles, Row
from tilewright.codegen.mlir.value import Val, constant
from tilewright.codegen.schedule import AttentionSchedule
from tilewright.ir import CONTIGUOUS


class Operands:
    """The operands of one emission."""

    def __init__(self, kernel: Kernel, spec: AttendSpec, schedule: AttentionSchedule, b: Val, s: Val,
                 buffers: AttendBuffers) -> None:
        self.kernel, self.spec, self.schedule, self.b, self.s, self.buffers = kernel, spec, schedule, b, s, buffers
        self.recent: RecentRows | None = None
        self.listed: Listed | None = None
        self.flash = self._floats() if isinstance(spec.cache, CacheLayout) else self._codes(spec.cache)
        self.places = Places(spec.cache, buffers.table, buffers.width)
        self.chosen = Chosen(buffers.pages, spec.cache.heads, spec.chosen, spec.cache.run) if buffers.pages else None
        self.pieces, self.piece, self.angles = spec.pieces(schedule), spec.piece(schedule), None
        self.sharing = Sharing.of(kernel, spec, schedule, b, buffers)
        if spec.rope is not None and buffers.cos is not None and buffers.sin is not None:
            self.angles = Angles(spec.rope, buffers.cos, buffers.sin)

    def _floats(self) -> Flash:
        kernel, spec, cache, memory = self.kernel, self.spec, self.spec.cache, (self.buffers.k, self.buffers.v)
        dot = kernel.target.has_bf16_dot and spec.dtype == cache.dtype == "bf16"
        run, picked = cache.run, spec.blocks is not None and cache.layout == CONTIGUOUS
        if cache.layout == CONTIGUOUS or cache.budget:
            run = spec.blocks.run if spec.blocks else 0
        sizes = spec.group, cache.dim, cache.vdim, cache.dtype, cache.panel
        shape = Shape(*sizes, dot, spec.scale, spec.softcap, spec.s, run, spec.together(self.schedule), picked,
                      cache.in_keys)
        return Flash(kernel, shape, self.schedule, memory)

    def _codes(self, cache: CodeLayout) -> CodeFlash:
        spec, memory = self.spec, (self.buffers.k, self.buffers.v)
        shape = Shape(spec.group, cache.dim, cache.vdim, cache.dtype, cache.panel, False, spec.scale, spec.softcap, spec.s)
        self.schedule = replace(self.schedule, keys=spec.keys(self.schedule))
        flash = CodeFlash(self.kernel, shape, self.schedule, cache, memory, spec.digits)
        if cache.keeps_recent:
            windows = Windows(cache, self.buffers.kw or memory[0], self.buffers.vw or memory[1])
            self.recent = RecentRows(self.kernel, shape, self.schedule, windows, spec.dtype, flash)
        return flash

    def _start(self, batch: Val, head: Val) -> Val:
        """Where the first query stands: its position, or, among keys on chosen pages, its place there."""
        start = self.buffers.start.load(batch).to("index")
        if self.listed is not None:
            return start - self.listed.skipped()
        if self.chosen is None:
            return start
        return (self.chosen.count(batch, head) - 1) * self.chosen.page + start % self.chosen.page

    def _token(self, batch: Val, first: Val, query: Val) -> tuple[Val, Val]:
        """The sequence and the token there of a task's query."""
        return (batch + query, constant(0)) if self.spec.s == 1 else (batch, first + query)

    def _stand(self, batch: Val, head: Val, first: Val, query: Val) -> Val:
        """Where a task's query stands, as `_start` counts."""
        sequence, token = self._token(batch, first, query)
        return self._start(sequence, head) + token

    def _position(self, batch: Val, head: Val, key: Val) -> Val:
        """Where a key stands in the sequence."""
        if self.listed is not None:
            return self.listed.key(key)
        return key if self.chosen is None else self.chosen.position(batch, head, key)

    def _source(self, batch: Val, head: Val, key: Val, high: Val, sinks: bool = False) -> Any:
        """Where the block of keys from ``key`` on lies, perhaps of a ring's sinks; there is nothing from ``high`` on."""
        cache, k, v = self.spec.cache, self.buffers.k, self.buffers.v

        def run_of(n: Val) -> Val:
            find = self.places.own_run if sinks else self.places.run_of
            return find(batch, head, self._position(batch, head, (key + n).min(high - 1)))

        if isinstance(cache, CodeLayout):
            return lambda i: (key_place(cache, run_of(i * cache.run)) + batch * cache.k_behind,
                              run_of(i * cache.run) * cache.v_run + batch * cache.v_behind)
        if cache.layout != CONTIGUOUS and not cache.budget:
            return Scattered(k, v, run_of, lambda run: key_place(cache, run))
        lane = (batch * cache.heads + head) * cache.slots
        if self.listed is not None:
            size = self.flash.shape.run
            return Picked(k, v, lambda n: (lane + self._position(batch, head, (key + n).min(high - 1))) // size,
                          lambda run: run * (size * cache.key_size), lane // cache.slots, cache.slots)
        keys = (lane + key) * cache.key_size + batch * cache.notes_size
        return Straight(k, v, keys, lane * cache.value_size, cache.slots, key)

    def _query(self, batch: Val, token: Val, head: Val) -> Row:
        place = self._place(self.spec.q, self.spec.cache.dim, batch, token, head)
        at = self.spec.rope.place(batch, token, self.s) if self.spec.rope else None
        return Row(self.kernel, self.buffers.q, place, self.spec.cache.dim, self.angles, at)

    def _far_query(self, batch: Val, token: Val, head: Val) -> Row:
        """The query as it meets the sinks."""
        assert self.spec.far is not None
        place = self._place(self.spec.far, self.spec.cache.dim, batch, token, head)
        return Row(self.kernel, self.buffers.far, place, self.spec.cache.dim)

    def _place(self, where: Slice, size: int, batch: Val, token: Val, head: Val) -> Val:
        return (batch * self.s + token) * (where.stride or self.spec.heads * size) + (head * size + where.offset)

    def _visible(self, position: Val) -> Visible:
        """Keys up to the query's own position, from its window and chunk on, and behind the sinks of a ring."""
        low = constant(self.spec.sinks_kept) if self.spec.sinks_kept else None
        if self.spec.window > 0:
            low = (position - (self.spec.window - 1)).max(constant(0) if low is None else low)
        if self.spec.chunk > 0:
            chunk = position // self.spec.chunk * self.spec.chunk
            low = chunk if low is None else low.max(chunk)
        return Visible(low, position + 1)

    def _sink(self, head: Val) -> Val | None:
        return self.buffers.sinks.load(head).to("f32") if self.buffers.sinks else None

    def _adjust(self, batch: Val, head: Val, first: Val) -> Adjust | None:
        spec, bias = self.spec, self.buffers.bias
        if bias is None:
            return None

        def adjust(score: Val, row: Val, key: Val, lanes: int) -> Val:
            at = self._position(batch, head, key)
            sequence, token = self._token(batch, first, row // spec.group)
            place = {"b": sequence, "h": head * spec.group + row % spec.group, "s": token, "t": at}
            size = {"b": self.b, "h": constant(spec.heads), "s": self.s, "t": constant(spec.cache.length)}
            return score + load_broadcast(self.kernel, bias, spec.bias, place, size, lanes).to("f32")

        return adjust
