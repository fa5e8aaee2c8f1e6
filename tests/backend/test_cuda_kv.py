"""CUDA kernels over pages and codes, on an emulated device: against the interpreter, pages bit by bit against one piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from tests.backend.attention_cases import compare, expected
from tests.cuda.standalone import DeviceCache, EmulatedKernel
from tilewright.codegen.cuda import source
from tilewright.codegen.cuda.attention import CudaAttentionEmitter
from tilewright.codegen.cuda.cache import CudaCacheLayout
from tilewright.codegen.cuda.compile import Cubin
from tilewright.codegen.schedule import parse_schedule
from tilewright.codegen.target import parse_target
from tilewright.ir import CONTIGUOUS, DType, Function, KVType, Layout, Paged, Return, TensorType, ops
from tilewright.ir.ops.kv_codes import rounded

TARGET = "cuda{arch=sm_80}"
EMITTER = CudaAttentionEmitter()
LIMIT = {"f32": 1e-5, "bf16": 1.2e-2, "f16": 5e-3}
SPARE = 3
"""Pages of a pool that no sequence has."""
STORED = [DType.bf16, DType.i8, DType.i4]


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cubin]:
    """That of the device, left out where nobody asks for what it says: it takes longer than the rest."""
    compile = source.compile_source
    monkeypatch.setattr(source, "compile_source", lambda text, target: Cubin(b"", {}))
    return compile


class Cached:
    """A cache of two heads with random tokens, new ones that come, and queries; the same numbers whatever the layout."""

    def __init__(
        self, q: str, stored: DType, layout: Layout = CONTIGUOUS, s: int | str = 1, heads: int = 6,
        sizes: tuple[int, int] = (32, 16), length: int = 150, kv_heads: int = 2, **codes: Any,
    ) -> None:  # fmt: skip
        self.q, self.s, self.heads = DType(q), s, heads
        self.kind = KVType(kv_heads, *sizes, length, stored, layout, **codes)

    def _kernel(self, op: type[Any], given: Sequence[tuple[str, Any]], **more: Any) -> Function:
        kernel = Function("k", kind="kernel")
        values = [kernel.arg(name, kind) for name, kind in given]
        values.append(kernel.arg("start", TensorType(("B",), DType.i64)))
        for name, shape in more.pop("others", {}).items():
            more[name] = kernel.arg(name, TensorType(shape, DType.f32))
        if self.kind.page:
            more["table"] = kernel.arg("table", TensorType(("B", "T"), DType.i32))
        kernel.append(Return(kernel.append(op(*values, **more)).results))
        return kernel

    def append(self) -> Function:
        kind = self.kind
        new = [(name, TensorType(("B", self.s, kind.heads, n), self.q)) for name, n in (("k", kind.dim), ("v", kind.vdim))]
        return self._kernel(ops.Append, [("cache", kind), *new])

    def attend(self, **more: Any) -> Function:
        q = TensorType(("B", self.s, self.heads, self.kind.dim), self.q)
        return self._kernel(ops.Attend, [("q", q), ("cache", self.kind)], scale=self.kind.dim**-0.5, **more)

    def operands(self, kernel: Function, starts: Sequence[int], s: int) -> tuple[list[Any], dict[str, int]]:
        """A cache with rounded numbers, and the rest."""
        kind, batch, rng = self.kind, len(starts), np.random.default_rng(0)
        table = np.random.default_rng(5).permutation(batch * kind.pages + SPARE)[: batch * kind.pages]
        table = table.reshape(batch, -1).astype(np.int32)
        whole = [rng.standard_normal((batch, kind.length, kind.heads, n)) for n in (kind.dim, kind.vdim)]
        dims = {"B": batch, "S": s, "T": kind.pages}
        made = {"cache": rounded(kind, *(self._paged(x, table) for x in whole)), "start": np.array(starts), "table": table}
        for arg in kernel.args:
            if arg.name not in made:
                shape = tuple(dims.get(str(d), d) for d in arg.shape)
                made[arg.name] = rng.standard_normal(shape).astype(arg.dtype.np)
        return [made[arg.name] for arg in kernel.args], dims

    def _paged(self, whole: np.ndarray, table: np.ndarray) -> np.ndarray:
        kind = self.kind
        if not kind.page:
            return whole
        padded = np.zeros((len(whole), kind.slots, *whole.shape[2:]))
        padded[:, : kind.length] = whole
        pool = np.zeros((table.size + SPARE, kind.page, *whole.shape[2:]))
        pool[table] = padded.reshape(len(whole), kind.pages, kind.page, *whole.shape[2:])
        return pool

    def tokens(self, cache: tuple[np.ndarray, ...], starts: Sequence[int], s: int) -> list[np.ndarray]:
        """The tokens of each sequence up to the newest, in order, wherever they lie."""
        kind, table = self.kind, self.operands(self.append(), starts, s)[0][-1]
        if kind.page:
            cache = tuple(x[table].reshape(len(starts), kind.slots, *x.shape[2:]) for x in cache)
        return [x[b, : start + s] for x in cache for b, start in enumerate(starts)]


def run(case: Cached, kernel: Function, starts: Sequence[int], s: int, schedule: str = "") -> tuple[Any, Any]:
    """What the kernel gives on a device where races are lost, and what the interpreter."""
    given, dims = case.operands(kernel, starts, s)
    compiled = EmulatedKernel(kernel, EMITTER, TARGET, parse_schedule(schedule) if schedule else None, late=True)
    return compiled(given, dims)[0], expected(kernel, given)[0]


# --- appending ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("s", [1, "S"])
def test_append(stored: DType, s: int | str) -> None:
    """Exactly the interpreter's numbers, in pages as in one piece."""
    starts, count = ([0, 149, 31], 1) if s == 1 else ([3, 100], 37)
    found = []
    for layout in (CONTIGUOUS, Paged(16 if stored.bits > 4 else 64)):
        case = Cached("bf16", stored, layout, s)
        got, want = run(case, case.append(), starts, count)
        assert all(np.array_equal(mine, theirs) for mine, theirs in zip(got, want))
        found.append(case.tokens(got, starts, count))
    assert all(map(np.array_equal, *found))


@pytest.mark.parametrize("stored", STORED[1:], ids=str)
def test_append_of_odd_sizes_with_wide_scales(stored: DType) -> None:
    case = Cached("f32", stored, Paged(32), "S", sizes=(33, 20), scales=DType.f32)
    starts = [0, 90]
    for mine, theirs in zip(*(case.tokens(cache, starts, 40) for cache in run(case, case.append(), starts, 40))):
        assert np.array_equal(mine[-40:], theirs[-40:])


@pytest.mark.parametrize("stored", STORED[1:], ids=str)
def test_tokens_that_are_all_alike_or_very_large(stored: DType) -> None:
    case = Cached("f32", stored)
    given, dims = case.operands(case.append(), [5, 6, 7], 1)
    given[1][0], given[1][1], given[1][2] = 2.5, 0.0, given[1][2] * 1e30
    got, want = EmulatedKernel(case.append(), EMITTER, TARGET)(given, dims)[0], expected(case.append(), given)[0]
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(got, want))


def test_tokens_without_a_page_are_not_written() -> None:
    """Those behind the table; its entries for earlier tokens are not looked at."""
    case = Cached("f32", DType.i8, Paged(16), "S")
    (cache, *new, start, table), dims = case.operands(case.append(), [40], 16)
    table = table[:, :3].copy()
    table[:, :2] = 1 << 30
    got = EmulatedKernel(case.append(), EMITTER, TARGET)([cache, *new, start, table], dims | {"T": 3})[0]
    changed = [page for page in range(len(cache[0])) if not np.array_equal(got[0][page], cache[0][page])]
    assert changed == [table[0, 2]]


# --- attending ---------------------------------------------------------------------------------------------------------

ATTENDING = [
    ("bf16", DType.bf16, 16), ("bf16", DType.bf16, 64), ("f32", DType.f32, 32), ("bf16", DType.i8, 16),
    ("bf16", DType.i4, 32), ("f32", DType.i8, 64), ("f16", DType.i4, 16),
]  # fmt: skip


@pytest.mark.parametrize(("q", "stored", "page"), ATTENDING, ids=str)
@pytest.mark.parametrize("s", [1, "S"])
def test_attend(q: str, stored: DType, page: int, s: int | str) -> None:
    """Decode and chunks of ragged prompts; pages give the very bits that one piece gives."""
    starts, count = ([0, 149, 63], 1) if s == 1 else ([0, 100], 21)
    found = []
    for layout in (CONTIGUOUS, Paged(page)):
        case = Cached(q, stored, layout, s)
        got, want = run(case, case.attend(), starts, count)
        compare(got, want, LIMIT[q])
        found.append(got)
    assert np.array_equal(*found)


RULES: dict[str, dict[str, Any]] = {
    "window": {"window": 40},
    "all": {"window": 60, "chunk": 64, "softcap": 4.0, "others": {"bias": (1, 6, 1, 150), "sinks": (6,)}},
}


@pytest.mark.parametrize("what", RULES)
@pytest.mark.parametrize(("q", "stored"), [("bf16", DType.i4), ("f32", DType.i8), ("bf16", DType.bf16)], ids=str)
def test_what_a_score_may_meet(what: str, q: str, stored: DType) -> None:
    for s, starts in ((1, [3, 149]), (5, [0, 140])):
        case = Cached(q, stored, Paged(16), s)
        compare(*run(case, case.attend(**RULES[what]), starts, s), LIMIT[q])


@pytest.mark.parametrize(("q", "stored", "heads", "kv_heads", "sizes"), [
    ("bf16", DType.i8, 4, 2, (33, 20)), ("bf16", DType.i4, 24, 1, (72, 64)), ("bf16", DType.bf16, 24, 1, (72, 64)),
    ("bf16", DType.i4, 2, 2, (264, 8)), ("f32", DType.i4, 3, 1, (7, 65)),
], ids=str)  # fmt: skip
def test_sizes_of_heads(q: str, stored: DType, heads: int, kv_heads: int, sizes: tuple[int, int]) -> None:
    """Odd ones, those of a latent, one that is too large for tensor cores; scales of either width."""
    codes = {"scales": DType.f32} if heads == 4 else {}
    case = Cached(q, stored, Paged(32), 2, heads, sizes, kv_heads=kv_heads, **codes)
    compare(*run(case, case.attend(), [0, 107], 2), LIMIT[q])


@pytest.mark.parametrize(("stored", "schedule"), [
    (DType.i8, "form=mma share=rows rows=32 keys=32 warps=2 stages=3 parts=3"),
    (DType.i4, "form=mma share=keys rows=64 keys=64 warps=4 stages=2 parts=2"),
    (DType.i4, "form=plain rows=4 keys=32 warps=4 stages=3 parts=2"),
    (DType.i8, "form=plain rows=16 keys=128 warps=2 stages=2"),
], ids=str)  # fmt: skip
def test_schedules(stored: DType, schedule: str) -> None:
    case = Cached("bf16", stored, Paged(16), length=500)
    compare(*run(case, case.attend(), [0, 250, 499], 1, f"cuda_attention{{{schedule}}}"), LIMIT["bf16"])


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("q", ["bf16", "f32"])
def test_what_lies_behind_the_last_token_does_not_matter(q: str, stored: DType) -> None:
    """Slots of its page, pages of nobody, entries of the table that name no page."""
    case, starts = Cached(q, stored, Paged(32)), [0, 70]
    kernel = case.attend()
    given, dims = case.operands(kernel, starts, 1)
    (want,) = expected(kernel, given)
    table, kind = given[-1], case.kind
    cache = DeviceCache.of(kind, TARGET, given[1])
    layout = CudaCacheLayout.of(kind)
    mine = {int(table[b, p]): start + 1 - p * 32 for b, start in enumerate(starts) for p in range(start // 32 + 1)}
    for part, rows in zip(cache.parts, (layout.keys, layout.values)):
        memory = part.array.view(np.uint8).reshape(-1, rows.bytes)
        for page in range(len(memory)):
            spoil(memory[page], rows, min(mine.get(page, 0), 32))
    for b, start in enumerate(starts):
        table[b, start // 32 + 1 :] = -1 << 30
    given[1] = cache
    compare(EmulatedKernel(kernel, EMITTER, TARGET, late=True)(given, dims)[0], want, LIMIT[q])


def spoil(page: np.ndarray, rows: Any, used: int) -> None:
    """Write bytes of NaNs behind the first slots of a page."""
    each = rows.bytes // (rows.heads * rows.slots) if rows.stored != "u8" else rows.row
    page[: rows.heads * rows.slots * each].reshape(rows.heads, rows.slots, each)[:, used:] = 0xFF
    if rows.stored == "u8":
        page[rows.codes :].reshape(rows.heads, rows.slots, rows.scale_bytes)[:, used:] = 0xFF


# --- layout and code ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [DType.f16, DType.f32], ids=str)
@pytest.mark.parametrize("stored", STORED[1:], ids=str)
def test_a_layout_reads_what_it_wrote(stored: DType, scales: DType) -> None:
    kind = KVType(2, 33, 20, 70, stored, scales=scales)
    rng, layout = np.random.default_rng(0), CudaCacheLayout.of(kind)
    numbers = tuple(rng.standard_normal((3, 40, 2, n)) for n in (33, 20))
    memory = layout.write(*numbers)
    assert [part[0].nbytes for part in memory] == [layout.k_bytes, layout.v_bytes]
    for read, want in zip(layout.read(*memory), rounded(kind, *numbers)):
        assert read.shape[1] == 70
        assert np.array_equal(read[:, :40], want)
        assert not read[:, 40:].any()


@pytest.mark.parametrize("layout", [CONTIGUOUS, Paged(16), Paged(64)], ids=str)
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_bytes_are_those_of_the_type(stored: DType, layout: Layout) -> None:
    """Where rows are whole pieces of 16 bytes, and the slots a multiple of 16."""
    kind = KVType(4, 64, 128, 1024, stored, layout)
    found = CudaCacheLayout.of(kind)
    assert found.k_bytes + found.v_bytes == kind.bytes_of(kind.page or 1024)


@pytest.mark.parametrize(("stored", "s"), [(DType.i8, 1), (DType.i4, 1), (DType.i4, "S")], ids=str)
def test_kernels_of_an_8b_model_keep_to_registers(stored: DType, s: int | str, compiler: Any, monkeypatch: Any) -> None:
    """32 heads of 128 in 8 groups over pages: nothing spills, and two blocks fit a multiprocessor."""
    kernel = Cached("bf16", stored, Paged(32), s, 32, (128, 128), 4096, kv_heads=8).attend()
    monkeypatch.setattr(source, "compile_source", compiler)
    target = parse_target("cuda{arch=sm_90a}")
    code = EMITTER.emit(kernel, EMITTER.default_schedule(kernel, target), target, "k")
    for launch in code.device.launches:
        used = code.device.resources[launch.symbol]
        assert used["spills"] == 0
        assert 2 * launch.block * used["registers"] <= 65536
        assert 2 * launch.shared <= target.shared_bytes
