"""Append keys and values to a cache in the layout of `CacheLayout`."""

from dataclasses import dataclass
from typing import Any

from tilewright.codegen.attention_pattern import DENSE, Slice
from tilewright.codegen.cache import CacheLayout, value_panels
from tilewright.codegen.cache_codes import CodeLayout
from tilewright.codegen.cache_slots import SLOT_STEP
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.kv_codes_recent import RecentWriter, Windows
from tilewright.codegen.mlir.kv_codes_write import CodeWriter
from tilewright.codegen.mlir.kv_places import Places, key_place
from tilewright.codegen.mlir.kv_summary import summarize
from tilewright.codegen.mlir.rows import Angles, Rope, Row
from tilewright.codegen.mlir.value import Val, constant
from tilewright.codegen.target import CpuTarget
from tilewright.ir import Paged


@dataclass(frozen=True)
class AppendSpec:
    """k ``[B, S, heads, dim]`` and v ``[B, S, heads, vdim]`` into slots ``start[b]`` and on; S and B are dims. There is no
    v where values are among the keys.

    ``s`` is S when it is static. With ``rope`` the keys are rotated on the way.
    """

    cache: CacheLayout | CodeLayout
    dtype: str = "f32"
    s: int | None = None
    rope: Rope | None = None
    k: Slice = DENSE
    v: Slice = DENSE

    @property
    def keeps_recent(self) -> bool:
        """Whether the newest tokens are no codes yet: then one task writes those of a head."""
        return isinstance(self.cache, CodeLayout) and self.cache.keeps_recent

    def runs(self, s: Any) -> Any:
        """Tasks that the tokens of one sequence are cut into; they meet at slots that are multiples of SLOT_STEP."""
        return 1 if self.s == 1 or self.keeps_recent else -(-s // SLOT_STEP) + 1

    def tasks(self, b: Any, s: Any) -> Any:
        """Number of tasks."""
        return b * self.cache.heads * self.runs(s)


@dataclass(frozen=True)
class AppendBuffers:
    """Arguments of the kernel: the cache, the new keys and values, ``start`` i64 [B], tables of a rotation, that of pages,
    i32 [B, T] with ``width`` T, and the windows of sequences whose codes are in pages."""

    cache_k: Buffer
    cache_v: Buffer
    k: Buffer
    v: Buffer | None
    start: Buffer
    cos: Buffer | None = None
    sin: Buffer | None = None
    table: Buffer | None = None
    width: Val | None = None
    kw: Buffer | None = None
    vw: Buffer | None = None


def append_kernel(name: str, target: CpuTarget, spec: AppendSpec) -> Kernel:
    """The whole kernel: dims B, S; buffers cache k, cache v, k, v, start, and cos and sin if the spec has them.

    With pages there are a dim T and a buffer table; windows apart come last.
    """
    stored = spec.cache.stored
    given = [("cache_k", stored), ("cache_v", stored), ("k", spec.dtype), ("v", spec.dtype)]
    tables = [("cos", spec.rope.dtype), ("sin", spec.rope.dtype)] if spec.rope else []
    paged = isinstance(spec.cache.layout, Paged)
    given += [("start", "i64"), *tables, *[("table", "i32")] * paged, *[(name, "u8") for name in spec.cache.windows]]
    with Kernel(name, target, ("B", "S", *["T"] * paged), given) as kernel:
        named = {name: buffer for (name, _), buffer in zip(given, kernel.buffers)}
        emit_append(kernel, spec, kernel.dims["S"], AppendBuffers(**named, width=kernel.dims.get("T")))
    return kernel


def emit_append(kernel: Kernel, spec: AppendSpec, s: Val, buffers: AppendBuffers) -> None:
    """Emit the task loop into ``kernel``."""
    _Append(kernel, spec, s, buffers).emit()


class _Append:
    """The state of one emission."""

    def __init__(self, kernel: Kernel, spec: AppendSpec, s: Val, buffers: AppendBuffers) -> None:
        self.kernel, self.spec, self.cache, self.s, self.buffers = kernel, spec, spec.cache, s, buffers
        if isinstance(spec.cache, CodeLayout):
            self.codes = CodeWriter(kernel, spec.cache)
            self.recent = RecentWriter(kernel, spec.cache) if spec.keeps_recent else None
        else:
            self.row = kernel.scratch(-(-spec.cache.key_size // kernel.lanes) * kernel.lanes, spec.cache.dtype)
        self.places = Places(spec.cache, buffers.table, buffers.width)
        self.angles = None
        if spec.rope is not None and buffers.cos is not None and buffers.sin is not None:
            self.angles = Angles(spec.rope, buffers.cos, buffers.sin)

    def emit(self) -> None:
        runs = 1 if self.spec.keeps_recent else (self.s + (SLOT_STEP - 1)) // SLOT_STEP + 1
        with self.kernel.loop(self.kernel.begin, self.kernel.end) as tasks:
            lane = tasks.index if self.spec.s == 1 else tasks.index // runs
            batch, head = lane // self.cache.heads, lane % self.cache.heads
            start = self.buffers.start.load(batch).to("index")
            if isinstance(self.cache, CacheLayout) and self.cache.budget:
                start = start.min(constant(self.cache.budget))  # a slot: those that stay are in front
            if self.spec.keeps_recent:
                self._recent(batch, head, start)
            elif self.spec.s == 1:
                self._token(batch, head, constant(0), start)
            else:
                first = start // SLOT_STEP * SLOT_STEP + tasks.index % runs * SLOT_STEP
                with self.kernel.loop(first.max(start), (first + SLOT_STEP).min(start + self.s)) as slots:
                    self._token(batch, head, slots.index - start, slots.index)

    def _recent(self, batch: Val, head: Val, start: Val) -> None:
        """All tokens of one head into its window, and from there, in whole groups, into codes."""
        cache, buffers = self.cache, self.buffers
        assert isinstance(cache, CodeLayout)
        assert self.recent is not None
        windows = Windows(cache, buffers.kw or buffers.cache_k, buffers.vw or buffers.cache_v)

        def run(position: Val) -> tuple[Buffer, Buffer]:
            found = self.places.run_of(batch, head, position)
            return (buffers.cache_k.at(found * cache.k_run + batch * cache.k_behind),
                    buffers.cache_v.at(found * cache.v_run + batch * cache.v_behind))

        new = (lambda position, column: self._key_row(batch, head, position - start).load(column),
               lambda position, column: self._value_row(batch, head, position - start).load(column))
        rows = windows.keys(batch, head), windows.values(batch, head)
        self.recent.append(start, start + self.s, new, rows, run)

    def _key_row(self, batch: Val, head: Val, token: Val) -> Row:
        """The key of one token of one head."""
        size, rope = self.cache.dim, self.spec.rope
        at = None if rope is None else rope.place(batch, token, self.s)
        return Row(self.kernel, self.buffers.k, self._place(self.spec.k, size, batch, head, token), size, self.angles, at)

    def _value_row(self, batch: Val, head: Val, token: Val) -> Row:
        size, v = self.cache.vdim, self.buffers.v
        assert v is not None
        return Row(self.kernel, v, self._place(self.spec.v, size, batch, head, token), size)

    def _place(self, where: Slice, size: int, batch: Val, head: Val, token: Val) -> Val:
        return (batch * self.s + token) * (where.stride or self.cache.heads * size) + (head * size + where.offset)

    def _token(self, batch: Val, head: Val, token: Val, position: Val) -> None:
        """One token of one head into its slot."""
        cache, buffers = self.cache, self.buffers
        key = self._key_row(batch, head, token)
        run, slot = self.places.of(batch, head, position)
        if isinstance(cache, CodeLayout):
            self.codes.key(key.load, buffers.cache_k.at(key_place(cache, run)), slot)
            self.codes.value(self._value_row(batch, head, token).load, buffers.cache_v.at(run * cache.v_run), slot)
        else:
            self._key(key, buffers.cache_k.at(key_place(cache, run) + batch * cache.notes_size), slot)
            if not cache.in_keys:
                self._value(self._value_row(batch, head, token),
                            buffers.cache_v.at(run * (cache.run * cache.value_size)), slot)
        if cache.summary:
            with self.kernel.when(slot.eq(cache.run - 1)):
                summarize(self.kernel, cache, buffers.cache_k, run)

    def _key(self, source: Row, k: Buffer, slot: Val) -> None:
        """Scatter one key over its panel, a pair at a time."""
        cache = self.cache
        for start in range(0, cache.key_size, self.kernel.lanes):
            self.row.store(source.load(start).to(cache.dtype), start)
        panel = cache.key_panel
        place = slot // panel * (panel * cache.key_size) + slot % panel * cache.pair
        with self.kernel.loop(0, cache.key_size, cache.pair) as loop:
            k.store(self.row.load(loop.index, cache.pair), place + loop.index * panel)

    def _value(self, source: Row, v: Buffer, slot: Val) -> None:
        """Write one value; in a pair, the first clears the second, which it precedes, and the second keeps the first."""
        cache = self.cache
        for start, width in value_panels(cache.value_size, cache.panel):
            for column in range(0, width, self.kernel.lanes):
                if start + column >= cache.vdim:
                    return
                value = source.load(start + column).to(cache.dtype)
                at = slot // cache.pair * (cache.pair * width) + (start * cache.run + column * cache.pair)
                v.store(value if cache.pair == 1 else self._paired(value, v, at, slot), at)

    def _paired(self, value: Val, v: Buffer, at: Val, slot: Val) -> Val:
        wide = value.bitcast("i16").to("i32") & 0xFFFF
        kept = v.load(at, 2 * self.kernel.lanes).bitcast("i32") & 0xFFFF
        return (slot % 2).eq(0).select(wide, (wide << 16) | kept).bitcast("bf16")
