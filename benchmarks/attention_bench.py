"""What benchmarks of attention kernels share: shapes, kernels run over all threads, limits to compare with, tables."""

import argparse
import ctypes
import functools
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import tilewright.runtime
from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.mlir.attention_emitter import AttentionEmitter
from tilewright.codegen.mlir.builder import Kernel
from tilewright.codegen.mlir.native import NativeKernel, aligned, load
from tilewright.codegen.mlir.value import constant, fma, intrinsic
from tilewright.codegen.schedule import Schedule
from tilewright.codegen.target import CpuTarget, parse_target
from tilewright.ir import Function, KVType, Op, Return, TensorType, Value, eval_dim

RUNTIME = Path(tilewright.runtime.__file__).parent
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


@functools.cache
def linked(code: bytes, symbol: str) -> int:
    """The address of a kernel, linked into this process."""
    return ctypes.cast(load(code, symbol), ctypes.c_void_p).value or 0


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

    def __init__(self, target: CpuTarget, threads: int, schedule: Schedule | None = None) -> None:
        """``schedule`` is for all kernels, instead of the default one of each."""
        self.target, self.threads, self.schedule = target, threads, schedule
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
    schedule = bench.schedule or emitter.default_schedule(kernel, bench.target)
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


def copied(arrays: Iterable[np.ndarray], dtype: str) -> list[np.ndarray]:
    """The arrays where kernels may read them."""
    out = []
    for array in arrays:
        out.append(aligned(array.shape, dtype, fill=None))
        out[-1][...] = array
    return out


def parser(about: str, shapes: Iterable[str] = SHAPES) -> argparse.ArgumentParser:
    """Of the options that all benchmarks of attention have."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--target", default="native")
    made.add_argument("--shape", choices=shapes, action="append")
    return made


def opened(options: argparse.Namespace, schedule: Schedule | None = None) -> Bench:
    """The machine that the options say; it is the first line of the output."""
    bench = Bench(parse_target(options.target), options.threads, schedule)
    print(f"{bench.target}, {bench.threads} threads")
    return bench


Section = Callable[[Bench, Collection[str]], None]


def run_sections(about: str, shapes: Collection[str], sections: Mapping[str, Section]) -> None:
    """The tables that ``--only`` names, or all, each for the shapes that ``--shape`` names."""
    options = parser(about, shapes)
    options.add_argument("--only", choices=sections, action="append")
    given = options.parse_args()
    bench = opened(given)
    for name in given.only or sections:
        sections[name](bench, given.shape or shapes)
