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

import argparse
import ctypes
import functools
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import tilewright.runtime
from tilewright.codegen.cache import cache_layout
from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.mlir.attention_emitter import AttentionEmitter
from tilewright.codegen.mlir.builder import Kernel
from tilewright.codegen.mlir.native import NativeKernel, aligned
from tilewright.codegen.mlir.value import constant, fma, intrinsic
from tilewright.codegen.schedule import Schedule, parse_schedule
from tilewright.codegen.target import CpuTarget, parse_target
from tilewright.ir import DType, Function, KVType, Op, Return, TensorType, Value, eval_dim, ops

RUNTIME = Path(tilewright.runtime.__file__).parent
TORCH = {"f32": torch.float32, "bf16": torch.bfloat16}
COLD = 192 << 20  # bytes of caches to cycle through, more than any cache here
SCHEDULE: Schedule | None = None
MOST = 20  # arguments of a kernel; surplus ones are harmless in the System V ABI

SHIM = """
#include "pool.h"
#include "pool.c"
typedef int64_t i;
struct call { void (*kernel)(); i first; i args[MOST]; };
static void task(i begin, i end, void *arg) {
    struct call *c = arg;
    i *a = c->args;
    ((void (*)(i, i, i, i, i, i, i, i, i, i, i, i, i, i, i, i))c->kernel)(begin + c->first, end + c->first,
        a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13]);
}
void run_all(tw_pool *pool, struct call *calls, i count, i tasks, i grain, i last) {
    for (i n = 0; n < count; n++) {
        calls[n].first = 0;
        tw_pool_run(pool, task, &calls[n], tasks, grain);
        calls[n].first = tasks;
        if (last) tw_pool_run(pool, task, &calls[n], last, 1);
    }
}
"""


@dataclass(frozen=True)
class Heads:
    """Query heads, key heads, size of a head."""

    name: str
    q: int
    kv: int
    dim: int


SHAPES = {s.name: s for s in (Heads("S", 9, 3, 64), Heads("M", 14, 2, 64), Heads("L", 32, 4, 64), Heads("8B", 32, 8, 128))}
ENCODER = Heads("E", 12, 12, 32)


@functools.cache
def linked(code: bytes, symbol: str) -> int:
    """The address of a kernel, linked into this process."""
    folder = Path(tempfile.mkdtemp(prefix="tilewright-bench-"))
    (folder / "k.o").write_bytes(code)
    subprocess.run(["cc", "-shared", "-o", folder / "k.so", folder / "k.o", "-lm"], check=True)
    return ctypes.cast(getattr(ctypes.CDLL(str(folder / "k.so")), symbol), ctypes.c_void_p).value or 0


@functools.cache
def shim() -> ctypes.CDLL:
    """The compiled ``SHIM``."""
    folder = Path(tempfile.mkdtemp(prefix="tilewright-bench-"))
    (folder / "shim.c").write_text(SHIM)
    command = ["cc", "-O2", "-shared", "-fPIC", f"-DMOST={MOST}", f"-I{RUNTIME}", "-o", folder / "shim.so"]
    subprocess.run([*command, folder / "shim.c", "-lpthread"], check=True)
    made = ctypes.CDLL(str(folder / "shim.so"))
    made.tw_pool_create.restype = ctypes.c_void_p
    made.run_all.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 4]
    return made


class Bench:
    """The machine under test."""

    def __init__(self, target: CpuTarget, threads: int) -> None:
        self.target, self.threads = target, threads
        self.pool = shim().tw_pool_create(threads)

    def split(self, kernel: NativeKernel, tasks: int, arrays: Sequence[np.ndarray]) -> Callable[[], None]:
        """A call of a kernel without dims over all threads."""
        block = (ctypes.c_int64 * (2 + MOST))(kernel.address, 0, *(array.ctypes.data for array in arrays))
        return lambda kept=(kernel, arrays): shim().run_all(self.pool, block, 1, tasks, 0, 0)


def read_run(bench: Bench, size: int) -> Callable[[], None]:
    """Read ``size`` bytes: the bandwidth to compare with."""
    step = 8 * bench.target.lanes
    with Kernel("read", bench.target, buffers=[("x", "f32"), ("y", "f32")]) as kernel:
        x, y = kernel.buffers
        zero = constant(0.0, "f32", kernel.lanes)
        with kernel.loop(kernel.begin * step, kernel.end * step, step, [zero] * 8) as loop:
            loop.next(*[v + x.load(loop.index + i * kernel.lanes, kernel.lanes) for i, v in enumerate(loop.values)])
        for i, value in enumerate(loop.results):
            y.store(value, i * kernel.lanes)
    return bench.split(NativeKernel(kernel), size // (4 * step), (aligned(size // 4, "f32", 1), aligned(256, "f32")))


def peak_run(bench: Bench, dtype: str, count: int = 400_000) -> tuple[Callable[[], None], float]:
    """Multiply-adds on registers only: the arithmetic to compare with, and its operations."""
    dot = bench.target.has_bf16_dot and dtype == "bf16"
    chains = 12 if bench.target.lanes == 16 else 10
    with Kernel("peak", bench.target, buffers=[("y", "f32")]) as kernel:
        (y,) = kernel.buffers
        one = y.load(0, kernel.lanes)
        pair = one.bitcast("bf16")
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        with kernel.loop(kernel.begin, kernel.end, carry=[one] * chains) as loop:
            loop.next(*[intrinsic(name, "f32", 16, v, pair, pair) if dot else fma(one, one, v) for v in loop.values])
        for i, value in enumerate(loop.results):
            y.store(value, (i + 1) * kernel.lanes)
    run = bench.split(NativeKernel(kernel), count * bench.threads, (aligned(512, "f32"),))
    return run, 2.0 * count * bench.threads * chains * bench.target.lanes * (2 if dot else 1)


def function(types: Sequence[TensorType | KVType], make: Callable[..., Op]) -> Function:
    """A kernel around the operation that ``make`` gives for the arguments."""
    made = Function("k", kind="kernel")
    values: list[Value] = [made.arg(f"a{i}", t) for i, t in enumerate(types)]
    op = make(made, *values)
    made.append(Return(op.results))
    return made


def call_all(bench: Bench, kernel: Function, dims: dict[str, int], sets: Sequence[Sequence]) -> Callable[[], None]:
    """Run ``kernel`` once with each of the sets of arrays (arguments and results, in order)."""
    emitter = AttentionEmitter()
    schedule = SCHEDULE or emitter.default_schedule(kernel, bench.target)
    code: KernelCode = emitter.emit(kernel, schedule, bench.target, "kernel")
    scratch = [aligned(eval_dim(size, dims), "u8") for size in code.scratch]
    blocks = ((ctypes.c_int64 * (2 + MOST)) * len(sets))()
    for block, arrays in zip(blocks, sets):
        numbers = [dims[d] for d in code.dims] + [a.ctypes.data for a in (*arrays, *scratch)]
        block[0] = linked(code.object, "kernel")
        block[2:2 + len(numbers)] = numbers
    counts = [eval_dim(n, dims) for n in (code.tasks, code.grain, code.last)]
    return lambda kept=(sets, scratch): shim().run_all(bench.pool, blocks, len(sets), *counts)


def measure(runs: dict[str, Callable[[], None]], repeat: int) -> dict[str, tuple[float, float]]:
    """Median and best seconds of each; PyTorch apart from the others."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    apart = [name for name in runs if name.startswith("torch")]
    for names in ([name for name in runs if name not in apart], apart):
        for name in names:
            runs[name]()
        for name in repeat * names:
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    if apart:
        time.sleep(0.3)
    return {name: (statistics.median(t), min(t)) for name, t in times.items()}


def row(title: str, *cells: str) -> None:
    print(f"| {title:34s} | " + " | ".join(f"{c:>16s}" for c in cells) + " |", flush=True)


def head(*cells: str) -> None:
    print()
    row(*cells)
    print("|" + "---|" * len(cells))


def filled(shape: Sequence[int], dtype: str) -> np.ndarray:
    """Small random numbers: constant ones would skip the rescaling."""
    out = aligned(shape, dtype)
    out.reshape(-1)[...] = np.resize(np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32), out.size)
    return out


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--target", default="native")
    parser.add_argument("--schedule", type=parse_schedule, help="instead of the default one of each kernel")
    parser.add_argument("--only", choices=SECTIONS, action="append")
    parser.add_argument("--shape", choices=SHAPES, action="append")
    options = parser.parse_args()
    global SCHEDULE
    SCHEDULE = options.schedule
    bench = Bench(parse_target(options.target), options.threads)
    torch.set_num_threads(options.threads)
    print(f"{bench.target}, {options.threads} threads")
    for name in options.only or SECTIONS:
        SECTIONS[name](bench, [SHAPES[s] for s in options.shape or SHAPES])


if __name__ == "__main__":
    main()
