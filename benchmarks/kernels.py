"""Speed of single kernels as ratios within one run: to memory bandwidth, to peak arithmetic and to PyTorch.

    python benchmarks/kernels.py [--threads 2] [--target native] [--only gemv]

Every figure is the best of many repetitions, interleaved so that a busy machine hurts all sides alike.
"""

import argparse
import ctypes
import functools
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import tilewright.runtime
from tilewright.codegen.cache import CacheLayout, panel_for
from tilewright.codegen.mlir.attention import AttentionSpec, attention_kernel
from tilewright.codegen.mlir.builder import Kernel, constant, fma
from tilewright.codegen.mlir.kv import AttendSpec, attend_kernel
from tilewright.codegen.mlir.linear import LinearSpec, linear_kernel
from tilewright.codegen.mlir.native import NativeKernel, aligned
from tilewright.codegen.schedule import AttentionSchedule, LinearSchedule
from tilewright.codegen.target import CpuTarget, parse_target

RUNTIME = Path(tilewright.runtime.__file__).parent
TORCH = {"f32": torch.float32, "bf16": torch.bfloat16}
COLD = 192 << 20  # bytes of operands to cycle through, more than any cache here


# Calls a kernel over a range of tasks from the runtime's own pool. Surplus arguments are harmless in the System V ABI.
SHIM = """
#include "pool.h"
#include "pool.c"
#define MOST 16
struct call { void (*kernel)(); int64_t args[MOST]; };
static void task(int64_t begin, int64_t end, void *arg) {
    struct call *c = arg;
    int64_t *a = c->args;
    ((void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t))
        c->kernel)(begin, end, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9]);
}
void run(tw_pool *pool, struct call *c, int64_t tasks) { tw_pool_run(pool, task, c, tasks, 0); }
"""


@functools.cache
def shim() -> ctypes.CDLL:
    """The compiled ``SHIM``."""
    folder = tempfile.mkdtemp(prefix="tilewright-bench-")
    source, library = Path(folder, "shim.c"), Path(folder, "shim.so")
    source.write_text(SHIM)
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", f"-I{RUNTIME}", "-o", library, source, "-lpthread"], check=True)
    made = ctypes.CDLL(str(library))
    made.tw_pool_create.restype = ctypes.c_void_p
    made.run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return made


class Bench:
    """The machine under test."""

    def __init__(self, target: CpuTarget, threads: int) -> None:
        self.target, self.threads = target, threads
        self.pool = shim().tw_pool_create(threads)

    def split(self, kernel: NativeKernel, tasks: int, dims: Sequence[int], arrays: Sequence) -> Callable[[], None]:
        """A call of the whole kernel over all threads."""
        numbers = [kernel.address, *dims, *(array.ctypes.data for array in arrays)]
        block = (ctypes.c_int64 * 17)(*numbers)
        run, pool = shim().run, self.pool
        return lambda kept=(kernel, arrays): run(pool, block, tasks)

    def compare(self, title: str, work: float, unit: str, runs: dict[str, Callable[[], None]], repeat: int = 15) -> None:
        """Print ``work`` per second of every run, and how the first compares with the others."""
        best = dict.fromkeys(runs, float("inf"))
        # PyTorch's threads go on spinning for a while after its call: it gets a round of its own, at the end.
        together, alone = [name for name in runs if name != "torch"], [name for name in runs if name == "torch"]
        for names in (together, alone):
            for name in repeat * names:
                start = time.perf_counter()
                runs[name]()
                best[name] = min(best[name], time.perf_counter() - start)
        time.sleep(0.3)
        own, *others = runs
        ratios = ", ".join(f"{best[name] / best[own]:.2f} x {name}" for name in others)
        print(f"{title:44s} {work / best[own] / 1e9:8.1f} {unit}   {ratios}", flush=True)


def rotate(runs: Sequence[Callable[[], None]]) -> Callable[[], None]:
    """All runs in turn."""

    def every() -> None:
        for run in runs:
            run()

    return every


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
    return bench.split(NativeKernel(kernel), size // (4 * step), (), (aligned(size // 4, "f32", 1), aligned(256, "f32")))


def peak_run(bench: Bench, dot: bool, count: int = 200_000) -> tuple[Callable[[], None], float]:
    """Multiply-adds on registers only: the arithmetic to compare with, and its operations."""
    from tilewright.codegen.mlir.value import intrinsic

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
    run = bench.split(NativeKernel(kernel), count * bench.threads, (), (aligned(512, "f32"),))
    return run, 2.0 * count * bench.threads * chains * bench.target.lanes * (2 if dot else 1)


def linear_runs(bench: Bench, spec: LinearSpec, m: int, copies: int) -> list[Callable[[], None]]:
    schedule = LinearSchedule.default(bench.target)
    kernel = NativeKernel(linear_kernel("k", bench.target, spec, schedule))
    packing, tasks = spec.packing(schedule, bench.target), spec.tasks(schedule, bench.target, m)
    x, y = aligned((m, spec.k), spec.x_dtype, 1), aligned((m, spec.n), spec.out_dtype)
    scales = [aligned(spec.n, "f32", 1)] if spec.weight == "i8" else []
    weights = [aligned(packing.shape, spec.weight, 1) for _ in range(copies)]
    return [bench.split(kernel, tasks, (m,), (x, weight, *scales, y)) for weight in weights]


def torch_linear(dtype: str, m: int, n: int, k: int, copies: int) -> list[Callable[[], None]]:
    x = torch.ones(m, k, dtype=TORCH[dtype])
    weights = [torch.ones(n, k, dtype=TORCH[dtype]) for _ in range(copies)]
    return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]


def gemv(bench: Bench) -> None:
    """One row of x: weights stream from memory."""
    n, k = 5632, 2048
    for x, weight in (("bf16", "bf16"), ("f32", "f32"), ("bf16", "i8"), ("f32", "bf16")):
        for m in (1, 4) if x == weight else (1,):
            spec = LinearSpec(n, k, x, weight, x)
            size = spec.packing(LinearSchedule.default(bench.target), bench.target).nbytes
            copies = max(COLD // size, 2)
            runs = {"own": rotate(linear_runs(bench, spec, m, copies)), "memory read": read_run(bench, copies * size)}
            if x == weight:
                runs["torch"] = rotate(torch_linear(x, m, n, k, copies))
            bench.compare(f"linear {m} x {n} x {k}, {x} x {weight}", copies * size, "GB/s", runs)


def gemm(bench: Bench) -> None:
    """Many rows: arithmetic limits."""
    m, n, k = 512, 5632, 2048
    for x, weight in (("bf16", "bf16"), ("f32", "f32"), ("bf16", "i8")):
        work = 2.0 * m * n * k
        peak, peak_work = peak_run(bench, bench.target.has_bf16_dot and x == "bf16")
        repeats = max(round(work / peak_work), 1)
        runs = {
            "own": linear_runs(bench, LinearSpec(n, k, x, weight, x), m, 1)[0],
            "torch": torch_linear(x, m, n, k, 1)[0],
            f"arithmetic peak (/{work / peak_work / repeats:.2f})": rotate([peak] * repeats),
        }
        bench.compare(f"linear {m} x {n} x {k}, {x} x {weight}", work, "GFLOP/s", runs, repeat=7)


def decode(bench: Bench) -> None:
    """One query a head over a long cache."""
    shapes = ((32, 8, 128, "bf16"), (32, 32, 128, "bf16"), (14, 2, 64, "bf16"), (32, 8, 128, "f32"))
    for heads, kv_heads, dim, dtype in shapes:
        cache = CacheLayout(kv_heads, dim, dim, 4096, dtype, panel_for(bench.target))
        spec, schedule = AttendSpec(heads, cache, dtype, dtype, s=1), AttentionSchedule.default(bench.target)
        kernel, size = NativeKernel(attend_kernel("k", bench.target, spec, schedule)), cache.k_bytes + cache.v_bytes
        copies = max(COLD // size, 2)
        q, out = aligned((1, 1, heads, dim), dtype, 1), aligned((1, 1, heads, dim), dtype)
        start = aligned(1, "i64", 4095)
        caches = [(aligned(cache.k_shape, dtype, 0.1), aligned(cache.v_shape, dtype, 0.1)) for _ in range(copies)]
        tasks = spec.tasks(schedule, 1, 1)
        own = [bench.split(kernel, tasks, (1, 1), (q, k, v, start, out)) for k, v in caches]
        runs = {"own": rotate(own), "memory read": read_run(bench, copies * size),
                "torch": rotate(torch_attention(dtype, heads, kv_heads, dim, 1, 4096, False, copies))}
        bench.compare(f"decode {heads}/{kv_heads} heads of {dim}, 4096 keys, {dtype}", copies * size, "GB/s", runs, 9)


def prefill(bench: Bench) -> None:
    """A whole prompt, causal, or a batch of short texts."""
    for b, s, heads, kv_heads, dim, causal, dtype in (
        (1, 512, 32, 8, 128, True, "bf16"), (1, 2048, 16, 16, 64, True, "bf16"), (1, 512, 32, 8, 128, True, "f32"),
        (4, 128, 12, 12, 64, False, "f32"),
    ):
        spec = AttentionSpec(heads, kv_heads, dim, dim, dtype, dtype, causal=causal)
        schedule = AttentionSchedule.default(bench.target)
        kernel = NativeKernel(attention_kernel("k", bench.target, spec, schedule))
        q, out = (aligned((b, s, heads, dim), dtype, 0.1) for _ in range(2))
        k, v = (aligned((b, s, kv_heads, dim), dtype, 0.1) for _ in range(2))
        work = 4.0 * b * heads * s * s * dim / (2 if causal else 1)
        runs = {"own": bench.split(kernel, spec.tasks(schedule, b, s), (b, s, s), (q, k, v, out)),
                "torch": torch_attention(dtype, heads, kv_heads, dim, s, s, causal, 1, b)[0]}
        bench.compare(f"attention {b} x {s}, {heads}/{kv_heads} heads of {dim}, {dtype}", work, "GFLOP/s", runs, 7)


def torch_attention(dtype: str, heads: int, kv_heads: int, dim: int, s: int, t: int, causal: bool, copies: int,
                    b: int = 1) -> list[Callable[[], None]]:
    q = torch.full((b, heads, s, dim), 0.1, dtype=TORCH[dtype])
    pairs = [[torch.full((b, kv_heads, t, dim), 0.1, dtype=TORCH[dtype]) for _ in range(2)] for _ in range(copies)]
    grouped = {"is_causal": causal, "enable_gqa": heads != kv_heads}
    return [lambda k=k, v=v: torch.nn.functional.scaled_dot_product_attention(q, k, v, **grouped) for k, v in pairs]


SECTIONS = {"gemv": gemv, "gemm": gemm, "decode": decode, "prefill": prefill}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--target", default="native")
    parser.add_argument("--only", choices=SECTIONS, action="append")
    options = parser.parse_args()
    bench = Bench(parse_target(options.target), options.threads)
    torch.set_num_threads(options.threads)
    print(f"{bench.target}, {options.threads} threads; figures are own speed, then own speed relative to others")
    for name in options.only or SECTIONS:
        SECTIONS[name](bench)


if __name__ == "__main__":
    main()
