"""Decoding over kept tokens beside attention alone: what choosing costs, and what keeping less saves. All caches are cold.

    python benchmarks/kv_kept.py [--threads 2] [--target native] [--length 16384] [--budget 1024 ...] [--shape L ...]

The attention kernel alone, one query a head, bf16; median and best of interleaved repetitions. ``kv.retain`` lets one token
go each time; beside it ``kv.attend`` over as many slots, and over ``--length`` of them.
"""

from typing import Any

import numpy as np
from attention_bench import SHAPES, Bench, Heads, call_all, copied, filled, function, head, measure, opened, parser, row

from tilewright.codegen.cache import CacheLayout, cache_layout
from tilewright.codegen.mlir.native import aligned
from tilewright.ir import CONTIGUOUS, DType, Kept, KVType, TensorType, ops
from tilewright.passes.kv_layout import KvLayout
from tilewright.passes.kv_options import ENDLESS

COLD = 64 << 20  # bytes of caches to cycle through, more than any cache here
RULES: dict[str, dict[str, Any]] = {
    "h2o": {"policy": "h2o"},
    "h2o observe=64": {"policy": "h2o", "observe": 64},
    "snapkv": {"policy": "snapkv"},
    "scissorhands": {"policy": "scissorhands"},
    "keyformer": {"policy": "keyformer"},
    "snapkv merge": {"policy": "snapkv", "merge": True},
}


def stored(memory: CacheLayout, heads: Heads, copies: int) -> list[list[np.ndarray]]:
    """The memory of full caches; of kept tokens positions are in order, and worths what they may be."""
    rng, sizes = np.random.default_rng(0), (1, memory.held, heads.kv, heads.dim)
    notes = np.stack([rng.random((1, heads.kv, memory.slots)), np.tile(np.arange(memory.slots), (1, heads.kv, 1))], 2)
    made = memory.write(*rng.standard_normal((2, *sizes)).astype(np.float32), notes if memory.budget else None)
    return [copied(made, memory.stored) for _ in range(copies)]


def decoding(bench: Bench, heads: Heads, slots: int, rule: dict[str, Any] | None = None):
    """A call for each of several caches; how many there are."""
    sizes, i64 = (heads.kv, heads.dim, heads.dim), TensorType(("B",), DType.i64)
    layout, length = (CONTIGUOUS, slots) if rule is None else (Kept(slots, 1), ENDLESS)
    cache = KVType(*sizes, length, DType.bf16, layout)
    memory = cache_layout(cache, bench.target)
    types = [TensorType(("B", 1, heads.q, heads.dim), DType.bf16), cache, i64, *[i64] * (rule is not None)]

    def make(kernel, q, cache, start, count=None):
        if rule is None:
            return kernel.append(ops.Attend(q, cache, start, scale=heads.dim**-0.5))
        given = KvLayout(kind="kept", budget=slots, **rule).retention
        return kernel.append(ops.Retain(q, cache, start, count=count, scale=heads.dim**-0.5, **given))

    lengths = [aligned(1, "i64", slots - 1)] if rule is None else [aligned(1, "i64", slots), aligned(1, "i64", 1)]
    shape, copies = (1, 1, heads.q, heads.dim), max(COLD // (memory.k_bytes + memory.v_bytes), 2)
    sets = [(filled(shape, "bf16"), *pair, *lengths, aligned(shape, "bf16")) for pair in stored(memory, heads, copies)]
    return call_all(bench, function(types, make), {"B": 1}, sets), copies


def budgets(bench: Bench, heads: Heads, sizes: list[int], length: int, repeat: int) -> None:
    for budget in sizes:
        head(f"{heads.name} {heads.q}/{heads.kv}x{heads.dim}, {budget} of {length}", "us", "x attention", "faster than all")
        made = {"all": decoding(bench, heads, length), "attention": decoding(bench, heads, budget)}
        made |= {name: decoding(bench, heads, budget, rule) for name, rule in RULES.items()}
        t = measure({name: run for name, (run, _) in made.items()}, repeat)
        each = {name: tuple(x / copies * 1e6 for x in t[name]) for name, (_, copies) in made.items()}
        for name, (median, best) in each.items():
            cost, gain = median / each["attention"][0], each["all"][0] / median
            row(name, f"{median:.0f} ({best:.0f})", f"{cost:.2f}", f"{gain:.1f}")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--length", type=int, default=16384)
    options.add_argument("--budget", type=int, action="append")
    options.add_argument("--repeat", type=int, default=21)
    given = options.parse_args()
    bench = opened(given)
    for name in given.shape or ("L", "8B"):
        budgets(bench, SHAPES[name], given.budget or [512, 1024, 2048], given.length, given.repeat)


if __name__ == "__main__":
    main()
