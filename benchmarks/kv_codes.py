"""Speed of decoding over caches of codes beside one of bf16, in one run; all caches are cold.

    python benchmarks/kv_codes.py [--threads 2] [--target native] [--length 16384] [--shape L ...]

For each element type: microseconds of one call of the attention kernel alone (one query a head), times faster than bf16
(median and best of interleaved repetitions), and the share of the read bandwidth.
"""

import numpy as np
from attention_bench import (
    SHAPES,
    Bench,
    Heads,
    call_all,
    copied,
    filled,
    function,
    head,
    measure,
    opened,
    parser,
    read_run,
    row,
)

from tilewright.codegen.cache import cache_layout
from tilewright.codegen.mlir.native import aligned
from tilewright.ir import DType, KVType, TensorType, ops

COLD = 96 << 20  # bytes of caches to cycle through, more than any cache here
CACHES = {
    "bf16": {"dtype": "bf16"},
    "i8": {"dtype": "i8"},
    "i4": {"dtype": "i4"},
    "i2": {"dtype": "i2"},
    "i4 keys=channel": {"dtype": "i4", "keys": "channel", "recent": 128},
    "i2 keys=channel": {"dtype": "i2", "keys": "channel", "recent": 128},
    "i2 keys=channel rank=2": {"dtype": "i2", "keys": "channel", "recent": 128, "rank": 2},
    "i2 keys=channel rank=4": {"dtype": "i2", "keys": "channel", "recent": 128, "rank": 4},
    "i2 keys=channel outliers=1": {"dtype": "i2", "keys": "channel", "recent": 128, "outliers": 1},
    "i2 keys=channel rank=2 outliers=1": {"dtype": "i2", "keys": "channel", "recent": 128, "rank": 2, "outliers": 1},
}


def decode_run(bench: Bench, heads: Heads, length: int, given: dict):
    """A call for each of several caches; bytes of one cache; how many there are."""
    more = {key: value for key, value in given.items() if key != "dtype"}
    cache = KVType(heads.kv, heads.dim, heads.dim, length, DType(given["dtype"]), **more)
    layout, q = cache_layout(cache, bench.target), TensorType(("B", 1, heads.q, heads.dim), DType.bf16)
    kernel = function([q, cache, TensorType(("B",), DType.i64)],
                      lambda k, q, cache, start: k.append(ops.Attend(q, cache, start, scale=heads.dim**-0.5)))
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((2, 1, length, heads.kv, heads.dim)).astype(cache.held.np)
    size = layout.k_bytes + layout.v_bytes
    sets = []
    for _ in range(max(COLD // size, 2)):
        pair = copied(layout.write(*numbers), layout.stored)
        sets.append((filled((1, 1, heads.q, heads.dim), "bf16"), *pair, aligned(1, "i64", length - 1),
                     aligned((1, 1, heads.q, heads.dim), "bf16")))
    return call_all(bench, kernel, {"B": 1}, sets), size, len(sets)


def decode(bench: Bench, shapes: list[Heads], length: int) -> None:
    for heads in shapes:
        head(f"{heads.name} {heads.q}/{heads.kv}x{heads.dim}, {length} keys", "us", "x bf16", "best x bf16", "of bandwidth")
        made = {name: decode_run(bench, heads, length, given) for name, given in CACHES.items()}
        bytes_read = COLD // 4
        t = measure({name: run for name, (run, _, _) in made.items()} | {"read": read_run(bench, bytes_read)}, 21)
        each = {name: tuple(x / made[name][2] for x in t[name]) for name in made}
        for name, (median, best) in each.items():
            share = t["read"][1] / bytes_read * made[name][1] / best
            row(name, f"{median * 1e6:.0f} ({median / best:.2f})", f"{each['bf16'][0] / median:.2f}",
                f"{each['bf16'][1] / best:.2f}", f"{share:.0%}")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--length", type=int, default=16384)
    given = options.parse_args()
    decode(opened(given), [SHAPES[s] for s in given.shape or SHAPES], given.length)


if __name__ == "__main__":
    main()
