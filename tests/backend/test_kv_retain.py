"""Kernels of ``kv.append`` and ``kv.retain`` against the interpreter: what attention gives, and which tokens stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.backend.attention_cases import compare, expected
from tests.backend.harness import TARGETS
from tilewright.codegen.cuda.attention import CudaAttentionEmitter
from tilewright.codegen.mlir.attention_emitter import AttentionEmitter
from tilewright.codegen.standalone import StandaloneKernel
from tilewright.codegen.target import parse_target
from tilewright.ir import DType, Function, Kept, KVType, Return, TensorType, ops
from tilewright.passes.kv_options import ENDLESS

LIMIT = {"f32": 1e-5, "bf16": 2e-2, "f16": 2e-3}
RULES: dict[str, dict[str, Any]] = {
    "h2o": {"policy": "h2o", "recent": 40, "first": 4},
    "snapkv": {"policy": "snapkv", "recent": 8, "observe": 8, "pool": 7},
    "scissorhands": {"policy": "scissorhands", "observe": 50},
    "keyformer": {"policy": "keyformer", "recent": 30, "temperature": 2.0},
    "h2o merged": {"policy": "h2o", "recent": 40, "merge": True},
    "snapkv merged": {"policy": "snapkv", "recent": 8, "observe": 8, "pool": 7, "merge": True},
}
SIZES = {"f32": (33, 20), "bf16": (64, 64), "f16": (32, 48)}
CASES = [("h2o", "f32"), ("snapkv", "bf16"), ("scissorhands", "f16"), ("h2o", "bf16"), ("keyformer", "f32")]
CASES += [("h2o merged", "f32"), ("snapkv merged", "bf16"), ("h2o merged", "f16")]


class Retaining:
    """``kv.retain`` of ``heads`` queries over a cache of two heads."""

    def __init__(self, dtype: str, heads: int, sizes: tuple[int, int], s: int | str, layout: Kept, sinks: bool = False,
                 values: str = "own", **rule: Any) -> None:  # fmt: skip
        self.merges = rule.get("merge", False)
        self.kernel, kind, i64 = Function("k", kind="kernel"), DType(dtype), TensorType(("B",), DType.i64)
        self.cache = KVType(2, *sizes, ENDLESS, kind, layout, values=values)
        add = self.kernel.arg
        given = [add("q", TensorType(("B", s, heads, sizes[0]), kind)), add("cache", self.cache), add("start", i64)]
        more = {"count": add("count", i64)}
        more |= {"sinks": add("sinks", TensorType((heads,), DType.f32))} if sinks else {}
        op = self.kernel.append(ops.Retain(*given, scale=sizes[0] ** -0.5, **more, **rule))
        self.kernel.append(Return(op.results))

    def operands(self, starts: Sequence[int], counts: Sequence[int], s: int) -> list[Any]:
        """Random ones; notes as calls before may have left them."""
        rng, kv, batch = np.random.default_rng(0), self.cache, len(starts)
        dims = {"B": batch, "S": s}
        notes = np.zeros((batch, 2, 2, kv.slots), np.float32)
        for row, start in zip(notes, starts):
            live = min(start, kv.budget)
            for head in row:
                head[0, :live] = rng.random(live) / 2
                head[1, :live] = rng.permutation(start)[:live]
                head[0, kv.budget] = self.merges * rng.random() / 2
        whole = tuple(rng.standard_normal((batch, kv.slots, 2, n)).astype(kv.dtype.np) for n in (kv.dim, kv.own_vdim))
        made = {"cache": (*whole, notes), "start": np.array(starts), "count": np.array(counts)}
        return [made[a.name] if a.name in made
                else (2 * rng.standard_normal([dims.get(str(d), d) for d in a.shape])).astype(a.dtype.np)
                for a in self.kernel.args]  # fmt: skip


def check(target: str, case: Retaining, starts: Sequence[int], counts: Sequence[int], s: int) -> None:
    """Results alike, and the same tokens in the same slots, worth as much."""
    operands, kv = case.operands(starts, counts, s), case.cache
    compiled = StandaloneKernel(case.kernel, parse_target(target), AttentionEmitter())
    (out, after), (want, wanted) = compiled(operands, {"B": len(starts), "S": s}), expected(case.kernel, operands)
    for b, (start, count) in enumerate(zip(starts, counts)):
        compare(out[b, :count], want[b, :count], LIMIT[kv.dtype.value])
        live = min(start + count, kv.budget)
        assert np.array_equal(after[2][b, :, 1, :live], wanted[2][b, :, 1, :live])
        compare(after[2][b, :, 0, :live], wanted[2][b, :, 0, :live], 1e-5 if kv.dtype is DType.f32 else 1e-3)
        for mine, theirs in zip(after[:2], wanted[:2]):
            compare(mine[b, :live], theirs[b, :live], case.merges * LIMIT[kv.dtype.value])
        if case.merges and start + count > kv.budget:
            compare(after[2][b, :, 0, kv.budget], wanted[2][b, :, 0, kv.budget], 1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_values_among_keys(target: str) -> None:
    """What is merged and moved are keys, and so values."""
    case = Retaining("bf16", 6, (48, 20), 1, Kept(150, 70), values="keys", **RULES["h2o merged"])
    check(target, case, [5, 150, 1000], [1, 1, 1], 1)
    case = Retaining("f32", 6, (33, 20), "S", Kept(150, 70), values="keys", **RULES["snapkv"])
    check(target, case, [5, 150, 1000], [21, 20, 21], 21)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("policy", "dtype"), CASES)
def test_one_token(target: str, policy: str, dtype: str) -> None:
    case = Retaining(dtype, 6, SIZES[dtype], 1, Kept(150, 70), sinks=dtype == "f32", **RULES[policy])
    check(target, case, [0, 5, 149, 150, 151, 1000], [1, 1, 1, 1, 0, 1], 1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("policy", "dtype"), CASES)
def test_many_tokens(target: str, policy: str, dtype: str) -> None:
    """Some of them padding; one too many, and a budget's worth."""
    case = Retaining(dtype, 6, SIZES[dtype], "S", Kept(150, 70), sinks=dtype == "f32", **RULES[policy])
    check(target, case, [0, 5, 149, 150, 120, 1000], [61, 0, 30, 1, 61, 60], 61)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("heads", "sizes"), [(2, (128, 128)), (14, (16, 200))])
def test_keys_in_parts(target: str, heads: int, sizes: tuple[int, int]) -> None:
    case = Retaining("bf16", heads, sizes, 1, Kept(900, 30), policy="keyformer", recent=450, temperature=1.5)
    check(target, case, [10, 600, 5000], [1, 1, 1], 1)


def test_gpus_refuse_by_name() -> None:
    case = Retaining("bf16", 6, SIZES["bf16"], 1, Kept(150, 70))
    reason = CudaAttentionEmitter().match(case.kernel, parse_target("cuda{arch=sm_80}"))  # type: ignore[arg-type]
    assert "on a GPU caches are contiguous or paged, not kept<150, 70>" in str(reason)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "given"), [("f32", "f32"), ("bf16", "f32")])
@pytest.mark.parametrize("s", [1, 70])
def test_append(target: str, dtype: str, given: str, s: int) -> None:
    """Behind those that stay, which are as they were."""
    kernel, kv = Function("k", kind="kernel"), KVType(2, 33, 20, ENDLESS, DType(dtype), Kept(90, 70))
    new = [TensorType(("B", s if s == 1 else "S", 2, size), DType(given)) for size in (33, 20)]
    add, rng, starts = kernel.arg, np.random.default_rng(0), [0, 3, 89, 90, 5000]
    values = [add("cache", kv), add("k", new[0]), add("v", new[1]), add("start", TensorType(("B",), DType.i64))]
    kernel.append(Return(kernel.append(ops.Append(*values)).results))
    cache = [rng.standard_normal((5, kv.slots, 2, n)).astype(kv.dtype.np) for n in (33, 20)]
    notes = rng.random((5, 2, 2, kv.slots), np.float32)
    rows = [rng.standard_normal((5, s, 2, n)).astype(DType(given).np) for n in (33, 20)]
    operands = [(*cache, notes), *rows, np.array(starts)]
    (got,) = StandaloneKernel(kernel, parse_target(target), AttentionEmitter())(operands, {"B": 5, "S": s})
    (want,) = expected(kernel, operands)
    assert np.array_equal(got[2], notes)
    for b, start in enumerate(starts):
        live = min(start, 90) + s
        assert all(np.array_equal(mine[b, :live], theirs[b, :live]) for mine, theirs in zip(got, want[:2]))
