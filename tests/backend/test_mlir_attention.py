"""Attention kernels against the interpreter's definition over dtypes, ragged sizes, masks and targets."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from tests.backend.attention_cases import CACHED, MASKS
from tests.backend.mlir_helpers import TARGETS, library_calls, random_array, target
from tilewright.codegen.attention_pattern import Slice
from tilewright.codegen.cache import CacheLayout, panel_for
from tilewright.codegen.mlir.attention import AttentionSpec, attention_kernel
from tilewright.codegen.mlir.kv import AttendSpec, attend_kernel
from tilewright.codegen.mlir.kv_append import AppendSpec, append_kernel
from tilewright.codegen.mlir.lower import assembly, compile_kernel
from tilewright.codegen.mlir.native import NativeKernel, aligned, numpy_dtype
from tilewright.codegen.schedule import AttentionSchedule
from tilewright.codegen.target import parse_target
from tilewright.ir.ops.attention import attend, visible

# Results are averages of standard normal values, so below 5 in magnitude. With bf16, p (below 1) and the result are
# each rounded once, by at most 2**-9 of their size; the sums themselves are f32.
LIMIT = {"f32": 5e-6, "f16": 2e-3, "bf16": 2e-2}


def wide(array: np.ndarray | None) -> np.ndarray | None:
    return None if array is None else array.astype(np.float32)


def check(actual: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    error = np.abs(actual.astype(np.float64) - expected)
    assert error.max() <= LIMIT[dtype], f"{error.max()} at {np.unravel_index(int(error.argmax()), error.shape)}"


def extras(rng: np.random.Generator, spec: Any, size: dict[str, int]) -> dict[str, np.ndarray]:
    """Random mask, bias, sinks and padding, in the order of the kernel's arguments."""

    def shape(axes: str) -> tuple[int, ...]:
        return tuple(size[axis] if axis in axes else 1 for axis in "bhst")

    made = {}
    if getattr(spec, "mask", None):
        made["mask"] = aligned(shape(spec.mask), "bool")
        made["mask"][...] = rng.random(made["mask"].shape) < 0.5
    if spec.bias:
        made["bias"] = random_array(rng, shape(spec.bias), spec.bias_dtype)
    if spec.sinks:
        made["sinks"] = random_array(rng, size["h"], spec.sinks)
    if getattr(spec, "padding", False):
        made["padding"] = aligned((size["b"], size["t"]), "bool")
        made["padding"][...] = rng.random(made["padding"].shape) < 0.7
    return made


@dataclasses.dataclass
class Full:
    """A compiled attention kernel and how to run and to check it."""

    name: str
    spec: AttentionSpec
    seed: int = 0

    def __post_init__(self) -> None:
        where = target(self.name)
        self.schedule = AttentionSchedule.default(where)
        self.kernel = NativeKernel(attention_kernel("k", where, self.spec, self.schedule))
        self.rng = np.random.default_rng(self.seed)

    def check(self, b: int, s: int, t: int) -> None:
        spec, rng = self.spec, self.rng
        q = random_array(rng, (b, s, spec.heads, spec.dim), spec.dtype)
        k = random_array(rng, (b, t, spec.kv_heads, spec.dim), spec.dtype)
        v = random_array(rng, (b, t, spec.kv_heads, spec.vdim), spec.dtype)
        more = extras(rng, spec, {"b": b, "h": spec.heads, "s": s, "t": t})
        out = aligned((b, s, spec.heads, spec.vdim), spec.out_dtype, fill=9)
        tasks = spec.tasks(self.schedule, b, s)
        for piece in range(2):
            self.kernel(piece * tasks // 2, (piece + 1) * tasks // 2, (b, s, t), (q, k, v, *more.values(), out))
        check(out, self.expected(q, k, v, more), spec.dtype)

    def expected(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, more: dict[str, np.ndarray]) -> np.ndarray:
        spec, s, t = self.spec, q.shape[1], k.shape[1]
        keep = visible(np.arange(s) + t - s, np.arange(t), spec.causal, spec.window, spec.window_right, spec.chunk)
        keep = keep & more.get("mask", True)
        keep = keep & (more["padding"][:, None, None, :] if "padding" in more else True)
        with np.errstate(all="ignore"):
            return attend(wide(q), wide(k), wide(v), keep, wide(more.get("bias")), wide(more.get("sinks")),
                          spec.scale, spec.softcap)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_lengths(name: str, dtype: str) -> None:
    full = Full(name, AttentionSpec(4, 2, 32, 32, dtype, dtype, scale=0.2, causal=True))
    for b, s, t in ((2, 1, 1), (1, 1, 17), (2, 2, 2), (1, 15, 15), (2, 16, 127), (1, 17, 17), (1, 130, 130), (1, 7, 3)):
        full.check(b, s, t)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "vdim"),
    [(1, 1, 1, 1), (3, 1, 7, 65), (6, 2, 33, 20), (71, 1, 16, 16), (2, 2, 128, 80)],
)
def test_sizes_of_heads(name: str, dtype: str, heads: int, kv_heads: int, dim: int, vdim: int) -> None:
    Full(name, AttentionSpec(heads, kv_heads, dim, vdim, dtype, dtype, scale=dim**-0.5)).check(2, 9, 70)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("what", MASKS)
def test_masks(name: str, what: str) -> None:
    full = Full(name, AttentionSpec(4, 2, 16, 16, scale=0.25, **MASKS[what]))
    full.check(2, 40, 40)
    full.check(1, 5, 70)


def test_rows_that_see_nothing_are_zero() -> None:
    where = target("x86-64-v3")
    spec, schedule = AttentionSpec(1, 1, 8, 8, padding=True), AttentionSchedule.default(where)
    kernel = NativeKernel(attention_kernel("k", where, spec, schedule))
    rng = np.random.default_rng(0)
    q, k, v = (random_array(rng, (1, 4, 1, 8), "f32") for _ in "qkv")
    out = aligned((1, 4, 1, 8), "f32", fill=9)
    kernel(0, spec.tasks(schedule, 1, 4), (1, 4, 4), (q, k, v, aligned((1, 4), "bool"), out))
    assert (out == 0).all()


@pytest.mark.parametrize("name", TARGETS)
def test_slices_of_a_fused_projection(name: str) -> None:
    """q, k and v side by side in one buffer; the result into part of a wider one."""
    where, rng = target(name), np.random.default_rng(0)
    heads, kv_heads, dim = 4, 2, 16
    row = (heads + 2 * kv_heads) * dim
    parts = {"q": Slice(row), "k": Slice(row, heads * dim), "v": Slice(row, (heads + kv_heads) * dim)}
    spec = AttentionSpec(heads, kv_heads, dim, dim, causal=True, scale=0.25, out=Slice(100, 7), **parts)
    schedule = AttentionSchedule.default(where)
    fused, out = random_array(rng, (2, 20, row), "f32"), aligned((2, 20, 100), "f32", fill=9)
    kernel = NativeKernel(attention_kernel("k", where, spec, schedule))
    kernel(0, spec.tasks(schedule, 2, 20), (2, 20, 20), (fused, fused, fused, out))
    q, k, v = np.split(fused.reshape(2, 20, -1, dim), [heads, heads + kv_heads], axis=2)
    keep = visible(np.arange(20), np.arange(20), True, -1, -1, 0)
    check(out[..., 7:7 + heads * dim].reshape(2, 20, heads, dim), attend(q, k, v, keep, None, None, 0.25, 0.0), "f32")
    assert (out[..., :7] == 9).all()
    assert (out[..., 71:] == 9).all()


# --- with a cache -----------------------------------------------------------------------------------------------------


def filled_cache(
    rng: np.random.Generator, layout: CacheLayout, batch: int, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    keys = random_array(rng, (batch, tokens, layout.heads, layout.dim), layout.dtype)
    values = random_array(rng, (batch, tokens, layout.heads, layout.vdim), layout.dtype)
    cache = []
    for array in layout.write(keys, values):
        cache.append(aligned(array.shape, layout.dtype, fill=None))
        cache[-1][...] = array
    return cache[0], cache[1]


def test_layout_reads_what_it_wrote() -> None:
    rng = np.random.default_rng(0)
    for dtype, dim, vdim, panel in (("f32", 33, 20, 64), ("bf16", 33, 80, 64), ("bf16", 64, 64, 16), ("f16", 5, 40, 16)):
        layout = CacheLayout(2, dim, vdim, 70, dtype, panel)
        keys, values = random_array(rng, (3, 40, 2, dim), dtype), random_array(rng, (3, 40, 2, vdim), dtype)
        k, v = layout.write(keys, values)
        assert k[0].nbytes == layout.k_bytes
        assert v[0].nbytes == layout.v_bytes
        read_k, read_v = layout.read(k, v)
        assert np.array_equal(read_k[:, :40], keys)
        assert np.array_equal(read_v[:, :40], values)
        assert not read_k[:, 40:].astype(bool).any()


def test_unknown_cache_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="no cache of i4; known: f32, f16, bf16"):
        CacheLayout(1, 8, 8, 8, "i4")


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("dtype", "stored"), [("f32", "f32"), ("bf16", "bf16"), ("f32", "bf16"), ("f32", "f16")])
@pytest.mark.parametrize(("dim", "vdim"), [(64, 64), (33, 20), (1, 1)])
def test_append(name: str, dtype: str, stored: str, dim: int, vdim: int) -> None:
    """New tokens land in their slots, and older ones stay; a stale neighbour of the last one is cleared."""
    where, rng = target(name), np.random.default_rng(0)
    layout = CacheLayout(2, dim, vdim, 70, stored, panel_for(where))
    spec = AppendSpec(layout, dtype)
    kernel = NativeKernel(append_kernel("k", where, spec))
    for s, starts in ((1, [0, 33]), (2, [15, 16]), (17, [0, 53]), (65, [5, 2])):
        k, v = filled_cache(rng, layout, 2, 70)
        expected = [array.copy() for array in layout.read(k, v)]
        new_k, new_v = random_array(rng, (2, s, 2, dim), dtype), random_array(rng, (2, s, 2, vdim), dtype)
        start = aligned(2, "i64")
        start[:] = starts
        kernel(0, spec.tasks(2, s), (2, s), (k, v, new_k, new_v, start))
        for array, new in zip(expected, (new_k, new_v)):
            for b, at in enumerate(starts):
                array[b, at:at + s] = new[b].astype(numpy_dtype(stored))
        for got, want in zip(layout.read(k, v), expected):
            for b, at in enumerate(starts):
                assert np.array_equal(got[b, :at + s], want[b, :at + s])
                assert np.isfinite(got.astype(np.float32)).all()


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("dtype", "stored", "what"), [
    *(("f32", "f32", what) for what in CACHED), ("bf16", "bf16", "plain"), ("bf16", "bf16", "all"),
    ("f32", "bf16", "window"), ("f32", "f16", "plain"),
])
def test_attend(name: str, dtype: str, stored: str, what: str) -> None:
    """Decode and chunks of a prompt; the cache holds old tokens beyond what a query may see."""
    where, rng = target(name), np.random.default_rng(0)
    layout = CacheLayout(2, 33, 20, 140, stored, panel_for(where))
    spec = AttendSpec(6, layout, dtype, dtype, scale=33**-0.5, **CACHED[what])
    schedule = AttentionSchedule.default(where)
    kernel = NativeKernel(attend_kernel("k", where, spec, schedule))
    k, v = filled_cache(rng, layout, 2, 140)
    for s, starts in ((1, [0, 99]), (1, [15, 127]), (2, [63, 1]), (37, [0, 100])):
        q, out = random_array(rng, (2, s, 6, 33), dtype), aligned((2, s, 6, 20), dtype, fill=9)
        start = aligned(2, "i64")
        start[:] = starts
        more = extras(rng, spec, {"b": 2, "h": 6, "s": s, "t": 140})
        kernel(0, spec.tasks(schedule, 2, s), (2, s), (q, k, v, start, *more.values(), out))
        keep = visible(np.array(starts)[:, None] + np.arange(s), np.arange(140), True, spec.window, -1, spec.chunk)
        old_k, old_v = layout.read(k, v)
        expected = attend(wide(q), wide(old_k), wide(old_v), keep[:, None], more.get("bias"), more.get("sinks"),
                          spec.scale, spec.softcap)
        check(out, expected, dtype)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize(("group", "dim", "vdim"), [(1, 128, 128), (4, 128, 128), (7, 64, 80), (8, 16, 200), (71, 8, 8)])
def test_decode(name: str, dtype: str, group: int, dim: int, vdim: int) -> None:
    """With S known to be 1, tiles fit the group of heads exactly."""
    Decode(name, dtype, group, dim, vdim, {}).check([0, 64, 149])


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("what", CACHED)
@pytest.mark.parametrize("parts", [2, 8])
def test_decode_in_parts(name: str, what: str, parts: int) -> None:
    """Parts of a head's keys, put together at the end; the first sequence is too short for more than one."""
    decode = Decode(name, "f32", 3, 33, 20, CACHED[what], parts)
    decode.check([0, 500, 700])
    decode.check([63, 64, 127])


@dataclasses.dataclass
class Decode:
    """One query of three sequences over a cache."""

    name: str
    dtype: str
    group: int
    dim: int
    vdim: int
    given: dict[str, Any]
    parts: int = 0

    def check(self, starts: list[int]) -> None:
        where, rng, heads, length = target(self.name), np.random.default_rng(0), 2 * self.group, max(starts) + 1
        layout = CacheLayout(2, self.dim, self.vdim, length, self.dtype, panel_for(where))
        spec = AttendSpec(heads, layout, self.dtype, self.dtype, scale=self.dim**-0.5, s=1, **self.given)
        schedule = AttentionSchedule.decoding(where, self.dtype, 2, self.group)
        schedule = dataclasses.replace(schedule, parts=self.parts or schedule.parts)
        kernel = NativeKernel(attend_kernel("k", where, spec, schedule))
        k, v = filled_cache(rng, layout, 3, length)
        q, out = random_array(rng, (3, 1, heads, self.dim), self.dtype), aligned((3, 1, heads, self.vdim), self.dtype, 9)
        more = extras(rng, spec, {"b": 3, "h": heads, "s": 1, "t": length})
        start, scratch = aligned(3, "i64"), [aligned(size, "u8", fill=255) for size in spec.scratch(schedule, 3)]
        start[:] = starts
        tasks, last = spec.tasks(schedule, 3, 1), spec.last(schedule, 3)
        for begin, end in ((0, tasks // 2), (tasks // 2, tasks), (tasks, tasks + last)):
            kernel(begin, end, (3, 1), (q, k, v, start, *more.values(), out, *scratch))
        keep = visible(start[:, None], np.arange(length), True, spec.window, -1, spec.chunk)[:, None]
        old_k, old_v = layout.read(k, v)
        expected = attend(wide(q), wide(old_k), wide(old_v), keep, more.get("bias"), more.get("sinks"), spec.scale,
                          spec.softcap)
        check(out, expected, self.dtype)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_avx2_code_has_no_wide_registers(dtype: str) -> None:
    where = parse_target("x86-64-v3")
    layout, schedule = CacheLayout(2, 24, 24, 64, dtype, 16), AttentionSchedule.default(where)
    for kernel in (
        attention_kernel("k", where, AttentionSpec(4, 2, 24, 24, dtype, dtype, mask="bst"), schedule),
        attend_kernel("k", where, AttendSpec(4, layout, dtype, dtype), schedule),
        append_kernel("k", where, AppendSpec(layout, dtype)),
    ):
        code = assembly(kernel)
        assert "zmm" not in code
        assert library_calls(code) <= {"memset", "memcpy"}


def test_code_is_deterministic() -> None:
    where = parse_target("x86-64-v4")
    spec, schedule = AttentionSpec(2, 1, 16, 16, "bf16", "bf16"), AttentionSchedule.default(where)
    first, second = (compile_kernel(attention_kernel("k", where, spec, schedule)) for _ in range(2))
    assert first == second
