"""Blocks of keys as kernels choose them: the very lists of the interpreter, over ragged positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.backend.attention_cases import expected
from tests.backend.harness import TARGETS
from tests.backend.test_kv_layouts import pages_in_any_order, stored
from tilewright.codegen.mlir.attention_emitter import AttentionEmitter
from tilewright.codegen.standalone import StandaloneKernel
from tilewright.codegen.target import parse_target
from tilewright.ir import CONTIGUOUS, DType, Function, KVType, Layout, Paged, Return, TensorType, ops

LENGTH, HEADS, DIM, S = 700, 2, 24, 75
STARTS = (0, 45, 130, LENGTH - S)


def kernel(dtype: str, layout: Layout = CONTIGUOUS, heads: int = 6, stored_as: str = "", **given: Any) -> Function:
    made = Function("k", kind="kernel")
    q = made.arg("q", TensorType(("B", "S", heads, DIM), DType(dtype)))
    cache = made.arg("cache", KVType(HEADS, DIM, DIM, LENGTH, DType(stored_as or dtype), layout))
    values = [q, cache, made.arg("start", TensorType(("B",), DType.i64))]
    if cache.cache.page:
        values.append(made.arg("table", TensorType(("B", "T"), DType.i32)))
    made.append(Return(made.append(ops.Choose(*values, **{"scale": 0.5} | given)).results))
    return made


def operands(made: Function) -> list[Any]:
    """Keys with directions that neighbours share, so that weights differ much."""
    rng, kv, heads = np.random.default_rng(2), made.args[1].cache, int(made.args[0].shape[2])
    q = rng.standard_normal((len(STARTS), S, heads, DIM))
    k, v = rng.standard_normal((2, len(STARTS), LENGTH, HEADS, DIM))
    k += np.repeat(rng.standard_normal((len(STARTS), 1 + LENGTH // 40, HEADS, DIM)), 40, 1)[:, :LENGTH]
    table = pages_in_any_order(len(STARTS), kv)
    cache = stored(kv, tuple(x.astype(kv.held.np) for x in (k, v)), table)
    return [q.astype(made.args[0].dtype.np), cache, np.array(STARTS), *[table] * (kv.page > 0)]


CASES: dict[str, dict[str, Any]] = {
    "a-shape": {"dtype": "f32", "patterns": ("a-shape",), "sinks": 70, "local": 130, "block": 32, "dense": 90},
    "vertical-slash": {"dtype": "f32", "patterns": ("vertical-slash",), "columns": 96, "slashes": 96, "block": 32,
                       "queries": 16, "sample": 50},
    "block-sparse": {"dtype": "bf16", "patterns": ("block-sparse",), "share": 0.4, "block": 64, "queries": 8, "heads": 14},
    "flex by products": {"dtype": "f32", "patterns": ("flex",), "gamma": 0.6, "tau": 1.0, "layout": Paged(16), "block": 32},
    "flex by lines": {"dtype": "f32", "patterns": ("flex",), "gamma": 0.6, "tau": 0.0, "dense": 80, "sample": 9},
    "one length": {"dtype": "f32", "patterns": ("a-shape", "vertical-slash"), "tokens": 200, "columns": 32, "slashes": 64,
                   "sinks": 70, "block": 32, "queries": 16},
    "the best of one length": {"dtype": "f32", "patterns": ("block-sparse", "vertical-slash"), "tokens": 180, "columns": 64,
                               "slashes": 64, "layout": Paged(32), "dense": 90},
    "each its own": {"dtype": "f32", "patterns": ("flex", "block-sparse"), "gamma": 0.5, "queries": 32, "block": 128},
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_lists(target: str, name: str) -> None:
    made = kernel(**CASES[name])
    given = operands(made)
    dims = {"B": len(STARTS), "S": S, "T": made.args[1].cache.pages}
    (got,) = StandaloneKernel(made, parse_target(target), AttentionEmitter())(given, dims)
    assert np.array_equal(got, expected(made, given)[0])


def test_codes_are_refused() -> None:
    made, plain = (kernel("f32", stored_as="i8", patterns=(p,)) for p in ("flex", "a-shape"))
    target, match = parse_target("native"), AttentionEmitter().match
    assert "no kernel that chooses blocks by products with codes" in str(match(made, target))
    assert match(plain, target) is None
