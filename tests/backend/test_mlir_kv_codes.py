"""Append to caches of codes and attend to them, against the interpreter's definition of what slots decode to.

Scores are within half a step of 8 bits of the query's largest component for each component, and a weight within half a step
of 8 bits of the largest weight of a block: with one digit each, results (averages of standard normal values, of heads that
are random too) are about 1 % off, with two 256 times less. Keys under scales of channels are rounded to 8 bits first.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from tests.backend.attention_cases import expected
from tests.backend.mlir_helpers import library_calls, target
from tilewright.codegen.cache import cache_layout, panel_for
from tilewright.codegen.cache_codes import CodeLayout
from tilewright.codegen.mlir.attention_emitter import AttentionEmitter
from tilewright.codegen.mlir.kv import AttendSpec, attend_kernel
from tilewright.codegen.mlir.kv_append import AppendSpec, append_kernel
from tilewright.codegen.mlir.kv_codes import Digits
from tilewright.codegen.mlir.lower import assembly
from tilewright.codegen.mlir.native import NativeKernel, aligned
from tilewright.codegen.schedule import AttentionSchedule
from tilewright.codegen.standalone import StandaloneKernel
from tilewright.codegen.target import parse_target
from tilewright.ir import DType, Function, KVType, Layout, Paged, Return, Ring, TensorType, ops
from tilewright.ir.ops.attention import attend, visible
from tilewright.ir.ops.kv_codes import appended, encode, rounded

Array = np.ndarray[Any, Any]
V3, V4, VNNI = "x86-64-v3", "x86-64-v4", "cpu{arch=x86-64-v4 features=+avx512vnni}"
ONE, TWO = Digits(1, 1), Digits(2, 2)
LIMIT = {1: 0.03, 2: 2e-4}  # root of the mean square, of the results': by digits, keys under scales of tokens
CHANNELS = 0.02  # what rounding keys to 8 bits adds
FACTORS = 3e-3  # what factors make of normal numbers, summed up in another order and rounded to f16
FULL = 1e-6  # all tokens are still in full


def kind(dtype: str, dim: int = 32, vdim: int = 32, length: int = 400, heads: int = 2, **given: Any) -> KVType:
    given = {key: DType(value) if key in ("scales", "full") else value for key, value in given.items()}
    return KVType(heads, dim, vdim, length, DType(dtype), **given)


class Text:
    """Two sequences that grow: their caches, what these decode to by definition, and kernels over them."""

    def __init__(self, name: str, cache: KVType, group: int, digits: Digits, keys: int = 0, parts: int = 1,
                 **given: Any) -> None:  # fmt: skip
        self.cache, self.target, self.heads, self.digits = cache, target(name), cache.heads * group, digits
        self.layout = cache_layout(cache, self.target)
        self.keys, self.parts, self.given = keys, parts, {"scale": cache.dim**-0.5, **given}
        self.rng, self.position = np.random.default_rng(0), 0
        self.memory = tuple(aligned(x.shape, "u8") for x in self.layout.empty(2 * max(cache.pages, 1)))
        self.windows = tuple(aligned(x.shape, "u8") for x in self.layout.own(2))
        self.tables = [aligned((2, cache.pages), "i32")] if cache.page else []
        for table in self.tables:
            table[...] = self.rng.permutation(2 * cache.pages).reshape(2, -1)
        self.dims = (cache.pages,) if cache.page else ()
        self.append_spec = AppendSpec(self.layout, "f32")
        self.append_kernel = NativeKernel(append_kernel("k", self.target, self.append_spec))
        self.attend_kernels: dict[bool, tuple[AttendSpec, AttentionSchedule, NativeKernel]] = {}
        self.held = tuple(np.zeros((2, cache.length, cache.heads, n), np.float32) for n in (cache.dim, cache.vdim))

    def normal(self, *shape: int) -> Array:
        out = aligned(shape, "f32")
        out[...] = self.rng.standard_normal(shape)
        return out

    def starts(self) -> Array:
        start = aligned(2, "i64")
        start[:] = self.position
        return start

    def append(self, tokens: int) -> None:
        """New tokens, by the kernel and by definition; both then hold the same, to the bit but for factors of errors."""
        cache, first, end = self.cache, self.position, self.position + tokens
        new = [self.normal(2, tokens, cache.heads, n) for n in (cache.dim, cache.vdim)]
        given = *self.memory, *new, self.starts(), *self.tables, *self.windows
        self.append_kernel(0, self.append_spec.tasks(2, tokens), (2, tokens, *self.dims), given)
        for held, x in zip(self.held, appended(cache, *new)):
            held[:, first:end] = x
        old, coded = cache.coded(first), cache.coded(end)
        if cache.keeps_recent and coded > old:
            for held, x in zip(self.held, rounded(cache, *(held[:, old:coded] for held in self.held))):
                held[:, old:coded] = x
        for held, x in zip(self.held, self.layout.read(*self.memory)):
            if self.tables:
                x = x[self.tables[0]].reshape(2, -1, *x.shape[2:])
            np.testing.assert_allclose(x[:, :coded], held[:, :coded], rtol=0, atol=FACTORS * cache.has_residual)
            held[:, :coded] = x[:, :coded]
        if cache.keeps_recent:
            for region in range(2):
                for held, x in zip(self.held, self.layout.read_recent(*(self.windows or self.memory), region, end)):
                    assert np.array_equal(x, held[region, coded:end])

    def attend(self, tokens: int) -> tuple[Array, Array]:
        """What the newest tokens' queries find, by the kernel and by definition."""
        spec, schedule, kernel = self.kernels(tokens)
        q = self.normal(2, tokens, self.heads, self.cache.dim)
        out = aligned((2, tokens, self.heads, self.cache.vdim), "f32", fill=9)
        more = {}
        if spec.bias:
            more["bias"] = self.normal(self.heads, tokens, self.cache.length)
        if spec.sinks:
            more["sinks"] = self.normal(self.heads)
        scratch = [aligned(size, "u8", fill=255) for size in spec.scratch(schedule, 2)]
        tasks, last = spec.tasks(schedule, 2, tokens), spec.last(schedule, 2)
        for begin, end in ((0, tasks // 2), (tasks // 2, tasks), (tasks, tasks + last)):
            given = q, *self.memory, self.starts(), *self.tables, *more.values(), *self.windows, out, *scratch
            kernel(begin, end, (2, tokens, *self.dims), given)
        where = self.starts()[:, None] + np.arange(tokens)
        keep = visible(where, np.arange(self.cache.length), True, spec.window, -1, spec.chunk)[:, None]
        return out, attend(q, *self.held, keep, more.get("bias"), more.get("sinks"), spec.scale, spec.softcap)

    def kernels(self, tokens: int) -> tuple[AttendSpec, AttentionSchedule, NativeKernel]:
        one = tokens == 1
        if one not in self.attend_kernels:
            spec = AttendSpec(self.heads, self.layout, s=1 if one else None, digits=self.digits, **self.given)
            schedule = AttentionSchedule.default(self.target)
            if one:
                schedule = AttentionSchedule.decoding(self.target, self.cache.dtype.value, 2, self.heads // 2)
                schedule = dataclasses.replace(schedule, parts=self.parts, keys=self.keys or schedule.keys)
            kernel = NativeKernel(attend_kernel("k", self.target, spec, schedule))
            self.attend_kernels[one] = spec, schedule, kernel
        return self.attend_kernels[one]

    def feed(self, chunks: list[int], limit: float) -> None:
        for tokens in chunks:
            self.append(tokens)
            got, want = self.attend(tokens)
            coded = self.cache.coded(self.position + tokens)
            error = np.sqrt(((got - want) ** 2).mean() / (want**2).mean())
            assert error <= (limit if coded else FULL), f"{tokens} tokens from {self.position} on: {error}"
            self.position += tokens


def limit_of(cache: KVType, digits: Digits) -> float:
    return LIMIT[digits.q] + CHANNELS * (cache.keys == "channel")


CACHES = {
    "i8": kind("i8"),
    "i4": kind("i4"),
    "i2": kind("i2"),
    "i8, f32 scales, odd sizes": kind("i8", 33, 20, scales="f32"),
    "i4, odd sizes": kind("i4", 33, 20),
    "i2, one component": kind("i2", 1, 1),
    "i8, recent": kind("i8", recent=40),
    "i4, channels": kind("i4", keys="channel"),
    "i4, channels, odd sizes": kind("i4", 33, 20, keys="channel", group=16, recent=20, full="f32", scales="f32"),
    "i2, channels, recent": kind("i2", keys="channel", recent=30),
    "i2, long groups": kind("i2", keys="channel", group=128),
    "i8, recent, pages": kind("i8", recent=40, layout=Paged(32)),
    "i4, channels, pages, odd sizes": kind("i4", 33, 20, keys="channel", group=16, recent=20, layout=Paged(16)),
    "i2, channels, recent, pages": kind("i2", keys="channel", recent=30, layout=Paged(64)),
    "i2, rank, pages": kind("i2", keys="channel", recent=30, rank=2, outliers=1, layout=Paged(32)),
    "i4, rank, odd sizes": kind("i4", 33, 20, recent=20, group=16, full="f32", scales="f32", rank=3),
    "i2, outliers": kind("i2", keys="channel", recent=30, outliers=1),
    "i4, rank and outliers, odd sizes": kind("i4", 33, 20, recent=20, group=16, rank=3, outliers=2),
    "i2, rank and outliers, odd sizes": kind("i2", 33, 20, keys="channel", group=16, scales="f32", rank=2, outliers=2),
    "i2, rank, long groups": kind("i2", 64, 64, keys="channel", group=128, rank=4),
}


SOME = ("i8", "i4, odd sizes", "i2, channels, recent", "i4, channels, odd sizes", "i4, channels, pages, odd sizes",
        "i2, rank, pages", "i4, rank and outliers, odd sizes", "i2, rank and outliers, odd sizes")


@pytest.mark.parametrize(("name", "what"), [*((VNNI, what) for what in CACHES), *((V3, what) for what in SOME),
                                            *((V4, what) for what in SOME[:2])])
def test_append_then_attend(name: str, what: str) -> None:
    """Prompts in chunks, in which several groups may become codes at once, and tokens one by one."""
    text = Text(name, CACHES[what], 3, TWO)
    text.feed([5, 1, 70, 1, 150, 30, 1], limit_of(CACHES[what], TWO))


@pytest.mark.parametrize(("name", "what"), [
    (V3, "i8"), (V3, "i4"), (V3, "i2"), (VNNI, "i8"), (VNNI, "i2, channels, recent"),
])
def test_one_digit(name: str, what: str) -> None:
    Text(name, CACHES[what], 3, ONE).feed([70, 1, 100, 1], limit_of(CACHES[what], ONE))


MORE = {
    "window": {"window": 50},
    "chunk": {"chunk": 64},
    "softcap": {"softcap": 4.0},
    "all": {"window": 90, "chunk": 128, "softcap": 4.0, "bias": "hst", "sinks": "f32"},
}


@pytest.mark.parametrize(("name", "what"), [(V3, "all"), *((VNNI, what) for what in MORE)])
def test_what_scores_meet(name: str, what: str) -> None:
    cache = kind("i4", keys="channel", recent=30) if what == "all" else kind("i8")
    Text(name, cache, 2, TWO, **MORE[what]).feed([100, 1, 40, 1], limit_of(cache, TWO))


@pytest.mark.parametrize(("name", "group"), [(V3, 3), (V4, 2), (VNNI, 1), (VNNI, 8)])
@pytest.mark.parametrize("recent", [0, 64])
def test_decode_in_parts(name: str, group: int, recent: int) -> None:
    text = Text(name, kind("i4", length=900, recent=recent), group, TWO, keys=64, parts=4)
    text.append(700)
    text.position = 700
    text.feed([1, 1], LIMIT[2])


def attending(cache: KVType, s: int | str) -> Function:
    """``kv.attend`` as fusion cuts it."""
    kernel = Function("k", kind="kernel")
    q = kernel.arg("q", TensorType(("B", s, 6, cache.dim), DType.f32))
    held, start = kernel.arg("cache", cache), kernel.arg("start", TensorType(("B",), DType.i64))
    table = {"table": kernel.arg("table", TensorType(("B", "T"), DType.i32))} if cache.page else {}
    op = kernel.append(ops.Attend(q, held, start, scale=cache.dim**-0.5, window=100, **table))
    kernel.append(Return(op.results))
    return kernel


@pytest.mark.parametrize("layout", [Paged(16), Paged(64), Ring(100, 40)], ids=str)
@pytest.mark.parametrize("dtype", ["i8", "i2"])
def test_pages_and_rings(layout: Layout, dtype: str) -> None:
    """Codes in pages give what codes in one piece do, to the bit; those round a ring what the definition does."""
    cache, plain = kind(dtype, length=320, layout=layout), kind(dtype, length=320)
    rng, starts = np.random.default_rng(0), np.array([130, 37])
    for s in (1, 20):
        rows = (2, cache.slots if isinstance(layout, Ring) else 320, 2, cache.dim)
        whole = rounded(cache, *(rng.standard_normal(rows).astype(np.float32) for _ in "kv"))
        q, dims = rng.standard_normal((2, s, 6, cache.dim)).astype(np.float32), {"B": 2, "S": s, "T": cache.pages}
        operands: list[Any] = [q, whole, starts]
        if cache.page:
            table = rng.permutation(2 * cache.pages).astype(np.int32)
            order = np.argsort(table)
            pages = tuple(x.reshape(-1, cache.page, 2, cache.dim)[order] for x in whole)
            operands = [q, pages, starts, table.reshape(2, -1)]
        kernel = attending(cache, 1 if s == 1 else "S")
        (got,) = StandaloneKernel(kernel, parse_target("x86-64-v3"), AttentionEmitter())(operands, dims)
        (want,) = expected(kernel, operands)
        assert np.sqrt(((got - want) ** 2).mean() / (want**2).mean()) <= LIMIT[1]
        if cache.page:
            alone = StandaloneKernel(attending(plain, 1 if s == 1 else "S"), parse_target("x86-64-v3"), AttentionEmitter())
            assert np.array_equal(got, alone([q, whole, starts], dims)[0])


def test_alike_numbers_and_zeros_are_kept() -> None:
    """A row of equal numbers has a scale of 1; a query of zeros weighs all keys alike."""
    text = Text("x86-64-v3", kind("i4"), 1, ONE)
    text.normal = lambda *shape: aligned(shape, "f32", 0.0)  # type: ignore[method-assign]
    text.append(9)
    got, want = text.attend(9)
    assert np.array_equal(got, want)


def test_kernel_does_what_it_says() -> None:
    """One digit, in NumPy as the kernel computes it: far nearer than the digits' own error."""
    cache = kind("i8", heads=1)
    text = Text("x86-64-v3", cache, 2, ONE, keys=64)
    text.append(60)
    text.position = 59
    state = text.rng.bit_generator.state
    got, _ = text.attend(1)
    text.rng.bit_generator.state = state
    q = text.normal(2, 1, 2, cache.dim)[:, 0]
    keys, values = (encode(x[:, :60, 0], DType.i8, -1) for x in text.held)
    scale = np.abs(q).max(-1, keepdims=True) * np.float32(1 / 127)
    digits = np.rint(q / scale)
    dots = digits @ keys.codes.astype(np.float32).transpose(0, 2, 1)
    scores = dots * keys.scale.astype(np.float32).transpose(0, 2, 1) * scale * np.float32(cache.dim**-0.5 / np.log(2))
    steps = values.scale.astype(np.float32).transpose(0, 2, 1)
    logs = steps.view(np.int32) * np.float32(2.0**-23) + np.float32(0.0861 - 127)
    p = 2 ** (scores - (scores + logs).max(-1, keepdims=True)) * np.float32(254.5)
    want = np.rint(p * steps) @ values.codes.astype(np.float32) / p.sum(-1, keepdims=True)
    assert np.abs(got[:, 0] - want).max() <= 4e-3 * np.abs(want).max(), "powers are up to 1.8e-3 off"


def test_layout_reads_what_it_wrote() -> None:
    rng = np.random.default_rng(0)
    plain = kind("i8"), kind("i4", 33, 20), kind("i2", 128, 80), kind("i4", 33, 20, keys="channel", group=16)
    gear = (kind("i2", 33, 20, keys="channel", group=16, rank=3), kind("i4", 33, 20, recent=1, rank=3, outliers=2),
            kind("i2", 33, 20, keys="channel", outliers=2))
    for cache in (*plain, *gear):
        layout = cache_layout(cache, parse_target("x86-64-v4"))
        keys, values = (rng.standard_normal((3, 64, 2, n)).astype(np.float32) for n in (cache.dim, cache.vdim))
        k, v = layout.write(keys, values)
        assert (k[0].nbytes, v[0].nbytes) == (layout.k_bytes, layout.v_bytes)
        for got, want in zip(layout.read(k, v), rounded(cache, keys, values)):
            np.testing.assert_allclose(got[:, :64], want, rtol=0, atol=1e-6 * cache.has_residual)


@pytest.mark.parametrize("keys", ["token", "channel"])
def test_types_say_what_is_allocated(keys: str) -> None:
    cache = kind("i2", 64, 32, 512, keys=keys, recent=32, rank=3, outliers=2)
    layout = cache_layout(cache, parse_target("x86-64-v4"))
    k, v = layout.empty(1)
    beside = layout.k_windows + layout.v_windows
    assert k.nbytes + v.nbytes - beside == cache.bytes_of(512)


@pytest.mark.parametrize("dtype", ["i8", "i4", "i2"])
def test_avx2_code_has_no_wide_registers(dtype: str) -> None:
    where = parse_target("x86-64-v3")
    layout = CodeLayout(2, 32, 32, 64, dtype, panel_for(where), keys="token" if dtype == "i8" else "channel", recent=20,
                        rank=2 * (dtype == "i2"), outliers=int(dtype == "i2"))
    kernels = (attend_kernel("k", where, AttendSpec(4, layout), AttentionSchedule.default(where)),
               append_kernel("k", where, AppendSpec(layout)))
    for kernel in kernels:
        code = assembly(kernel)
        assert "zmm" not in code
        assert library_calls(code) <= {"memset", "memcpy"}
