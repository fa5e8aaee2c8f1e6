"""Attention over chosen blocks: against the interpreter, and with all blocks chosen bit by bit against dense attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.backend.attention_cases import compare, expected
from tests.backend.harness import TARGETS
from tests.backend.test_kv_layouts import LIMIT, numbers, pages_in_any_order, stored
from tilewright.codegen.cuda.attention import CudaAttentionEmitter
from tilewright.codegen.mlir.attention_emitter import AttentionEmitter
from tilewright.codegen.standalone import StandaloneKernel
from tilewright.codegen.target import parse_target
from tilewright.ir import CONTIGUOUS, DType, Function, KVType, Layout, Paged, Return, TensorType, as_dim, ops

LENGTH = 700


class Walking:
    """``kv.attend`` over lists of blocks, or without them over all keys."""

    def __init__(
        self, dtype: str, layout: Layout, block: int, queries: int, heads: int = 6, sizes: tuple[int, int] = (33, 20),
        stored_as: str = "", sinks: bool = False, **rule: Any
    ) -> None:  # fmt: skip
        self.block, self.queries, kind = block, queries, DType(dtype)
        self.kernel, self.dense = Function("k", kind="kernel"), Function("k", kind="kernel")
        self.cache_type = KVType(2, *sizes, LENGTH, DType(stored_as or dtype), layout)
        self.most = -(-LENGTH // block)
        for made, chosen in ((self.kernel, True), (self.dense, False)):
            q = TensorType(("B", "S", heads, sizes[0]), kind)
            start = TensorType(("B",), DType.i64)
            values = [made.arg("q", q), made.arg("cache", self.cache_type), made.arg("start", start)]
            more = {"sinks": made.arg("sinks", TensorType((heads,), DType.f32))} if sinks else {}
            more |= {"table": made.arg("table", TensorType(("B", "T"), DType.i32))} if self.cache_type.page else {}
            if chosen:
                lists = TensorType(("B", 2, as_dim(-(-q.shape[1] // queries)), 1 + self.most), DType.i32)
                more |= {"blocks": made.arg("blocks", lists), "block": block, "queries": queries}
            made.append(Return(made.append(ops.Attend(*values, scale=sizes[0] ** -0.5, **more, **rule)).results))

    def lists(self, starts: Sequence[int], s: int, share: float) -> np.ndarray:
        """The first block and all from a query's own on, and some of the others."""
        rng = np.random.default_rng(4)
        out = np.zeros((len(starts), 2, -(-s // self.queries), 1 + self.most), np.int32)
        for b, head, i in np.ndindex(*out.shape[:3]):
            first, last = starts[b] + i * self.queries, starts[b] + min((i + 1) * self.queries, s) - 1
            keep = rng.random(last // self.block + 1) < share
            keep[0] = keep[first // self.block:] = True
            out[b, head, i, 0], out[b, head, i, 1:1 + keep.sum()] = keep.sum(), np.flatnonzero(keep)
        return out

    def operands(self, kernel: Function, starts: Sequence[int], s: int, share: float) -> tuple[list[Any], dict[str, int]]:
        rng, kv, batch = np.random.default_rng(0), self.cache_type, len(starts)
        whole = tuple(numbers(rng, (batch, LENGTH, kv.heads, n), kv.held) for n in (kv.dim, kv.vdim))
        dims, table = {"B": batch, "S": s, "T": kv.pages}, pages_in_any_order(batch, kv)
        made = {"cache": stored(kv, whole, table), "start": np.array(starts), "table": table,
                "blocks": self.lists(starts, s, share)}  # fmt: skip
        return [made[a.name] if a.name in made else numbers(rng, tuple(dims.get(str(d), d) for d in a.shape), a.dtype)
                for a in kernel.args], dims  # fmt: skip

    def run(self, target: str, starts: Sequence[int], s: int, share: float, dense: bool = False) -> tuple[Any, Any]:
        kernel = self.dense if dense else self.kernel
        operands, dims = self.operands(kernel, starts, s, share)
        (got,) = StandaloneKernel(kernel, parse_target(target), AttentionEmitter())(operands, dims)
        return got, expected(kernel, operands)[0]


CASES: dict[str, dict[str, Any]] = {
    "f32": {"dtype": "f32", "layout": CONTIGUOUS, "block": 32, "queries": 16, "softcap": 3.0, "sinks": True},
    "bf16": {"dtype": "bf16", "layout": CONTIGUOUS, "block": 64, "queries": 64, "sizes": (64, 64)},
    "wide": {"dtype": "bf16", "layout": CONTIGUOUS, "block": 128, "queries": 8, "heads": 14, "sizes": (16, 200)},
    "pages": {"dtype": "f32", "layout": Paged(16), "block": 32, "queries": 16},
    "pages of 64": {"dtype": "bf16", "layout": Paged(64), "block": 128, "queries": 32, "sizes": (64, 80)},
    "one query": {"dtype": "f16", "layout": CONTIGUOUS, "block": 64, "queries": 1, "heads": 2},
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_lists(target: str, name: str) -> None:
    """Ragged starts and an odd count of queries."""
    case = Walking(**CASES[name])
    got, want = case.run(target, [0, 63, 130, LENGTH - 75], 75, 0.3)
    compare(got, want, LIMIT[CASES[name]["dtype"]])
    whole, plain = (case.run(target, [0, 63, LENGTH - 75], 75, 1.0, dense)[0] for dense in (False, True))
    assert np.array_equal(whole, plain)


@pytest.mark.parametrize("target", TARGETS)
def test_codes(target: str) -> None:
    """Numbers that are their own codes, nearly, so that only the walk is compared."""
    case = Walking("f32", CONTIGUOUS, 128, 32, stored_as="i8", sizes=(32, 32))
    got, want = case.run(target, [0, 130, LENGTH - 75], 75, 0.3)
    compare(got, want, 0.05)
    whole, plain = (case.run(target, [0, LENGTH - 75], 75, 1.0, dense)[0] for dense in (False, True))
    assert np.array_equal(whole, plain)


def test_refused() -> None:
    def reason(layout: Layout = CONTIGUOUS, block: int = 64, **given: Any) -> str:
        case = Walking("f32", layout, block, 64, **given)
        return AttentionEmitter().match(case.kernel, parse_target("native")) or ""

    assert reason(Paged(64), 32) == "no kernel for blocks of 64 queries and 32 keys, which lie in runs of 64"
    assert reason(stored_as="i8") == "no kernel for blocks of 64 queries and 64 keys, which lie in runs of 128"
    case, cuda = Walking("f32", CONTIGUOUS, 64, 64), parse_target("cuda{arch=sm_90}")
    assert CudaAttentionEmitter().match(case.kernel, cuda) == "no kernel for attention over chosen blocks"
