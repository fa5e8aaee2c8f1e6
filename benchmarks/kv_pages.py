"""Decoding over caches of pages: what sequences that begin alike save, and what pages cost. All caches are cold.

    python benchmarks/kv_pages.py [--threads 2] [--target native] [--only sharing --only cost] [--shape L ...]

The attention kernel alone, one query a head, bf16; median and best of interleaved repetitions.

sharing   16 sequences of 4096 tokens that all begin with and 256 of their own: with pages of their own all along, with the
          first pages in common but each sequence between two that begin otherwise, and with these pages as neighbours
cost      one sequence of 16,384 tokens in pages, taken in order or scattered over the pool, beside one piece
"""

from collections.abc import Callable, Collection

import numpy as np
from attention_bench import SHAPES, Bench, Heads, call_all, filled, function, head, measure, peak_run, row, run_sections

from tilewright.codegen.cache import cache_layout
from tilewright.codegen.mlir.native import aligned
from tilewright.ir import CONTIGUOUS, DType, KVType, Layout, Paged, TensorType, ops

BATCH, COMMON, OWN, PAGE = 16, 4096, 256, 32
LENGTH = 16384
COLD = 96 << 20  # bytes of caches to cycle through, more than any cache here
HEADS = {**SHAPES, "MHA": Heads("MHA", 16, 16, 64)}
Run = Callable[[], None]


def attending(bench: Bench, heads: Heads, layout: Layout, tokens: int, tables: list[np.ndarray], pages: int) -> Run:
    """A call for each table, which has a cache of its own; without pages for as many sequences as the table has rows."""
    cache = KVType(heads.kv, heads.dim, heads.dim, LENGTH, DType.bf16, layout)
    memory, batch = cache_layout(cache, bench.target), len(tables[0])
    q = TensorType(("B", 1, heads.q, heads.dim), DType.bf16)
    types = [q, cache, TensorType(("B",), DType.i64), *[TensorType(("B", "T"), DType.i32)] * bool(cache.page)]
    kernel = function(types, lambda k, q, cache, start, table=None: k.append(
        ops.Attend(q, cache, start, scale=heads.dim**-0.5, table=table)))
    sets = []
    for table in tables:
        given = aligned(table.shape, "i32")
        given[...] = table
        stored = (filled((pages or batch, *shape), "bf16") for shape in (memory.k_shape, memory.v_shape))
        sets.append((filled((batch, 1, heads.q, heads.dim), "bf16"), *stored, aligned(batch, "i64", tokens - 1),
                     *[given] * bool(cache.page), aligned((batch, 1, heads.q, heads.dim), "bf16")))
    return call_all(bench, kernel, {"B": batch, "T": tables[0].shape[1]}, sets)


def sharing(bench: Bench, names: Collection[str]) -> None:
    head(f"{BATCH} x ({COMMON} + {OWN}), pages of {PAGE}", "own pages, ms", "one by one", "together", "x", "of peak")
    common, width = COMMON // PAGE, (COMMON + OWN) // PAGE
    pool = BATCH * width
    pages = np.random.default_rng(0).permutation(pool).reshape(BATCH, width)
    together, apart = pages.copy(), pages.copy()
    together[:, :common] = pages[0, :common]
    apart[::2, :common], apart[1::2, :common] = pages[0, :common], pages[1, :common]
    tables = {"own": pages, "one by one": apart, "together": together}
    for heads in map(HEADS.__getitem__, names):
        runs = {name: attending(bench, heads, Paged(PAGE), COMMON + OWN, [table], pool) for name, table in tables.items()}
        rate, work = peak_run(bench, "bf16")
        t = measure({**runs, "peak": rate}, 15)
        flops = 4.0 * BATCH * (COMMON + OWN) * heads.q * heads.dim
        cells = [f"{t[name][0] * 1e3:.2f} ({t[name][1] * 1e3:.2f})" for name in tables]
        gains = (t["own"][i] / t["together"][i] for i in range(2))
        row(f"{heads.name} {heads.q}/{heads.kv}x{heads.dim}", *cells, "{:.2f} ({:.2f})".format(*gains),
            f"{flops / t['together'][1] / (work / t['peak'][1]):.0%}")


def cost(bench: Bench, names: Collection[str]) -> None:
    for heads in map(HEADS.__getitem__, names):
        head(f"{heads.name} {heads.q}/{heads.kv}x{heads.dim}, {LENGTH} tokens", "us", "x one piece", "best x")
        size = 4 * LENGTH * heads.kv * heads.dim
        copies = max(COLD // size, 2)
        runs = {"one piece": attending(bench, heads, CONTIGUOUS, LENGTH, [np.zeros((1, 1))] * copies, 0)}
        for page in (16, 32, 64):
            count = LENGTH // page
            order = np.arange(count)[None]
            for name, table in (("in order", order), ("scattered", np.random.default_rng(0).permutation(count)[None])):
                runs[f"{page}, {name}"] = attending(bench, heads, Paged(page), LENGTH, [table] * copies, count)
        t = measure(runs, 11)
        for name, (median, best) in t.items():
            row(name, f"{median / copies * 1e6:.0f} ({median / best:.2f})", f"{median / t['one piece'][0]:.2f}",
                f"{best / t['one piece'][1]:.2f}")


if __name__ == "__main__":
    run_sections(__doc__, HEADS, {"sharing": sharing, "cost": cost})
