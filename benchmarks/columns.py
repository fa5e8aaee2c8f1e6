"""Linear layers that leave out small inputs beside the same layers with all of them, in one run.

    python -m benchmarks.columns [--threads 2] [--zero 0.5,0.7] [--rows 1] [--only bf16] [--schedule "columns{depth=512}"]

Both read weights that are in no cache, as a decode step does. ``zero`` is the share of inputs below the threshold, at
random places. Figures are medians over interleaved runs; the spread is that of the ratio between its quartiles.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.linear import COLD, large_pages
from tilewright.codegen.emitters import choose, emitter
from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.packing import parse_packing
from tilewright.codegen.schedule import Schedule, parse_schedule
from tilewright.codegen.target import CpuTarget, parse_target
from tilewright.codegen.trial import TRIAL_KEY, Launch, Launcher, link_trials, shim
from tilewright.ir import Builder, DType, Function, Return, TensorType, Value, eval_dim, ops, sym

SHAPES = {"o": (2048, 2048, 1), "gate and up": (5632, 2048, 2), "down": (2048, 5632, 1)}
ROUNDS = 21


@dataclass(frozen=True)
class Format:
    """Element types of x and of the weights, with scales for ``group`` inputs (0: all)."""

    x: str
    weight: str
    group: int = 0

    def types(self, n: int, k: int) -> list[TensorType]:
        """Of one weight."""
        scale = TensorType((n, k // self.group if self.group else 1), DType.f16 if self.group else DType.f32)
        return [TensorType((n, k), DType(self.weight)), *([scale] if self.weight.startswith("i") else [])]

    def __str__(self) -> str:
        return f"{self.x} x {self.weight}{f' g{self.group}' if self.group else ''}"


FORMATS = [Format("f32", "f32"), Format("bf16", "bf16"), Format("bf16", "i8"), Format("bf16", "i4", 128),
           Format("bf16", "i4", 32)]  # fmt: skip


def layer(kind: Format, n: int, k: int, parts: int, skips: bool) -> Function:
    """The kernel of a layer, plain or gated, with a threshold or without."""
    kernel = Function("k", kind="kernel")
    b, x = Builder(kernel), kernel.arg("x", TensorType((sym("M"), k), DType(kind.x)))
    limit = kernel.arg("limit", TensorType((1,), DType.f32)) if skips else None
    weights: list[Value] = []
    for part in range(parts):
        args = [kernel.arg(f"w{part}{i}", t) for i, t in enumerate(kind.types(n, k))]
        weights.append(b.add(ops.Dequantize(*args)) if len(args) > 1 else args[0])
    value: Value = x if limit is None else b.add(ops.Threshold(x, limit))
    result = b.add(ops.GatedLinear(value, *weights) if parts == 2 else ops.Linear(value, *weights))
    kernel.append(Return((result,)))
    return kernel


def compiled(kernel: Function, target: CpuTarget, schedule: Schedule | None) -> KernelCode:
    """By rule unless there is a schedule."""
    own = emitter("mlir.columns") if schedule else choose(kernel, target)
    return own.emit(kernel, schedule or own.default_schedule(kernel, target), target, f"tw_{TRIAL_KEY}")


class Bench:
    """Kernels, and the memory they work on."""

    def __init__(self, target: CpuTarget, threads: int) -> None:
        self.target, self.folder = target, Path(tempfile.mkdtemp(prefix="tilewright-bench-"))
        self.launcher, self.made = Launcher(shim(target), threads), 0

    def launch(self, kernel: Function, code: KernelCode, given: Mapping[str, np.ndarray], rows: int, copies: int) -> Launch:
        """Calls of a kernel on ``copies`` of its weights."""
        self.made += 1
        (self.folder / str(self.made)).mkdir()
        library, (name,) = link_trials([code], self.folder / str(self.made), self.target)
        dims = {"M": rows}
        shared = {i: given[arg.name] for i, arg in enumerate(kernel.args) if arg.name in given}
        sizes = [_bytes(arg.tensor, code.packing.get(i, "")) for i, arg in enumerate(kernel.args) if i not in shared]
        memory = large_pages(copies * sum(sizes))
        out = [large_pages(eval_dim(v.tensor.bytes, dims)) for v in kernel.returns]
        out += [large_pages(eval_dim(size, dims) + 64) for size in code.scratch]
        tables = [self._pointers(kernel, shared, part, sizes, out) for part in np.split(memory, copies)]
        made = self.launcher.launch(str(library), name, code, dims, tables)
        return replace(made, kept=(made.kept, memory, out, given))

    def _pointers(self, kernel: Function, shared: Mapping[int, np.ndarray], memory: np.ndarray, sizes: Sequence[int],
                  out: Sequence[np.ndarray]) -> list[int]:  # fmt: skip
        begins: Iterator[int] = iter(np.cumsum([0, *sizes]).tolist())
        at = memory.ctypes.data
        args = [shared[i].ctypes.data if i in shared else at + next(begins) for i in range(len(kernel.args))]
        return [*args, *(array.ctypes.data for array in out)]


def _bytes(type: TensorType, packing: str) -> int:
    size = parse_packing(packing).nbytes if packing else int(type.bytes)
    return -(-size // 4096) * 4096


def compare(base: Launch, own: Launch, count: int) -> tuple[float, ...]:
    """Seconds of a call of ``own``, and how many times faster it is than ``base``: quartiles, median, of the best times."""
    times: list[tuple[float, float]] = []
    for _ in range(ROUNDS + 1):
        marks = [time.perf_counter()]
        for run in (base, own):
            run(count)
            marks.append(time.perf_counter())
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    bases, owns = np.array(times[1:]).T
    low, middle, high = np.percentile(bases / owns, (25, 50, 75))
    return float(np.median(owns)) / count, low, middle, high, float(bases.min() / owns.min())


def measure(bench: Bench, kind: Format, name: str, rows: int, zeros: Sequence[float], schedule: Schedule | None) -> None:
    """Print a line for each share of zeros."""
    n, k, parts = SHAPES[name]
    rng = np.random.default_rng(0)
    x = np.ascontiguousarray(rng.standard_normal((rows, k)).astype(DType(kind.x).np))
    size = sum(int(t.bytes) for t in kind.types(n, k)) * parts
    copies = max(COLD // size, 2)
    count = copies if rows <= 16 else 1
    plain, skipping = layer(kind, n, k, parts, False), layer(kind, n, k, parts, True)
    dense = bench.launch(plain, compiled(plain, bench.target, None), {"x": x}, rows, copies)
    code = compiled(skipping, bench.target, schedule)
    limit = np.zeros(1, np.float32)
    own = bench.launch(skipping, code, {"x": x, "limit": limit}, rows, copies)
    for zero in zeros:
        limit[0] = np.quantile(np.abs(x.astype(np.float32)), zero)
        seconds, low, middle, high, best = compare(dense, own, count)
        print(f"{rows} x {n} x {k} {name}, {kind}, {zero:.0%} zero: {1e6 * seconds:8.1f} us, "
              f"{middle:.2f} ({low:.2f}-{high:.2f}) times the speed of dense; best {best:.2f}", flush=True)


def main() -> None:
    emitter("mlir.columns")  # makes its schedule known
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--target", default="native")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--zero", default="0,0.5,0.7")
    parser.add_argument("--only", help="part of a format's name, as in the table")
    parser.add_argument("--layer", choices=SHAPES, action="append")
    parser.add_argument("--schedule", type=parse_schedule)
    options = parser.parse_args()
    bench = Bench(parse_target(options.target), options.threads)
    zeros = [float(word) for word in options.zero.split(",")]
    for kind in FORMATS:
        for name in options.layer or SHAPES:
            if not options.only or options.only in str(kind):
                measure(bench, kind, name, options.rows, zeros, options.schedule)


if __name__ == "__main__":
    main()
