"""Limits of this machine, measured in the same run as what is compared with them.

    python -m benchmarks.limits [--threads 2] [--target native]

Bytes read and operations a second (a multiply-add is two), by kernels that do nothing else. ``--serve`` measures once for
each line of standard input.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tilewright.codegen.mlir.builder import Kernel
    from tilewright.codegen.mlir.value import Val
    from tilewright.codegen.target import CpuTarget

_SOURCE = """
#include <stdint.h>
#include <stddef.h>
typedef uint64_t v8 __attribute__((vector_size(64)));
uint64_t read_all(const v8 *p, size_t n) {
  v8 a = {0}, b = {0}, c = {0}, d = {0};
  for (size_t i = 0; i + 4 <= n; i += 4) {
    a ^= p[i]; b ^= p[i + 1]; c ^= p[i + 2]; d ^= p[i + 3];
  }
  a ^= b ^ c ^ d;
  uint64_t s = 0;
  for (int i = 0; i < 8; i++) s ^= a[i];
  return s;
}
"""
STEPS = 2_000_000
"""Steps of a loop on registers: some ten milliseconds."""


class ReadBandwidth:
    """Reads ``size`` bytes of memory with ``threads`` threads; each call gives bytes a second, the best of four reads."""

    def __init__(self, threads: int, size: int = 1 << 30) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "read.c"), Path(folder, "read.so")
            source.write_text(_SOURCE)
            command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(library)]
            subprocess.run(command, check=True)
            self.read = ctypes.CDLL(str(library)).read_all
        self.read.restype = ctypes.c_uint64
        raw = np.ones(size + 64, np.uint8)
        self.data = raw[-raw.ctypes.data % 64 :][:size]
        self.pool = ThreadPoolExecutor(threads)
        self.part = size // threads // 256 * 256
        self.threads = threads

    def __call__(self) -> float:
        return max(self._once() for _ in range(4))

    def _once(self) -> float:
        start = time.perf_counter()
        list(self.pool.map(self._read, range(self.threads)))
        return self.part * self.threads / (time.perf_counter() - start)

    def _read(self, i: int) -> int:
        address = ctypes.c_void_p(self.data.ctypes.data + i * self.part)
        return int(self.read(address, ctypes.c_size_t(self.part // 64)))


@dataclass(frozen=True)
class Step:
    """One multiply-add on vectors, ``call(sum, operand) -> sum``: its operations and the element type of the sum."""

    call: Callable[[Val, Val], Val]
    operations: int
    dtype: str

    @classmethod
    def of(cls, kind: str, target: CpuTarget) -> Step:
        """The fastest way that ``target`` has for ``kind``: f32, bf16 or int8."""
        from tilewright.codegen.mlir.value import fma, intrinsic

        lanes = target.lanes
        if kind == "bf16" and target.has_bf16_dot:
            dot = partial(intrinsic, "llvm.x86.avx512bf16.dpbf16ps.512", "f32", lanes)
            return cls(lambda total, one: dot(total, one.bitcast("bf16"), one.bitcast("bf16")), 4 * lanes, "f32")
        if kind == "int8" and target.has_vnni:
            dot = partial(intrinsic, "llvm.x86.avx512.vpdpbusd.512", "i32", lanes)
            return cls(lambda total, one: dot(total, one.bitcast("i8"), one.bitcast("i8")), 8 * lanes, "i32")
        if kind == "int8" and lanes == 8:
            pairs = partial(intrinsic, "llvm.x86.avx2.pmadd.ub.sw", "i16", 2 * lanes)
            fours = partial(intrinsic, "llvm.x86.avx2.pmadd.wd", "i32", lanes)
            # it is the sum that is multiplied: a product of the operand alone would be computed once, before the loop
            return cls(lambda total, one: one + fours(pairs(total.bitcast("i8"), one.bitcast("i8")), one.bitcast("i16")),
                       8 * lanes, "i32")  # fmt: skip
        return cls(lambda total, one: fma(one, one, total), 2 * lanes, "f32")


class PeakArithmetic:
    """Multiply-adds on registers alone; each call gives operations a second, the best of three runs."""

    def __init__(self, kind: str, target: CpuTarget, threads: int) -> None:
        from tilewright.codegen.mlir.native import NativeKernel, aligned

        step, chains = Step.of(kind, target), 24 if target.lanes == 16 else 12
        kernel = NativeKernel(_registers_kernel(target, step, chains))
        memory = [aligned((1 + chains) * target.lanes, step.dtype) for _ in range(threads)]
        self.calls = [kernel.bind(0, STEPS, (), (array,)) for array in memory]
        self.operations = float(STEPS * chains * step.operations * threads)
        self.pool = ThreadPoolExecutor(threads)

    def __call__(self) -> float:
        return max(self._once() for _ in range(3))

    def _once(self) -> float:
        start = time.perf_counter()
        list(self.pool.map(lambda call: call(), self.calls))
        return self.operations / (time.perf_counter() - start)


def _registers_kernel(target: CpuTarget, step: Step, chains: int) -> Kernel:
    from tilewright.codegen.mlir.builder import Kernel

    with Kernel("peak", target, buffers=[("y", step.dtype)]) as kernel:
        (y,) = kernel.buffers
        one = y.load(0, kernel.lanes)
        with kernel.loop(kernel.begin, kernel.end, carry=[one] * chains) as loop:
            loop.next(*[step.call(total, one) for total in loop.values])
        for i, value in enumerate(loop.results):
            y.store(value, (i + 1) * kernel.lanes)
    return kernel


class Limits:
    """All limits; a call measures them in about half a second: ``read`` in bytes a second, the rest in operations."""

    def __init__(self, threads: int, target: str = "native") -> None:
        from tilewright.codegen.target import parse_target

        cpu = parse_target(target)
        self.measures: dict[str, Callable[[], float]] = {"read": ReadBandwidth(threads, 512 << 20)}
        self.measures |= {kind: PeakArithmetic(kind, cpu, threads) for kind in ("f32", "bf16", "int8")}

    def __call__(self) -> dict[str, float]:
        return {name: measure() for name, measure in self.measures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--target", default="native")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    limits = Limits(options.threads, options.target)
    if not options.serve:
        for name, value in limits().items():
            print(f"{name:5} {value / 1e9:8.1f} {'GB/s' if name == 'read' else 'GOP/s'}")
        return
    for _ in sys.stdin:
        print(json.dumps({name: round(value) for name, value in limits().items()}), flush=True)


if __name__ == "__main__":
    main()
