"""Choosing pages, and attending to those that are chosen: against the interpreter, and bit by bit where all are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.backend.attention_cases import compare, expected
from tests.backend.harness import TARGETS
from tests.backend.test_kv_layouts import LENGTH, LIMIT, numbers, pages_in_any_order, stored
from tilewright.codegen.cache import cache_layout
from tilewright.codegen.mlir.attention_emitter import AttentionEmitter
from tilewright.codegen.standalone import StandaloneKernel
from tilewright.codegen.target import parse_target
from tilewright.ir import DType, Function, KVType, Op, Paged, Return, TensorType, ops
from tilewright.ir.ops.kv_codes import rounded

STARTS = [0, 15, 16, 200, 447, LENGTH - 1]


class Case:
    """A kernel of one operation over pages of two heads, for one query of each of some sequences."""

    def __init__(self, dtype: str, page: int, heads: int, size: int = 32, given: str = "f32", **more: Any) -> None:
        self.kernel, self.heads, self.size = Function("k", kind="kernel"), heads, size
        self.cache_type = KVType(2, size, size, LENGTH, DType(dtype), Paged(page), summary="minmax", **more)
        add = self.kernel.arg
        self.q = add("q", TensorType(("B", 1, heads, size), DType(given)))
        self.cache, self.start = add("cache", self.cache_type), add("start", TensorType(("B",), DType.i64))
        self.table = add("table", TensorType(("B", "T"), DType.i32))

    def select(self, **given: Any) -> Case:
        return self.ends(ops.Select(self.q, self.cache, self.start, self.table, **given))

    def attend(self, most: int, bias: bool = False, **given: Any) -> Case:
        if bias:
            given["bias"] = self.kernel.arg("bias", TensorType((1, self.heads, 1, LENGTH), DType.f32))
        if most:
            given["pages"] = self.kernel.arg("pages", TensorType(("B", 2, most), DType.i32))
        return self.ends(ops.Attend(self.q, self.cache, self.start, scale=0.2, table=self.table, **given))

    def ends(self, op: Op) -> Case:
        self.kernel.append(Return(self.kernel.append(op).results))
        return self

    def operands(self, starts: Sequence[int], whole: bool = False) -> tuple[list[Any], dict[str, int]]:
        """``whole``: small integers, of which sums are exact and many are alike."""
        rng, kv, batch = np.random.default_rng(0), self.cache_type, len(starts)
        table = pages_in_any_order(batch, kv)

        def some(shape: Any, dtype: DType) -> np.ndarray:
            return rng.integers(-3, 4, shape).astype(dtype.np) if whole else numbers(rng, shape, dtype)

        memory = stored(kv, tuple(some((batch, LENGTH, 2, self.size), DType.f32) for _ in range(2)), table)
        dims = {"B": batch, "T": kv.pages}
        made: dict[str, Any] = {"cache": rounded(kv, *memory), "start": np.array(starts), "table": table}
        for arg in self.kernel.args:
            shape = tuple(dims.get(str(d), d) for d in arg.shape) if arg.name not in made else ()
            if arg.name == "pages":
                made["pages"] = some_pages(starts, kv.page, shape[2])
            elif arg.name not in made:
                made[arg.name or ""] = some(shape, arg.dtype)
        return [made[arg.name or ""] for arg in self.kernel.args], dims

    def run(self, target: str, operands: list[Any], dims: dict[str, int]) -> Any:
        return StandaloneKernel(self.kernel, parse_target(target), AttentionEmitter())(operands, dims)[0]


def some_pages(starts: Sequence[int], page: int, most: int) -> np.ndarray:
    """Any pages in order, the last among them, as many as fit; other ones for each head."""
    rng, out = np.random.default_rng(3), np.full((len(starts), 2, most), -1, np.int32)
    for b, start in enumerate(starts):
        for head in range(2):
            count = int(rng.integers(1, min(most, start // page + 1) + 1))
            out[b, head, : count - 1] = np.sort(rng.permutation(start // page)[: count - 1])
            out[b, head, count - 1] = start // page
    return out


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("dtype", "page", "share"), [("f32", 16, 0.25), ("bf16", 16, 0.4), ("bf16", 64, 0.25), ("f16", 32, 0.01)]
)
def test_pages_that_promise_the_most(target: str, dtype: str, page: int, share: float) -> None:
    """The same ones as the interpreter's, also of many alike; those behind the last are -1."""
    case = Case(dtype, page, heads=6, size=33 if page == 16 else 64, given=dtype).select(share=share, least=3)
    operands, dims = case.operands(STARTS, whole=True)
    assert np.array_equal(case.run(target, operands, dims), expected(case.kernel, operands)[0])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["i8", "i4", "i2"])
def test_pages_of_codes(target: str, dtype: str) -> None:
    """But for bounds that are alike within the rounding of sums."""
    case = Case(dtype, 16, heads=4, full=DType.f32).select(share=0.25, least=3)
    operands, dims = case.operands(STARTS)
    got, want = case.run(target, operands, dims), expected(case.kernel, operands)[0]
    assert np.array_equal(got, want)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("what", ["plain", "bias"])
@pytest.mark.parametrize(("dtype", "page"), [("f32", 16), ("bf16", 32), ("f16", 64)])
def test_attention_to_chosen_pages(target: str, what: str, dtype: str, page: int) -> None:
    case = Case(dtype, page, heads=6, given=dtype).attend(9, bias=what == "bias", softcap=3.0 * (what == "bias"))
    operands, dims = case.operands(STARTS)
    compare(case.run(target, operands, dims), expected(case.kernel, operands)[0], LIMIT[dtype])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "limit"), [("i8", 2e-2), ("i4", 3e-2)])
def test_attention_to_chosen_pages_of_codes(target: str, dtype: str, limit: float) -> None:
    case = Case(dtype, 32, heads=6).attend(9)
    operands, dims = case.operands(STARTS)
    compare(case.run(target, operands, dims), expected(case.kernel, operands)[0], limit)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "page"), [("f32", 16), ("bf16", 32), ("i8", 64), ("i4", 16)])
def test_all_pages_are_as_good_as_no_choice(target: str, dtype: str, page: int) -> None:
    """Bit by bit, whether a list has room for all pages of the cache or for those of the sequence alone."""
    plain, chosen, few = (Case(dtype, page, heads=6).attend(most) for most in (0, -(-LENGTH // page), 512 // page))
    for starts, case in ((STARTS, chosen), (STARTS[:-1], few)):
        operands, dims = plain.operands(starts)
        pages = np.arange(int(case.kernel.args[-1].shape[2]), dtype=np.int32)
        every = np.where(pages <= np.array(starts)[:, None] // page, pages, -1)[:, None].repeat(2, 1)
        got = case.run(target, [*operands, every.astype(np.int32)], dims)
        assert np.array_equal(got, plain.run(target, operands, dims))


class Memory(StandaloneKernel):
    """Gives the memory of a cache as it is."""

    def cache(self, value: Any, caches: Any) -> Any:
        return next(iter(caches.values()))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("dtype", "page", "full"), [("f32", 16, "f32"), ("bf16", 64, "bf16"), ("i8", 16, "f32"), ("i2", 32, "bf16")]
)
@pytest.mark.parametrize("s", [1, 70])
def test_append_says_what_full_pages_hold(target: str, dtype: str, page: int, full: str, s: int) -> None:
    """Of tokens that come one by one or many at once, whatever lay in the page before."""
    codes = {"full": DType(full)} if dtype[0] == "i" else {}
    case, starts = Case(dtype, page, heads=2, size=24, **codes), [0, 15, 63, 255]
    kind = case.cache_type
    kernel, new = Function("k", kind="kernel"), TensorType(("B", 1 if s == 1 else "S", 2, 24), DType.f32)
    values = [kernel.arg("cache", kind), kernel.arg("k", new), kernel.arg("v", new)]
    values += [kernel.arg("start", TensorType(("B",), DType.i64)), kernel.arg("table", TensorType(("B", "T"), DType.i32))]
    kernel.append(Return(kernel.append(ops.Append(*values)).results))
    (_, cache, start, table), dims = case.operands(starts)
    rng = np.random.default_rng(2)
    tokens = [rng.standard_normal((len(starts), s, 2, 24)).astype(np.float32) for _ in range(2)]
    operands = [cache, *tokens, start, table]
    got = Memory(kernel, parse_target(target), AttentionEmitter())(operands, {**dims, "S": s})[0]
    layout = cache_layout(kind, parse_target(target))
    keys, row = layout.read(*got)[0].astype(np.float32), layout.summary_row
    ended = {table[b, p // page] for b, first in enumerate(starts) for p in range(first, first + s) if p % page == page - 1}
    assert ended
    for region in ended:
        raw = got[0][region].reshape(-1).view(kind.summaries.np)[-4 * row :].reshape(2, 2, row)[..., :24]
        want = np.stack([keys[region].min(0), keys[region].max(0)], 1)
        rtol = 1e-2 if kind.summaries is DType.bf16 and kind.is_coded else 0.0
        np.testing.assert_allclose(raw.astype(np.float32), want, rtol, atol=1e-6)
