"""Attention to a latent that keys and values share (DeepSeek-V2, arXiv:2405.04434): stored once beside stored twice.

    python benchmarks/kv_latent.py [--threads 2] [--target native] [--only decode --only prefill] [--shape V2-Lite ...]

decode    one query a head over 16,000 tokens, bf16, cold caches, in one piece and in pages
prefill   256 tokens behind 8,000

One head of keys of 512 + 64 components, whose values are the first 512; the attention kernel alone. Milliseconds, median
and best of interleaved repetitions.
"""

from collections.abc import Callable, Collection

import numpy as np
from attention_bench import Bench, call_all, filled, function, head, measure, peak_run, row, run_sections

from tilewright.codegen.cache import cache_layout
from tilewright.codegen.mlir.native import aligned
from tilewright.ir import CONTIGUOUS, DType, KVType, Layout, Paged, TensorType, ops

HEADS = {"V2-Lite": 16, "V3": 128}
KEY, VALUE = 576, 512
DECODED, BEHIND, CHUNK = 16000, 8000, 256
COLD = 96 << 20  # bytes of caches to cycle through, more than any cache here
FORMS = {"twice": ("own", CONTIGUOUS), "once": ("keys", CONTIGUOUS), "twice, pages": ("own", Paged(64)),
         "once, pages": ("keys", Paged(64))}  # fmt: skip


def attending(bench: Bench, heads: int, queries: int, tokens: int, values: str, layout: Layout) -> Callable[[], None]:
    """A call for the last ``queries`` of so many tokens, with each of several caches."""
    kind = KVType(1, KEY, VALUE, tokens, DType.bf16, layout, values=values)
    memory = cache_layout(kind, bench.target)
    q = TensorType(("B", 1 if queries == 1 else "S", heads, KEY), DType.bf16)
    types = [q, kind, TensorType(("B",), DType.i64), *[TensorType(("B", "T"), DType.i32)] * bool(kind.page)]
    kernel = function(types, lambda k, q, cache, start, table=None: k.append(
        ops.Attend(q, cache, start, scale=192**-0.5, table=table)))
    table = aligned((1, max(kind.pages, 1)), "i32")
    table[...] = np.random.default_rng(0).permutation(max(kind.pages, 1))
    sets = []
    for _ in range(copies(queries)):
        stored = (filled((kind.pages or 1, *shape), "bf16") for shape in (memory.k_shape, memory.v_shape))
        new, out = filled((1, queries, heads, KEY), "bf16"), aligned((1, queries, heads, VALUE), "bf16")
        sets.append((new, *stored, aligned(1, "i64", tokens - queries), *[table] * bool(kind.page), out))
    return call_all(bench, kernel, {"B": 1, "S": queries, "T": max(kind.pages, 1)}, sets)


def copies(queries: int) -> int:
    """Caches that are attended to in turn."""
    return COLD // (DECODED * KEY * 2) if queries == 1 else 1


def compare(bench: Bench, name: str, queries: int, tokens: int, repeat: int) -> None:
    runs = {form: attending(bench, HEADS[name], queries, tokens, *how) for form, how in FORMS.items()}
    rate, work = peak_run(bench, "bf16")
    t, calls = measure({**runs, "peak": rate}, repeat), copies(queries)
    seen = queries * (tokens - (queries - 1) / 2)
    ideal = 2.0 * HEADS[name] * seen * (KEY + VALUE) / (work / t["peak"][1])
    for form in runs:
        (median, best), base = t[form], t[form.replace("once", "twice")]
        row(f"{name}, {HEADS[name]} heads, {form}", f"{median / calls * 1e3:.2f} ({best / calls * 1e3:.2f})",
            f"{base[0] / median:.2f} ({base[1] / best:.2f})", f"{ideal / (best / calls):.0%}")


def decode(bench: Bench, names: Collection[str]) -> None:
    head(f"decode, {DECODED} tokens", "ms", "x twice", "of peak")
    for name in names:
        compare(bench, name, 1, DECODED, 25 if HEADS[name] < 100 else 7)


def prefill(bench: Bench, names: Collection[str]) -> None:
    head(f"{CHUNK} tokens behind {BEHIND}", "ms", "x twice", "of peak")
    for name in names:
        compare(bench, name, CHUNK, BEHIND + CHUNK, 5 if HEADS[name] < 100 else 2)


if __name__ == "__main__":
    run_sections(__doc__, HEADS, {"decode": decode, "prefill": prefill})
