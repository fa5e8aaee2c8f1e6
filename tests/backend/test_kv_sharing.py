"""Decoding over pages that sequences have in common: bit by bit what they get from pages of their own, and right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.backend.attention_cases import compare, expected
from tests.backend.harness import TARGETS
from tilewright.codegen.mlir.attention_emitter import AttentionEmitter
from tilewright.codegen.mlir.builder import Kernel
from tilewright.codegen.mlir.kv_sharing import Sharing
from tilewright.codegen.mlir.native import NativeKernel
from tilewright.codegen.schedule import parse_schedule
from tilewright.codegen.standalone import StandaloneKernel
from tilewright.codegen.target import parse_target
from tilewright.ir import DType, Function, KVType, Paged, Return, TensorType, ops

LENGTH, PAGE, KV_HEADS = 1600, 64, 2
PAGES = LENGTH // PAGE
LIMIT = {"f32": 1e-5, "bf16": 2e-2, "f16": 2e-3}
STARTS = [1500, 1090, 1024, 1023, 1300, 1599, 600, 40, 1200]
COMMON = {1: 16, 2: 16, 3: 15, 4: 8, 5: 20, 6: 9}
"""How many pages a sequence begins with that the one before it has too; those without lack them all."""


def decoding(dtype: str, heads: int, sizes: tuple[int, int] = (20, 33), bias: bool = False, sinks: bool = False,
             stored: str = "own", **rule: Any) -> Function:  # fmt: skip
    kernel, kind = Function("k", kind="kernel"), DType(dtype)
    add = kernel.arg
    values = [add("q", TensorType(("B", 1, heads, sizes[0]), kind)),
              add("cache", KVType(KV_HEADS, *sizes, LENGTH, kind, Paged(PAGE), values=stored)),
              add("start", TensorType(("B",), DType.i64))]  # fmt: skip
    more = {"bias": add("bias", TensorType(("B", heads, 1, LENGTH), DType.f32))} if bias else {}
    more |= {"sinks": add("sinks", TensorType((heads,), DType.f32))} if sinks else {}
    more["table"] = add("table", TensorType(("B", "T"), DType.i32))
    op = kernel.append(ops.Attend(*values, scale=sizes[0] ** -0.5, **more, **rule))
    kernel.append(Return(op.results))
    return kernel


def common_table() -> np.ndarray:
    """Pages from 0 on; one more sequence has none in common but those of the second piece."""
    table = np.arange(len(STARTS) * PAGES, dtype=np.int32).reshape(-1, PAGES)
    for row, count in COMMON.items():
        table[row, :count] = table[row - 1, :count]
    table[8, 8:16] = table[7, 8:16]
    return table


def operands(kernel: Function, table: np.ndarray) -> list[Any]:
    """Random ones; the pool of pages is the same for all tables of `common_table`'s numbers."""
    rng, dims = np.random.default_rng(0), {"B": len(STARTS), "T": PAGES}
    made = {"start": np.array(STARTS), "table": table}
    out = []
    for arg in kernel.args:
        if isinstance(kv := arg.type, KVType):
            shapes = ((table.size, PAGE, kv.heads, n) for n in (kv.dim, kv.own_vdim))
            out.append(tuple(rng.standard_normal(shape).astype(kv.dtype.np) for shape in shapes))
        else:
            shape = tuple(dims.get(str(d), d) for d in arg.shape)
            out.append(made[arg.name] if arg.name in made else rng.standard_normal(shape).astype(arg.dtype.np))
    return out


def of_their_own(given: list[Any], names: list[str | None]) -> list[Any]:
    """The same keys and values, each page of each sequence by itself."""
    cache, table = names.index("cache"), names.index("table")
    pages = given[table].reshape(-1)
    out = list(given)
    out[cache] = tuple(x[pages] for x in given[cache])
    out[table] = np.arange(pages.size, dtype=np.int32).reshape(given[table].shape)
    return out


def check(target: str, dtype: str, heads: int, schedule: str | None, **rule: Any) -> None:
    kernel = decoding(dtype, heads, **rule)
    run = StandaloneKernel(kernel, parse_target(target), AttentionEmitter(), schedule and parse_schedule(schedule))
    given, dims = operands(kernel, common_table()), {"B": len(STARTS), "T": PAGES}
    (together,) = run(given, dims)
    (apart,) = run(of_their_own(given, [arg.name for arg in kernel.args]), dims)
    assert np.array_equal(together, apart)
    compare(together, expected(kernel, given)[0], LIMIT[dtype])


SHAPES = [("f32", 6, {}), ("bf16", 2, {}), ("bf16", 16, {"sizes": (64, 64)}), ("f16", 26, {"sizes": (8, 16)})]
SHAPES += [("bf16", 12, {"sizes": (40, 24), "stored": "keys"})]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "heads", "rule"), SHAPES)
def test_pages_in_common(target: str, dtype: str, heads: int, rule: dict[str, Any]) -> None:
    check(target, dtype, heads, None, **rule)


@pytest.mark.parametrize("target", TARGETS)
def test_what_scores_may_meet(target: str) -> None:
    check(target, "f32", 4, None, bias=True, sinks=True, softcap=4.0)


def test_few_sequences_at_once() -> None:
    """Four of them: neighbours that have pages in common are in several tasks."""
    check("native", "f32", 8, "attention{rows=16 keys=64 parts=1}")


def test_windows_go_alone() -> None:
    check("native", "f32", 4, None, window=700)


def counted(starts: list[int], table: np.ndarray, most: int) -> np.ndarray:
    """What `Sharing` says of each sequence and piece of 512 keys."""
    pieces = table.shape[1] * PAGE // 512
    buffers = [("start", "i64"), ("table", "i32"), ("out", "i64")]
    with Kernel("counts", parse_target("native"), ("B", "T"), buffers) as kernel:
        start, pages, out = kernel.buffers
        sharing = Sharing(kernel, kernel.dims["B"], start, pages, kernel.dims["T"], 512, 512 // PAGE, most)
        with kernel.loop(kernel.begin, kernel.end) as loop:
            out.store(sharing.count(loop.index // pieces, loop.index % pieces).to("i64"), loop.index)
    out = np.zeros((len(starts), pieces), np.int64)
    NativeKernel(kernel)(0, out.size, table.shape, [np.array(starts), table, out])
    return out


@pytest.mark.parametrize("most", [2, 4, 8, 64])
def test_who_takes_whom_along(most: int) -> None:
    table = common_table()
    want = np.zeros((len(STARTS), PAGES * PAGE // 512), np.int64)
    for piece in range(want.shape[1]):
        leader = 0
        for row, start in enumerate(STARTS):
            columns = slice(piece * 8, piece * 8 + 8)
            same = row > 0 and np.array_equal(table[row, columns], table[row - 1, columns])
            if not same or row % most == 0 or min(start, STARTS[row - 1]) < piece * 512 + 512:
                leader = row
            want[leader, piece] += 1
    assert want[0, 0] == min(most, 7)
    assert np.array_equal(counted(STARTS, table, most), want)
