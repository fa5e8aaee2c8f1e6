"""Speed of attention kernels: beside memory bandwidth, peak arithmetic and PyTorch, all in one run.

    python benchmarks/attention.py [--threads 2] [--target native] [--only decode --only prefill ...] [--shape L]

decode    one query a head over 4096 cached keys, cold: share of the read bandwidth, and times faster than PyTorch
short     the same over few keys: microseconds a call
append    writing the keys and values of a prompt or of one token: share of the copy that it is
prefill   a causal prompt into an empty cache, and without one: share of peak arithmetic, times faster than PyTorch
encoder   a padded batch of short texts without a cache

Figures are medians of interleaved repetitions; the spread in brackets is from the best to the median.
PyTorch spins on after its calls, so it gets a round of its own. For PyTorch without AVX-512 set ATEN_CPU_CAPABILITY=avx2.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from attention_bench import (
    SHAPES,
    Bench,
    Heads,
    call_all,
    filled,
    function,
    head,
    measure,
    opened,
    parser,
    peak_run,
    read_run,
    row,
)

from tilewright.codegen.cache import cache_layout
from tilewright.codegen.mlir.native import aligned
from tilewright.codegen.schedule import parse_schedule
from tilewright.ir import DType, Function, KVType, Op, TensorType, Value, ops

TORCH = {"f32": torch.float32, "bf16": torch.bfloat16}
COLD = 192 << 20  # bytes of caches to cycle through, more than any cache here
ENCODER = Heads("E", 12, 12, 32)


def cache_type(heads: Heads, dtype: str, length: int) -> KVType:
    return KVType(heads.kv, heads.dim, heads.dim, length, DType(dtype))


def attend(heads: Heads, dtype: str, length: int, s: int | str) -> Function:
    q = TensorType(("B", s, heads.q, heads.dim), DType(dtype))
    types = [q, cache_type(heads, dtype, length), TensorType(("B",), DType.i64)]
    return function(types, lambda k, q, cache, start: k.append(ops.Attend(q, cache, start, scale=heads.dim**-0.5)))


def caches(bench: Bench, heads: Heads, dtype: str, length: int, batch: int, copies: int) -> list[tuple[np.ndarray, ...]]:
    layout = cache_layout(cache_type(heads, dtype, length), bench.target)
    return [(filled((batch, *layout.k_shape), dtype), filled((batch, *layout.v_shape), dtype)) for _ in range(copies)]


def torch_attention(
    heads: Heads, dtype: str, b: int, s: int, t: int, causal: bool, copies: int
) -> list[Callable[[], None]]:
    q = torch.randn(b, heads.q, s, heads.dim).to(TORCH[dtype])
    pairs = [[torch.randn(b, heads.kv, t, heads.dim).to(TORCH[dtype]) for _ in "kv"] for _ in range(copies)]
    given = {"is_causal": causal, "enable_gqa": heads.q != heads.kv}
    return [lambda k=k, v=v: torch.nn.functional.scaled_dot_product_attention(q, k, v, **given) for k, v in pairs]


def every(runs: Sequence[Callable[[], None]]) -> Callable[[], None]:
    return lambda: [run() for run in runs] and None


def decode_runs(bench: Bench, heads: Heads, dtype: str, batch: int, keys: int, length: int):
    size = 2 * batch * heads.kv * keys * heads.dim * (4 if dtype == "f32" else 2)
    copies = max(COLD // (size * length // keys), 2)
    q, out, start = filled((batch, 1, heads.q, heads.dim), dtype), aligned((batch, 1, heads.q, heads.dim), dtype), \
        aligned(batch, "i64", keys - 1)
    sets = [(q, k, v, start, out) for k, v in caches(bench, heads, dtype, length, batch, copies)]
    own = call_all(bench, attend(heads, dtype, length, 1), {"B": batch}, sets)
    return own, size, copies


def decode(bench: Bench, shapes: Sequence[Heads]) -> None:
    head("decode, 4096 keys", "GB/s", "of bandwidth", "x torch")
    for heads in shapes:
        for dtype, batch in (("bf16", 1), ("bf16", 4), ("f32", 1), ("f32", 4)):
            own, size, copies = decode_runs(bench, heads, dtype, batch, 4096, 4096)
            runs = {"own": own, "read": read_run(bench, size * copies),
                    "torch": every(torch_attention(heads, dtype, batch, 1, 4096, False, 2))}
            t = measure(runs, 5)
            rate = size * copies / t["own"][0] / 1e9
            row(f"{heads.name} {heads.q}/{heads.kv}x{heads.dim} {dtype} batch {batch}",
                f"{rate:.1f} ({t['own'][0] / t['own'][1]:.2f})", f"{t['read'][0] / t['own'][0]:.0%}",
                f"{t['torch'][0] / 2 / (t['own'][0] / copies):.1f}")


def short(bench: Bench, shapes: Sequence[Heads]) -> None:
    head("decode over few keys, bf16", "us", "of bandwidth", "best us")
    for heads in shapes:
        for keys in (1, 128, 300, 640):
            own, size, copies = decode_runs(bench, heads, "bf16", 1, keys, 1024)
            copies = min(copies, 512)
            t = measure({"own": own, "read": read_run(bench, max(size * copies, 1 << 20))}, 5)
            each = t["own"][0] / max(COLD // (size * 1024 // keys), 2)
            share = t["read"][0] / max(size * copies, 1 << 20) * size / each
            row(f"{heads.name} {heads.q}/{heads.kv}x{heads.dim}, {keys} keys", f"{each * 1e6:.2f}", f"{share:.0%}",
                f"{each * 1e6 * t['own'][1] / t['own'][0]:.2f}")


def append(bench: Bench, shapes: Sequence[Heads]) -> None:
    head("append, bf16", "us", "GB/s in + out", "x a copy")
    for heads in shapes:
        for batch, tokens in ((1, 1), (1, 512), (4, 512)):
            new = TensorType(("B", "S", heads.kv, heads.dim), DType.bf16)
            types = [cache_type(heads, "bf16", 1024), new, new, TensorType(("B",), DType.i64)]
            kernel = function(types, lambda k, *a: k.append(ops.Append(*a)))
            size = 2 * batch * tokens * heads.kv * heads.dim * 2
            copies = max((COLD // 4) // (size + batch * 1024), 2) if tokens > 1 else 64
            k, v, start = *(filled((batch, tokens, heads.kv, heads.dim), "bf16") for _ in "kv"), aligned(batch, "i64", 3)
            sets = [(*cache, k, v, start) for cache in caches(bench, heads, "bf16", 1024, batch, copies)]
            own = call_all(bench, kernel, {"B": batch, "S": tokens}, sets)
            copied = np.ones((2, copies, size), np.uint8)
            t = measure({"own": own, "copy": lambda copied=copied: np.copyto(copied[0], copied[1])}, 7)
            each = t["own"][0] / copies
            row(f"{heads.name} {heads.kv}x{heads.dim}, {batch} x {tokens} tokens", f"{each * 1e6:.2f}",
                f"{2 * size / each / 1e9:.1f}", f"{t['copy'][0] / t['own'][0]:.2f}")


def full(heads: Heads, dtype: str, causal: bool, padded: bool) -> Function:
    def make(k: Function, q: Value, key: Value, v: Value, *padding: Value) -> Op:
        extra = {"padding": padding[0]} if padding else {}
        return k.append(ops.Attention(q, key, v, scale=heads.dim**-0.5, causal=causal, **extra))

    q, kv = (TensorType(("B", "S", n, heads.dim), DType(dtype)) for n in (heads.q, heads.kv))
    return function([q, kv, kv, *[TensorType(("B", "S"), DType.bool)] * padded], make)


def prefill(bench: Bench, shapes: Sequence[Heads]) -> None:
    head("prefill, causal", "GFLOP/s", "of peak", "x torch", "from the cache")
    for heads in shapes:
        for s, dtype in ((512, "bf16"), (2048, "bf16"), (512, "f32"), (2048, "f32")):
            q, out = filled((1, s, heads.q, heads.dim), dtype), aligned((1, s, heads.q, heads.dim), dtype)
            k, v = (filled((1, s, heads.kv, heads.dim), dtype) for _ in "kv")
            cached = caches(bench, heads, dtype, s, 1, 1)[0]
            rate, work = peak_run(bench, dtype)
            runs = {"own": call_all(bench, full(heads, dtype, True, False), {"B": 1, "S": s}, [(q, k, v, out)]),
                    "cached": call_all(bench, attend(heads, dtype, s, "S"), {"B": 1, "S": s},
                                       [(q, *cached, aligned(1, "i64", 0), out)]),
                    "peak": rate, "torch": torch_attention(heads, dtype, 1, s, s, True, 1)[0]}
            t = measure(runs, 7)
            flops = 2.0 * heads.q * s * (s + 1) * heads.dim
            row(f"{heads.name} {heads.q}/{heads.kv}x{heads.dim} {dtype} {s}", f"{flops / t['own'][0] / 1e9:.0f}",
                f"{flops / t['own'][0] / (work / t['peak'][0]):.0%}", f"{t['torch'][0] / t['own'][0]:.2f}",
                f"{flops / t['cached'][0] / (work / t['peak'][0]):.0%} {t['torch'][0] / t['cached'][0]:.2f}x")


def encoder(bench: Bench, shapes: Sequence[Heads]) -> None:
    head("encoder, 128 tokens, padded", "us", "of peak", "x torch")
    heads, s = ENCODER, 128
    for dtype in ("f32", "bf16"):
        for b in (1, 32):
            q, k, v, out = (filled((b, s, heads.q, heads.dim), dtype) for _ in range(4))
            padding = aligned((b, s), "bool", 1)
            rate, work = peak_run(bench, dtype)
            mask = torch.ones(b, 1, 1, s, dtype=torch.bool)
            tq, tk, tv = (torch.randn(b, heads.q, s, heads.dim).to(TORCH[dtype]) for _ in range(3))
            own = call_all(bench, full(heads, dtype, False, True), {"B": b, "S": s}, [(q, k, v, padding, out)] * (32 // b))
            def peer(q=tq, k=tk, v=tv, mask=mask) -> None:
                torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

            t = measure({"own": own, "peak": rate, "torch": every([peer] * (32 // b))}, 9)
            flops = 4.0 * 32 * heads.q * s * s * heads.dim
            row(f"12x32 {dtype} batch {b}", f"{t['own'][0] / (32 // b) * 1e6:.1f}",
                f"{flops / t['own'][0] / (work / t['peak'][0]):.0%}", f"{t['torch'][0] / t['own'][0]:.2f}")


SECTIONS = {"decode": decode, "short": short, "append": append, "prefill": prefill, "encoder": encoder}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--schedule", type=parse_schedule, help="instead of the default one of each kernel")
    options.add_argument("--only", choices=SECTIONS, action="append")
    given = options.parse_args()
    bench = opened(given, given.schedule)
    torch.set_num_threads(given.threads)
    for name in given.only or SECTIONS:
        SECTIONS[name](bench, [SHAPES[s] for s in given.shape or SHAPES])


if __name__ == "__main__":
    main()
