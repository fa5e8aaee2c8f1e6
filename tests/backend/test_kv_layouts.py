"""Attention and appending over pages and rings: against the interpreter, and pages bit by bit against one piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.backend.attention_cases import compare, expected
from tests.backend.harness import TARGETS
from tilewright.codegen.mlir.attention_emitter import AttentionEmitter
from tilewright.codegen.standalone import StandaloneKernel
from tilewright.codegen.target import parse_target
from tilewright.ir import CONTIGUOUS, DType, Function, KVType, Layout, Paged, Return, Ring, TensorType, ops

LIMIT = {"f32": 1e-5, "bf16": 2e-2, "f16": 2e-3}  # of values below 5; bf16: q, p and the result are rounded
LENGTH = 700
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 90},
    "chunk": {"chunk": 128},
    "all": {"window": 140, "chunk": 256, "softcap": 4.0, "bias": True, "sinks": True},
}


class Attending:
    """``kv.attend`` of ``heads`` queries over a cache of two heads, sequences of any positions."""

    def __init__(
        self, dtype: str, layout: Layout, heads: int, s: int | str, sizes: tuple[int, int] = (33, 20), bias: bool = False,
        sinks: bool = False, turned: bool = True, values: str = "own", **rule: Any
    ) -> None:
        self.kernel, kind = Function("k", kind="kernel"), DType(dtype)
        self.cache_type = KVType(2, *sizes, LENGTH, kind, layout, values=values)
        q = TensorType(("B", s, heads, sizes[0]), kind)
        add = self.kernel.arg
        given = [add("q", q), add("cache", self.cache_type), add("start", TensorType(("B",), DType.i64))]
        more = {"bias": add("bias", TensorType((1, heads, 1, LENGTH), DType.f32))} if bias else {}
        more |= {"sinks": add("sinks", TensorType((heads,), DType.f32))} if sinks else {}
        more |= {"table": add("table", TensorType(("B", "T"), DType.i32))} if self.cache_type.page else {}
        more |= {"q_sinks": add("far", q)} if self.cache_type.sinks and turned else {}
        op = self.kernel.append(ops.Attend(*given, scale=sizes[0] ** -0.5, **more, **rule))
        self.kernel.append(Return(op.results))

    def operands(self, starts: Sequence[int], s: int) -> tuple[list[Any], dict[str, int]]:
        """Random ones; the same numbers whatever the layout."""
        rng, kv, batch = np.random.default_rng(0), self.cache_type, len(starts)
        keys, values = (numbers(rng, (batch, LENGTH, kv.heads, n), kv.dtype) for n in (kv.dim, kv.vdim))
        whole = keys, values[..., : kv.own_vdim]
        dims = {"B": batch, "S": s, "T": kv.pages}
        table = pages_in_any_order(batch, kv)
        made = {"cache": stored(kv, whole, table), "start": np.array(starts), "table": table}
        return [made.get(a.name) if a.name in made else numbers(rng, tuple(dims.get(str(d), d) for d in a.shape), a.dtype)
                for a in self.kernel.args], dims  # fmt: skip


def numbers(rng: np.random.Generator, shape: Sequence[Any], dtype: DType) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype.np)


def pages_in_any_order(batch: int, kv: KVType) -> np.ndarray:
    return np.random.default_rng(5).permutation(batch * kv.pages).reshape(batch, -1).astype(np.int32)


def stored(kv: KVType, whole: tuple[np.ndarray, ...], table: np.ndarray) -> tuple[np.ndarray, ...]:
    """A cache with these tokens as its layout has them; a ring's slots hold any."""
    if isinstance(kv.layout, Ring):
        return tuple(np.ascontiguousarray(x[:, : kv.slots]) for x in whole)
    if not kv.page:
        return whole
    found = []
    for x in whole:
        padded = np.zeros((len(x), kv.slots, *x.shape[2:]), x.dtype)
        padded[:, : x.shape[1]] = x
        pool = np.zeros((table.size, kv.page, *x.shape[2:]), x.dtype)
        pool[table] = padded.reshape(len(x), kv.pages, kv.page, *x.shape[2:])
        found.append(pool)
    return tuple(found)


def run(case: Any, target: str, starts: Sequence[int], s: int) -> tuple[Any, Any]:
    """What the compiled kernel gives, and the interpreter."""
    operands, dims = case.operands(starts, s)
    compiled = StandaloneKernel(case.kernel, parse_target(target), AttentionEmitter())
    (got,), (want,) = compiled(operands, dims), expected(case.kernel, operands)
    return got, want


PAGES = [*((16, what, "f32") for what in RULES), (32, "all", "bf16"), (64, "plain", "bf16"), (64, "window", "f16")]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("page", "what", "dtype"), PAGES)
@pytest.mark.parametrize("s", [1, 21])
def test_pages(target: str, page: int, what: str, dtype: str, s: int) -> None:
    """Equal to one piece bit by bit, and right."""
    check_pages(target, page, [0, 63, LENGTH - s], s, dtype=dtype, heads=6, **RULES[what])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("heads", "sizes"), [(2, (128, 128)), (8, (64, 80)), (14, (16, 200)), (142, (8, 8))])
def test_pages_of_groups_and_sizes(target: str, heads: int, sizes: tuple[int, int]) -> None:
    check_pages(target, 16, [5, 699], 1, dtype="bf16", heads=heads, sizes=sizes)


def check_pages(target: str, page: int, starts: Sequence[int], s: int, **given: Any) -> None:
    count = 1 if s == 1 else "S"
    paged, want = run(Attending(layout=Paged(page), s=count, **given), target, starts, s)
    whole, _ = run(Attending(layout=CONTIGUOUS, s=count, **given), target, starts, s)
    compare(paged, want, LIMIT[given["dtype"]])
    assert np.array_equal(paged, whole)


RINGS = [(Ring(40, 24), "f32"), (Ring(90, 300), "bf16"), (Ring(90, 40, 4), "bf16"), (Ring(30, 24, 70), "f32")]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("layout", "dtype"), RINGS, ids=str)
@pytest.mark.parametrize("s", [1, 21])
def test_rings(target: str, layout: Ring, dtype: str, s: int) -> None:
    """Ragged starts: before the sinks are full, before the window is, and after several rounds."""
    rule = {"window": layout.window, "softcap": 2.0 * (s > 1), "sinks": s == 1}
    got, want = run(Attending(dtype, layout, 6, 1 if s == 1 else "S", **rule), target, [0, 3, 63, 130, LENGTH - s], s)
    compare(got, want, LIMIT[dtype])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("layout", "dtype"), RINGS[2:], ids=str)
@pytest.mark.parametrize("s", [1, 21])
def test_rings_whose_sinks_the_queries_meet_as_they_are(target: str, layout: Ring, dtype: str, s: int) -> None:
    case = Attending(dtype, layout, 6, 1 if s == 1 else "S", turned=False, window=layout.window)
    got, want = run(case, target, [0, 3, 63, 130, LENGTH - s], s)
    compare(got, want, LIMIT[dtype])


class Appending:
    """``kv.append`` to a cache of two heads."""

    def __init__(self, dtype: str, given: str, layout: Layout, s: int | str, values: str = "own") -> None:
        self.kernel, kv = Function("k", kind="kernel"), KVType(2, 33, 20, LENGTH, DType(dtype), layout, values=values)
        self.cache_type, add = kv, self.kernel.arg
        new = [add(name, TensorType(("B", s, 2, size), DType(given))) if size else None
               for name, size in (("k", kv.dim), ("v", kv.own_vdim))]  # fmt: skip
        cache, start = add("cache", kv), add("start", TensorType(("B",), DType.i64))
        table = [add("table", TensorType(("B", "T"), DType.i32))] if kv.page else []
        self.kernel.append(Return(self.kernel.append(ops.Append(cache, *new, start, *table)).results))

    operands = Attending.operands


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", [Paged(16), Paged(64), Ring(40, 70), Ring(40, 70, 5)], ids=str)
@pytest.mark.parametrize(("dtype", "given"), [("f32", "f32"), ("bf16", "bf16"), ("bf16", "f32")])
def test_append(target: str, layout: Layout, dtype: str, given: str) -> None:
    """Every slot that a query may see, of a chunk and of one token; bf16's odd neighbour may be cleared."""
    for s, starts in ((70, [0, 3, 61, 200]), (1, [0, 4, 5, 630])):
        case = Appending(dtype, given, layout, s if s == 1 else "S")
        got, want = run(case, target, starts, s)
        seen = visible_slots(case.cache_type, starts, s)
        for mine, theirs in zip(got, want):
            assert np.array_equal(mine[seen], theirs[seen])
            assert np.isfinite(mine.astype(np.float32)).all()


def visible_slots(kv: KVType, starts: Sequence[int], s: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the positions lie that a query at the end of a call may see."""
    rows, places = [], []
    table = pages_in_any_order(len(starts), kv)
    for b, start in enumerate(starts):
        first = max(start + s - kv.layout.window, 0) if isinstance(kv.layout, Ring) else 0
        for p in [*range(min(kv.sinks, start + s)), *range(max(first, kv.sinks), start + s)]:
            rows.append(table[b, p // kv.page] if kv.page else b)
            places.append(p % kv.page if kv.page else p if p < kv.sinks else kv.sinks + p % kv.layout.size)
    return np.array(rows), np.array(places)
