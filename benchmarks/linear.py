"""Speed of linear kernels beside the limits of this machine, in one run.

    python -m benchmarks.linear [--threads 2] [--target native] [--only gemv] [--schedule "linear{tile_m=12 tile_v=2}"]

Few rows are compared with reading the same bytes of weights and scales, which are many times what the caches hold: a
stream of different weights, as a decode step has it. Many rows are compared with multiply-adds on registers alone.
Figures are medians over interleaved runs; the spread is that of the ratio between its quartiles.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import mmap
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import tilewright.runtime
from tilewright.codegen.mlir.builder import Kernel, constant, fma
from tilewright.codegen.mlir.linear import linear_kernel
from tilewright.codegen.mlir.linear_codes import dot_quads
from tilewright.codegen.mlir.linear_spec import LinearSpec
from tilewright.codegen.mlir.native import NativeKernel, aligned
from tilewright.codegen.mlir.value import Val, intrinsic
from tilewright.codegen.schedule import LinearSchedule, parse_schedule
from tilewright.codegen.target import CpuTarget, parse_target
from tilewright.ir import DType

RUNTIME = Path(tilewright.runtime.__file__).parent
COLD = 160 << 20  # bytes of weights to cycle through, several times the caches
LARGE_PAGE = 2 << 20
Run = Callable[[], None]

SHIM = """
#include "pool.h"
#include "pool.c"
struct call { void (*kernel)(); int64_t tasks, grain, args[12]; };
static void task(int64_t begin, int64_t end, void *arg) {
    int64_t *a = ((struct call *)arg)->args;
    ((void (*)(int64_t, int64_t, ...))((struct call *)arg)->kernel)(begin, end, a[0], a[1], a[2], a[3], a[4], a[5], a[6],
        a[7], a[8], a[9], a[10], a[11]);
}
void run(tw_pool *pool, struct call *calls, int64_t count) {
    for (int64_t i = 0; i < count; i++) tw_pool_run(pool, task, calls + i, calls[i].tasks, calls[i].grain);
}
"""


@functools.cache
def shim() -> ctypes.CDLL:
    """``SHIM`` compiled: kernels run one after the other from the runtime's own pool, as a program runs them."""
    folder = tempfile.mkdtemp(prefix="tilewright-bench-")
    source, library = Path(folder, "shim.c"), Path(folder, "shim.so")
    source.write_text(SHIM)
    subprocess.run(["cc", "-O2", "-w", "-shared", "-fPIC", f"-I{RUNTIME}", "-o", library, source, "-lpthread"], check=True)
    made = ctypes.CDLL(str(library))
    made.tw_pool_create.restype = ctypes.c_void_p
    made.run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return made


@dataclass(frozen=True)
class Machine:
    """The machine under test."""

    target: CpuTarget
    threads: int
    schedule: LinearSchedule | None = None

    @functools.cached_property
    def pool(self) -> int:
        return int(shim().tw_pool_create(self.threads))

    def calls(self, calls: Sequence[tuple[NativeKernel, int, int, Sequence]]) -> Run:
        """Run kernels in order; each is (kernel, tasks, grain, dims and arrays)."""
        block, kept = np.zeros((len(calls), 15), np.int64), list(calls)
        for row, (kernel, tasks, grain, given) in zip(block, calls):
            numbers = [a if isinstance(a, int) else a.ctypes.data for a in given]
            row[:3 + len(numbers)] = (kernel.address, tasks, grain, *numbers)
        run, pool = shim().run, self.pool
        return lambda kept=kept: run(pool, block.ctypes.data, len(block))


def compare(title: str, work: float, unit: str, limit: Run, own: Run, rounds: int) -> None:
    """Print how much ``work`` a second ``own`` does, and the same relative to ``limit``."""
    times: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        marks = [time.perf_counter()]
        for run in (limit, own):
            run()
            marks.append(time.perf_counter())
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    limits, owns = np.array(times[1:]).T
    low, middle, high = np.percentile(limits / owns, (25, 50, 75))
    speed = work / np.median(owns) / 1e9
    print(f"{title:46s} {speed:8.1f} {unit:6s} {100 * middle:5.1f} % ({100 * low:.0f}-{100 * high:.0f}) of "
          f"{work / np.median(limits) / 1e9:.1f}; best {100 * limits.min() / owns.min():.0f} %", flush=True)


def large_pages(size: int) -> np.ndarray:
    """Bytes in pages as large as the system has them, as the weights of an artifact are mapped; all are 1."""
    memory = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(memory, np.uint8)
    array = raw[-raw.ctypes.data % LARGE_PAGE:][:size]
    array[:] = 1
    return array


# --- limits -----------------------------------------------------------------------------------------------------------


def read_run(machine: Machine, size: int) -> Run:
    """Read ``size`` bytes."""
    step, lanes = 8 * machine.target.lanes, machine.target.lanes
    with Kernel("read", machine.target, buffers=[("x", "f32"), ("y", "f32")]) as kernel:
        x, y = kernel.buffers
        with kernel.loop(kernel.begin * step, kernel.end * step, step, [constant(0.0, "f32", lanes)] * 8) as loop:
            loop.next(*[v + x.load(loop.index + i * lanes, lanes) for i, v in enumerate(loop.values)])
        for i, value in enumerate(loop.results):
            y.store(value, i * lanes)
    memory = large_pages(size), aligned(256, "f32")
    return machine.calls([(NativeKernel(kernel), size // (4 * step), 1, memory)])


def peak_run(machine: Machine, kind: str, work: float) -> Run:
    """``work`` operations on registers alone."""
    target = machine.target
    lanes, chains = target.lanes, 24 if target.lanes == 16 else 12
    step, dtype, operations = multiply_add(kind, target)
    with Kernel("peak", target, buffers=[("y", dtype)]) as kernel:
        (y,) = kernel.buffers
        one = y.load(0, lanes)
        with kernel.loop(kernel.begin, kernel.end, carry=[one] * chains) as loop:
            loop.next(*[step(value, one) for value in loop.values])
        for i, value in enumerate(loop.results):
            y.store(value, (i + 1) * lanes)
    tasks = round(work / (operations * chains))
    return machine.calls([(NativeKernel(kernel), tasks, 1, (aligned(512, dtype),))])


def multiply_add(kind: str, target: CpuTarget) -> tuple[Callable[[Val, Val], Val], str, int]:
    """The best instruction for ``kind`` on the target: sum and operand to sum, the sum's dtype, operations."""
    lanes = target.lanes
    if kind == "i8" and target.has_vnni:
        return lambda total, one: dot_quads(total, one.bitcast("u8"), one.bitcast("i8")), "i32", 8 * lanes
    if kind == "bf16" and target.has_bf16_dot:
        dot = functools.partial(intrinsic, "llvm.x86.avx512bf16.dpbf16ps.512", "f32", lanes)
        return lambda total, one: dot(total, one.bitcast("bf16"), one.bitcast("bf16")), "f32", 4 * lanes
    return lambda total, one: fma(one, one, total), "f32", 2 * lanes


# --- kernels ----------------------------------------------------------------------------------------------------------


class Layer:
    """A compiled linear kernel and as many weights for it as are asked for."""

    def __init__(self, machine: Machine, spec: LinearSpec) -> None:
        self.machine, self.spec, self.target = machine, spec, machine.target
        self.schedule = machine.schedule or spec.schedule(machine.target)
        self.kernel = NativeKernel(linear_kernel("k", machine.target, spec, self.schedule))
        sizes = [spec.packing(self.schedule, self.target).nbytes]
        if spec.scale and spec.coded:
            sizes.append(spec.group_packing(spec.scale, self.schedule, self.target).nbytes)
        if spec.expands:
            sizes += [spec.step_packing(self.schedule, self.target).nbytes] * (1 + spec.has_zeros)
        elif spec.has_zeros:
            sizes.append(spec.group_packing("u8", self.schedule, self.target).nbytes)
        if spec.table:
            sizes.append((spec.n if spec.row_tables else 1) * (1 << spec.bits) * DType(spec.table).size)
        self.sizes = [size for size in sizes for _ in range(spec.parts)]

    @property
    def bytes(self) -> int:
        """Of the weights and all that belongs to them."""
        return sum(self.sizes)

    def calls(self, m: int, count: int) -> list[tuple[NativeKernel, int, int, Sequence]]:
        """Calls for ``m`` rows, each with weights of its own."""
        memory = large_pages(count * (self.bytes + 64 * len(self.sizes)))
        return [self._call(m, memory) for memory in np.split(memory, count)]

    def _call(self, m: int, memory: np.ndarray) -> tuple[NativeKernel, int, int, Sequence]:
        spec, at = self.spec, 0
        x, y = aligned((m, spec.k), spec.x_dtype, 1), aligned((m, spec.n), spec.out_dtype)
        scale = [aligned(m, "f32", 1)] if spec.dynamic else []
        weights = []
        for size in self.sizes:
            weights.append(memory[at:at + size])
            at += -(-size // 64) * 64
        tasks = spec.tasks(self.schedule, self.target, m)
        return self.kernel, tasks, 1, (m, x, *scale, *weights, y)


@dataclass(frozen=True)
class Format:
    """Element types of x and of the weights."""

    x: str
    weight: str
    group: int = 0
    table: str | None = None
    scale: str | None = ""
    steps: bool = False

    def spec(self, n: int, k: int, **more: object) -> LinearSpec:
        out = "f32" if self.x in ("i8", "f32") else self.x
        scale = ("f16" if self.group and not self.steps else "f32") if self.scale == "" else self.scale
        group, expands = (0, self.group) if self.steps else (self.group, 0)
        return LinearSpec(n, k, self.x, self.weight, out, group=group, scale=scale, table=self.table,
                          row_tables=bool(self.table) and not self.group, expands=expands, **more)

    def __str__(self) -> str:
        grouped = f" g{self.group}" if self.group else ""
        table = f", tables of {self.table}" if self.table else ""
        return f"{self.x} x {self.weight}{grouped}{table}{', steps' if self.steps else ''}"


CODED = [Format("i8", "i8"), Format("i8", "i4", 32), Format("i8", "i4", 128), Format("i8", "u4", 32)]
NARROW = [
    Format("i8", "u2", 64), Format("i8", "u2", 128), Format("i8", "i2"), Format("i8", "i3", 128),
    Format("i8", "i4", 128), Format("i8", "u4", 128, steps=True), Format("bf16", "u2", 64), Format("bf16", "i3", 128),
    Format("bf16", "i4", 128), Format("bf16", "f8e4m3"), Format("bf16", "f8e5m2"),
    Format("bf16", "f4e2m1", 32, scale="f8e8m0"),
    Format("bf16", "u4", 64, "f32"), Format("bf16", "u4", 0, "f16", None), Format("bf16", "u3", 0, "f16", None),
]
WEIGHT_ONLY = [Format("bf16", "i8"), Format("bf16", "i4", 32), Format("bf16", "i4", 128), Format("f32", "i4", 128)]
FLOATS = [Format("bf16", "bf16"), Format("f32", "f32")]
SMALL = [(576, 576), (576, 1536), (1536, 576), (896, 4864), (4864, 896)]


def streams(machine: Machine, formats: Sequence[Format], shapes: Sequence[tuple[int, int]], rows: Sequence[int]) -> None:
    """Few rows: the time it takes to read the weights."""
    for kind in formats:
        for n, k in shapes:
            layer = Layer(machine, kind.spec(n, k))
            count = max(COLD // layer.bytes, 2)
            limit = read_run(machine, count * layer.bytes)
            for m in rows:
                own = machine.calls(layer.calls(m, count))
                compare(f"{m} x {n} x {k}, {kind}", count * layer.bytes, "GB/s", limit, own, 7)


def gemv(machine: Machine) -> None:
    streams(machine, [*CODED, *WEIGHT_ONLY, *FLOATS], [(5632, 2048)], (1,))


def narrow(machine: Machine) -> None:
    """Formats of few bits beside four bits in groups of 32: a decode step each, then many rows."""
    usual = Format("i8", "i4", 32)
    for m, (n, k), count in ((1, (5632, 2048), 0), (512, (5632, 2048), 1)):
        first = Layer(machine, usual.spec(n, k))
        count = count or COLD // first.bytes
        base = machine.calls(first.calls(m, count))
        for kind in NARROW:
            layer = Layer(machine, kind.spec(n, k))
            relative(f"{m} x {n} x {k}, {kind}", count * layer.bytes, base, machine.calls(layer.calls(m, count)))


def relative(title: str, size: int, base: Run, own: Run, rounds: int = 7) -> None:
    """Print how much faster ``own``, which reads ``size`` bytes, is than ``base``."""
    times: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        marks = [time.perf_counter()]
        for run in (base, own):
            run()
            marks.append(time.perf_counter())
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    bases, owns = np.array(times[1:]).T
    low, middle, high = np.percentile(bases / owns, (25, 50, 75))
    print(f"{title:46s} {1e3 * np.median(owns):8.2f} ms {size / np.median(owns) / 1e9:6.1f} GB/s, "
          f"{middle:.2f} ({low:.2f}-{high:.2f}) times the speed; best {bases.min() / owns.min():.2f}", flush=True)


def small(machine: Machine) -> None:
    streams(machine, [CODED[0], CODED[1], FLOATS[0]], SMALL, (1,))


def few(machine: Machine) -> None:
    streams(machine, [CODED[0], CODED[1], WEIGHT_ONLY[1], FLOATS[0]], [(5632, 2048)], (1, 2, 4, 8, 16))


def gemm(machine: Machine) -> None:
    """Many rows: arithmetic."""
    for kind in [*CODED, *WEIGHT_ONLY, *FLOATS]:
        for m, n, k in ((512, 5632, 2048), (512, 896, 896)):
            work = 2.0 * m * n * k
            repeat = max(round(2e10 / work), 1)
            peak = peak_run(machine, kind.x, repeat * work)
            own = machine.calls(Layer(machine, kind.spec(n, k)).calls(m, 1) * repeat)
            compare(f"{m} x {n} x {k}, {kind}", repeat * work, "GOP/s", peak, own, 5)


SECTIONS = {"gemv": gemv, "narrow": narrow, "small": small, "few": few, "gemm": gemm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--target", default="native")
    parser.add_argument("--schedule", type=parse_schedule)
    parser.add_argument("--only", choices=SECTIONS, action="append")
    options = parser.parse_args()
    machine = Machine(parse_target(options.target), options.threads, options.schedule)
    print(f"{machine.target}, {options.threads} threads")
    for name in options.only or SECTIONS:
        SECTIONS[name](machine)


if __name__ == "__main__":
    main()
