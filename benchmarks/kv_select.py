"""Speed of decoding over chosen pages beside all of them, in one run, bf16; all caches are cold, pages in any order.

    python benchmarks/kv_select.py [--threads 2] [--target native] [--length 16384] [--share 0.25] [--page 16 ...]

For each size of pages: microseconds of one call over all pages (one query a head), of the choice alone, and of the choice
with attention to what is chosen, and how many times faster these are (median and best of interleaved repetitions).
"""

import numpy as np
from attention_bench import SHAPES, Bench, Heads, call_all, filled, function, head, measure, opened, parser, row

from tilewright.codegen.cache import cache_layout
from tilewright.codegen.mlir.native import aligned
from tilewright.ir import DType, KVType, Paged, TensorType, ops

COLD = 96 << 20  # bytes of caches to cycle through, more than any cache here


def runs(bench: Bench, heads: Heads, length: int, page: int, share: float):
    """Calls over all of several caches, by what is done; how many caches there are."""
    sizes = heads.kv, heads.dim, heads.dim, length, DType.bf16, Paged(page)
    cache, plain = KVType(*sizes, summary="minmax"), KVType(*sizes)
    q, start = TensorType(("B", 1, heads.q, heads.dim), DType.bf16), TensorType(("B",), DType.i64)
    table = TensorType(("B", "T"), DType.i32)
    choice = function([q, cache, start, table], lambda k, *a: k.append(ops.Select(*a, share=share)))
    pages = choice.returns[0].type
    given = {"scale": heads.dim**-0.5}
    attend = function([q, cache, start, table, pages], lambda k, q, c, s, t, p: k.append(
        ops.Attend(q, c, s, table=t, pages=p, **given)))
    whole = function([q, plain, start, table], lambda k, q, c, s, t: k.append(ops.Attend(q, c, s, table=t, **given)))

    def sets(kind: KVType):
        layout, rng = cache_layout(kind, bench.target), np.random.default_rng(0)
        for _ in range(max(COLD // (layout.k_bytes + layout.v_bytes) // kind.pages, 2)):
            order = aligned((1, kind.pages), "i32")
            order[...] = rng.permutation(kind.pages)
            parts = [filled((kind.pages, *shape), "bf16") for shape in (layout.k_shape, layout.v_shape)]
            yield filled((1, 1, heads.q, heads.dim), "bf16"), *parts, aligned(1, "i64", length - 1), order

    some, every = list(sets(cache)), list(sets(plain))
    lists = [aligned((1, heads.kv, int(pages.shape[2])), "i32") for _ in some]
    out, dims = aligned((1, 1, heads.q, heads.dim), "bf16"), {"B": 1, "T": cache.pages}
    choose = call_all(bench, choice, dims, [(*a, found) for a, found in zip(some, lists)])
    look = call_all(bench, attend, dims, [(*a, found, out) for a, found in zip(some, lists)])
    made = {"all": call_all(bench, whole, dims, [(*a, out) for a in every]), "choose": choose, "attend": look}
    return made, len(some), len(every)


def decode(bench: Bench, shapes: list[Heads], length: int, pages: list[int], share: float) -> None:
    for heads in shapes:
        head(f"{heads.name} {heads.q}/{heads.kv}x{heads.dim}, {length} keys, {share:.0%}", "all us", "choice us",
             "choice, attention", "x all", "best x all")
        for page in pages:
            made, chosen, whole = runs(bench, heads, length, page, share)
            t = measure(made, 21)
            every, choose, attend = (np.array(t[n]) / (whole if n == "all" else chosen) for n in made)
            both = choose + attend
            row(f"pages of {page}", *(f"{x[0] * 1e6:.0f}" for x in (every, choose, both)),
                *(f"{x:.2f}" for x in every / both))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--length", type=int, default=16384)
    options.add_argument("--share", type=float, default=0.25)
    options.add_argument("--page", type=int, action="append")
    given = options.parse_args()
    shapes = [SHAPES[s] for s in given.shape or ("L", "8B")]
    decode(opened(given), shapes, given.length, given.page or [16, 32, 64], given.share)


if __name__ == "__main__":
    main()
