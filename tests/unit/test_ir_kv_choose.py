"""``kv.choose`` and attention over what it gives, in the interpreter: against loops over queries, keys and blocks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.ir_cases.attention import loops
from tilewright.ir import (
    CONTIGUOUS,
    DType,
    Function,
    InterpreterError,
    Kept,
    KVType,
    Module,
    Paged,
    Return,
    Ring,
    TensorType,
    VerifyError,
    interpret,
    ops,
    parse_module,
    print_module,
    verify,
)

LENGTH, HEADS, GROUP, DIM = 330, 2, 3, 8
BLOCK, QUERIES, SCALE = 32, 16, 1.5
STARTS, S = (0, 45, 290), 40
KINDS: dict[str, dict[str, Any]] = {
    "a-shape": {"patterns": ("a-shape",), "sinks": 33, "local": 70},
    "dense": {"patterns": ("a-shape",), "dense": 61},
    "vertical-slash": {"patterns": ("vertical-slash",), "columns": 64, "slashes": 64, "sample": 20},
    "block-sparse": {"patterns": ("block-sparse",), "share": 0.4},
    "flex by products": {"patterns": ("flex",), "tau": 1.0, "gamma": 0.5},
    "flex by lines": {"patterns": ("flex",), "tau": 0.0, "gamma": 0.5, "sample": 7},
    "lines of one length": {"patterns": ("vertical-slash",), "columns": 32, "slashes": 32, "sample": 20, "tokens": 150},
    "flex of any length": {"patterns": ("flex",), "gamma": 0.3, "tokens": 200},
    "one length": {"patterns": ("a-shape", "block-sparse"), "tokens": 130, "local": 20, "sinks": 40},
    "each its own": {"patterns": ("a-shape", "block-sparse"), "share": 0.3, "local": 20, "dense": 60},
}


def module(page: int = 0, **given: Any) -> Module:
    """Blocks that are chosen, and attention over them."""
    kv = KVType(HEADS, DIM, DIM, LENGTH, DType.f32, Paged(page) if page else CONTIGUOUS)
    f = Function("f")
    q = f.arg("q", TensorType(("B", "S", HEADS * GROUP, DIM), DType.f32))
    cache, start = f.arg("cache", kv), f.arg("start", TensorType(("B",), DType.i64))
    table = f.arg("table", TensorType(("B", "T"), DType.i32)) if page else None
    chosen = ops.Choose(q, cache, start, table, block=BLOCK, queries=QUERIES, scale=SCALE, **given)
    blocks = f.append(chosen).result
    more = {"block": BLOCK, "queries": QUERIES}
    seen = f.append(ops.Attend(q, cache, start, table=table, blocks=blocks, scale=SCALE, **more)).result
    f.append(Return((blocks, seen)))
    made = Module("m", dims={"B": (1, 4), "S": (1, LENGTH), "T": (1, 99)})
    made.add(f)
    verify(made)
    return parse_module(print_module(made))


def inputs() -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Keys with a direction that some queries share, so that weights differ much."""
    rng = np.random.default_rng(3)
    q = rng.standard_normal((len(STARTS), S, HEADS * GROUP, DIM)).astype(np.float32)
    k, v = rng.standard_normal((2, len(STARTS), LENGTH, HEADS, DIM)).astype(np.float32)
    return q, (k + np.repeat(rng.standard_normal((len(STARTS), 1 + LENGTH // 11, HEADS, DIM)), 11, 1)[:, :LENGTH]
               .astype(np.float32), v), np.array(STARTS)  # fmt: skip


# --- the definition, one number at a time -----------------------------------------------------------------------------


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def sampled(q: np.ndarray, k: np.ndarray, start: int, sample: int) -> list[tuple[int, list[float]]]:
    """Position and weight of each block of every last query of every head."""
    end = start + q.shape[1]
    rows = []
    for member in range(GROUP):
        for s in range(max(q.shape[1] - sample, 0), q.shape[1]):
            weights = softmax(k[: start + s + 1] @ q[member, s] * SCALE)
            rows.append((start + s, [sum(weights[j : j + BLOCK]) for j in range(0, end, BLOCK)]))
    return rows


def by_products(q: np.ndarray, k: np.ndarray, low: int, high: int, end: int) -> list[float]:
    total = [0.0] * -(-end // BLOCK)
    for member in range(GROUP):
        mean = q[member, low:high].mean(0)
        keys = [k[j : min(j + BLOCK, end)].mean(0) for j in range(0, end, BLOCK)]
        for j, weight in enumerate(softmax(np.stack(keys) @ mean * SCALE)):
            total[j] += weight / GROUP
    return total


def greatest(weights: list[float], count: float, gamma: float, kept: set[int]) -> set[int]:
    taken = set(kept)
    for j in sorted(range(len(weights)), key=lambda j: -weights[j]):
        if len(taken) < count and sum(weights[i] for i in taken) < gamma:
            taken.add(j)
    return taken


def distance(p: list[float], q: list[float]) -> float:
    def to_middle(a: list[float]) -> float:
        return sum(x * math.log(2 * x / (y + z)) for x, y, z in zip(a, p, q) if x > 0)

    return math.sqrt(max(to_middle(p) + to_middle(q), 0) / 2)


def wanted(q: np.ndarray, k: np.ndarray, start: int, kind: str, local: int = 0, sinks: int = 1, dense: int = 0,
           tokens: int = 0, columns: int = 1024, slashes: int = 1024, share: float = 0.25, gamma: float = 0.9,
           tau: float = 0.1, sample: int = 64, **_: Any) -> list[list[int]]:  # fmt: skip
    """The lists of one key head."""
    q, k, size, out = q.astype(float), k.astype(float), q.shape[1], []
    rows = sampled(q, k, start, sample)
    column, slash = [0.0] * -(-(start + size) // BLOCK), [0.0] * -(-(start + size) // BLOCK)
    for at, row in rows:
        for j, weight in enumerate(row):
            column[j] += weight / len(rows)
            if weight:
                slash[at // BLOCK - j] += weight / len(rows)
    if kind == "flex":
        near = distance(column, by_products(q, k, max(size - sample, 0), size, start + size)) < tau
        kind = "flex products" if near else "flex lines"
    for low in range(0, size, QUERIES):
        first, end = start + low, start + min(low + QUERIES, size)
        count, own = -(-end // BLOCK), range(first // BLOCK, (end - 1) // BLOCK + 1)
        keep = {j for j in range(count) if j * BLOCK < sinks or (j + 1) * BLOCK > first - local or end <= dense}
        if "products" in kind or kind == "block-sparse":
            most = math.ceil(tokens / BLOCK) if tokens else math.ceil(share * count)
            enough = (most, 9.0) if kind == "block-sparse" else (count, gamma)
            keep = greatest(by_products(q, k, low, low + QUERIES, end), *enough, keep)
        elif kind != "a-shape":
            lines = kind == "flex lines"
            best = [greatest(w, n / BLOCK if not lines else 999, gamma if lines else 9.0, set())
                    for w, n in ((column, columns), (slash, slashes))]  # fmt: skip
            keep |= {j for j in range(count) if j in best[0] or any(i - j in best[1] for i in own)}
        if "flex" not in kind:
            for j in range(count - 1, -1, -1):
                keep |= {j} if len(keep) * BLOCK < tokens else set()
        out.append(sorted(keep))
    return out


@pytest.mark.parametrize(("kind", "page"), [*((kind, 0) for kind in KINDS), ("each its own", 32)])
def test_against_loops(kind: str, page: int) -> None:
    given, (q, cache, start) = KINDS[kind], inputs()
    more, held = [], cache
    if page:
        table = np.random.default_rng(0).permutation(len(STARTS) * 11).reshape(len(STARTS), 11).astype(np.int32)
        held = tuple(np.zeros((table.size, page, HEADS, DIM), np.float32) for _ in cache)
        for part, whole in zip(held, cache):
            padded = np.pad(whole, ((0, 0), (0, 11 * page - LENGTH), (0, 0), (0, 0)))
            part[table] = padded.reshape(len(STARTS), 11, page, HEADS, DIM)
        more = [table]
    blocks, seen = interpret(module(page, **given), "f", [q, held, start, *more])
    patterns = given["patterns"] * (HEADS if len(given["patterns"]) == 1 else 1)
    keep = np.zeros((len(STARTS), HEADS * GROUP, S, LENGTH), bool)
    for b, head in np.ndindex(len(STARTS), HEADS):
        own = q[b, :, head * GROUP : (head + 1) * GROUP].transpose(1, 0, 2)
        for i, want in enumerate(wanted(own, cache[0][b, :, head], STARTS[b], patterns[head], **given)):
            got = blocks[b, head, i]
            assert got[1 : 1 + got[0]].tolist() == want
            assert not got[1 + got[0] :].any()
            for j in want:
                keep[b, head * GROUP : (head + 1) * GROUP, i * QUERIES : (i + 1) * QUERIES, j * BLOCK : (j + 1) * BLOCK] = 1
    if kind == "each its own":
        check_attention(q, cache, keep, seen)


def check_attention(q: np.ndarray, cache: tuple[np.ndarray, ...], keep: np.ndarray, seen: np.ndarray) -> None:
    import torch

    where = [[at + s for s in range(S)] for at in STARTS]
    want = loops(*(torch.from_numpy(x) for x in (q, *cache)), where, keep=keep, scale=SCALE)
    np.testing.assert_allclose(seen, want, atol=2e-5)


def test_all_blocks_are_dense() -> None:
    q, cache, start = inputs()
    made = module(dense=LENGTH)
    plain = next(op for op in made.functions["f"].body if isinstance(op, ops.Attend))
    seen = interpret(made, "f", [q, cache, start])[1]
    plain.blocks = None
    assert np.array_equal(seen, interpret(made, "f", [q, cache, start])[1])


REFUSED = [
    ({"patterns": ("diagonal",)}, "a pattern of diagonal is none of a-shape, vertical-slash, block-sparse, flex"),
    ({"patterns": ("flex",) * 3}, "3 patterns for 2 key heads"),
    ({"block": 48}, "block is one of"),
    ({"queries": 24}, "queries is a power of two"),
    ({"sinks": 0}, "sinks and sample are at least 1"),
    ({"gamma": 1.5}, "share and gamma are above 0"),
]


@pytest.mark.parametrize(("given", "reason"), REFUSED, ids=str)
def test_refused(given: dict[str, Any], reason: str) -> None:
    q, start = (Function("f").arg("x", t) for t in (TensorType(("B", "S", 4, 8), DType.f32), TensorType(("B",), DType.i64)))
    cache = Function("f").arg("c", KVType(2, 8, 8, 99, DType.f32))
    with pytest.raises(VerifyError, match=reason):
        ops.Choose(q, cache, start, **given)


def test_rings_windows_and_wrong_lists_are_refused() -> None:
    f = Function("f")
    q, start = f.arg("q", TensorType(("B", "S", 4, 8), DType.f32)), f.arg("start", TensorType(("B",), DType.i64))
    cache = f.arg("cache", KVType(2, 8, 8, 99, DType.f32))
    blocks = f.append(ops.Choose(q, cache, start)).result
    for layout in (Ring(20, 20), Kept(20, 20)):
        other = f.arg("other", KVType(2, 8, 8, 99, DType.f32, layout))
        with pytest.raises(VerifyError, match=f"blocks are chosen of all keys, which {layout} has not"):
            ops.Choose(q, other, start)
    with pytest.raises(VerifyError, match="not of a window, a chunk, a ring or kept tokens"):
        ops.Attend(q, other, start, blocks=blocks)
    with pytest.raises(VerifyError, match="not of a window, a chunk, a ring or kept tokens"):
        ops.Attend(q, cache, start, blocks=blocks, window=9)
    with pytest.raises(VerifyError, match="blocks, axis 3"):
        ops.Attend(q, cache, start, blocks=blocks, block=32)
    made, (x, held, at) = module(), inputs()
    choose = next(op for op in made.functions["f"].body if isinstance(op, ops.Choose))
    choose.evaluate = lambda env, q, *_: np.zeros(env.shape(choose.result.shape), np.int32)  # type: ignore[method-assign]
    with pytest.raises(InterpreterError, match="the block of a query's own key is not among those"):
        interpret(made, "f", [x, held, at])
