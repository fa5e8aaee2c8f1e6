"""Speed of kernels that are no matrix product: beside a plain copy of the same bytes and beside PyTorch, one thread.

    python benchmarks/loops.py [--target native] [--only math] [--case gelu]

Rows tell microseconds a call and nanoseconds an element; figures are medians of runs that take turns. The arrays stay
in cache (unless a case is larger than it), as they do between the layers of a model.
"""

import argparse
import ctypes
import functools
import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as nn

from tilewright.codegen.mlir.loops import LoopsEmitter
from tilewright.codegen.mlir.native import aligned, numpy_dtype
from tilewright.codegen.target import CpuTarget, parse_target
from tilewright.ir import Builder, DType, Function, Return, TensorType, Value, eval_dim, ops

TORCH = {"f32": torch.float32, "bf16": torch.bfloat16}
# Surplus arguments are harmless in the System V ABI.
REPEAT = """
#include <stdint.h>
typedef void (*kernel)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
void repeat(kernel k, int64_t tasks, const int64_t *a, int64_t times) {
    for (int64_t i = 0; i < times; i++) k(0, tasks, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]);
}
"""


@dataclass(frozen=True)
class Case:
    """A kernel over arguments of static (shape, dtype), and what computes the same in PyTorch."""

    name: str
    build: Callable[..., Value | Sequence[Value]]
    types: Sequence[tuple[tuple[int, ...], str]]
    peer: Callable[..., object] | None = None

    def kernel(self) -> Function:
        kernel = Function("k", kind="kernel")
        args = [kernel.arg(f"a{i}", TensorType(shape, DType(dtype))) for i, (shape, dtype) in enumerate(self.types)]
        made = self.build(Builder(kernel), *args)
        kernel.append(Return(tuple(made) if isinstance(made, (list, tuple)) else (made,)))
        return kernel


@functools.cache
def load(code: bytes, name: str) -> ctypes.CDLL:
    """A shared library of C source or of an object."""
    folder = tempfile.mkdtemp(prefix="tilewright-bench-")
    source, library = Path(folder, name), Path(folder, "it.so")
    source.write_bytes(code)
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-lm"], check=True)
    return ctypes.CDLL(str(library))


def random_array(rng: np.random.Generator, shape: Sequence[int], dtype: str) -> np.ndarray:
    if dtype == "i4":
        shape, dtype = (math.prod(shape) // 2,), "u8"
    kind = numpy_dtype(dtype)
    array = aligned(shape, dtype, None)
    array[...] = rng.integers(0, 100, shape) if kind.kind in "iu" else rng.uniform(-3, 3, shape).astype(kind)
    return array


class Runner:
    """Calls of a compiled case, many at a time."""

    def __init__(self, case: Case, target: CpuTarget) -> None:
        emitter, kernel = LoopsEmitter(), case.kernel()
        if reason := emitter.match(kernel, target):
            raise SystemExit(f"{case.name}: {reason}")
        code = emitter.emit(kernel, emitter.default_schedule(kernel, target), target, "tw_k")
        rng = np.random.default_rng(0)
        self.inputs = [random_array(rng, shape, dtype) for shape, dtype in case.types]
        self.outputs = [aligned(tuple(map(int, v.shape)), v.dtype.value) for v in kernel.returns]
        pointers = [a.ctypes.data for a in (*self.inputs, *self.outputs)]
        self.block = (ctypes.c_int64 * 8)(*pointers)
        self.function = ctypes.cast(load(code.object, "kernel.o").tw_k, ctypes.c_void_p)
        self.tasks, self.elements = eval_dim(code.tasks, {}), max(a.size for a in (*self.inputs, *self.outputs))
        self.grain = eval_dim(code.grain, {})

    def __call__(self, times: int) -> None:
        repeat = load(REPEAT.encode(), "repeat.c").repeat
        repeat(self.function, ctypes.c_int64(self.tasks), self.block, ctypes.c_int64(times))


def copier(arrays: Sequence[np.ndarray]) -> Callable[[int], None]:
    """memcpy of as many bytes as ``arrays`` have, half of them read and half written."""
    half = max(sum(a.nbytes for a in arrays) // 2, 1)
    source, target = aligned(half, "u8", 1), aligned(half, "u8", 1)
    move = ctypes.CDLL(None).memcpy
    arguments = (ctypes.c_void_p(target.ctypes.data), ctypes.c_void_p(source.ctypes.data), ctypes.c_size_t(half))

    def run(times: int, kept: object = (source, target)) -> None:
        for _ in range(times):
            move(*arguments)

    return run


def peer(case: Case, inputs: Sequence[np.ndarray]) -> Callable[[int], None]:
    """The PyTorch version over the same numbers."""
    tensors = [torch.from_numpy(a.astype(np.float32)).to(TORCH[d]) if d in TORCH else torch.from_numpy(a)
               for a, (_, d) in zip(inputs, case.types)]  # fmt: skip

    def run(times: int) -> None:
        with torch.inference_mode():
            for _ in range(times):
                case.peer(*tensors)  # type: ignore[misc]

    return run


def seconds(runs: Sequence[Callable[[int], None]], rounds: int = 9) -> list[float]:
    """The median time of one call of each, in turns of about half a millisecond."""
    counts = []
    for run in runs:
        run(2)
        start = time.perf_counter()
        run(3)
        counts.append(max(1, round(5e-4 / max((time.perf_counter() - start) / 3, 1e-9))))
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, count, into in zip(runs, counts, times):
            start = time.perf_counter()
            run(count)
            into.append((time.perf_counter() - start) / count)
    return [statistics.median(t) for t in times]


def measure(case: Case, target: CpuTarget) -> None:
    """One row of the table."""
    own = Runner(case, target)
    runs = [own, copier((*own.inputs, *own.outputs)), *([peer(case, own.inputs)] if case.peer else [])]
    mine, copy, *others = seconds(runs)
    row = f"{case.name:44s} {mine * 1e6:9.2f} us {mine / own.elements * 1e9:7.3f} ns/el  copy {copy * 1e6:8.2f} us"
    row += "".join(f"  torch {t * 1e6:8.2f} us ({t / mine:.1f}x)" for t in others)
    print(f"{row}  tasks {own.tasks} grain {own.grain}", flush=True)


# --- cases ------------------------------------------------------------------------------------------------------------


def unary(kind: type[ops.Unary], dtype: str, function: Callable, n: int = 16384) -> Case:
    return Case(f"{kind.name} {dtype} {n}", lambda b, x: b(kind, x), [((n,), dtype)], function)


def maths() -> Iterator[Case]:
    table = {
        ops.Neg: torch.neg, ops.Exp: torch.exp, ops.Tanh: torch.tanh, ops.Sigmoid: torch.sigmoid, ops.Silu: nn.silu,
        ops.Erf: torch.erf, ops.Gelu: nn.gelu, ops.GeluTanh: lambda x: nn.gelu(x, approximate="tanh"),
        ops.Log: torch.log, ops.Sin: torch.sin, ops.Softplus: nn.softplus, ops.Rsqrt: torch.rsqrt,
    }  # fmt: skip
    for kind, function in table.items():
        for dtype in ("f32", "bf16"):
            yield unary(kind, dtype, function)


def norms() -> Iterator[Case]:
    for m, k, dtype in ((1, 576, "f32"), (1, 576, "bf16"), (1, 896, "bf16"), (1, 2048, "bf16"), (1, 2048, "f32"),
                        (512, 576, "bf16"), (512, 2048, "f32"), (512, 2048, "bf16")):  # fmt: skip
        yield Case(f"rms_norm {m}x{k} {dtype}", lambda b, x, w: b(ops.RmsNorm, x, w, 1e-5),
                   [((m, k), dtype), ((k,), dtype)], lambda x, w: nn.rms_norm(x, x.shape[-1:], w, 1e-5))  # fmt: skip
        yield Case(f"add+rms_norm {m}x{k} {dtype}", _add_rms, [((m, k), dtype), ((m, k), dtype), ((k,), dtype)],
                   lambda x, y, w: nn.rms_norm(x + y, x.shape[-1:], w, 1e-5))  # fmt: skip
    for m, k, dtype in ((1, 384, "f32"), (128, 384, "f32"), (4096, 384, "f32"), (128, 384, "bf16"), (128, 768, "bf16")):
        yield Case(f"layer_norm {m}x{k} {dtype}", lambda b, x, w, v: b(ops.LayerNorm, x, w, v, 1e-5),
                   [((m, k), dtype), ((k,), dtype), ((k,), dtype)],
                   lambda x, w, v: nn.layer_norm(x, x.shape[-1:], w, v, 1e-5))  # fmt: skip
        yield Case(f"add+layer_norm {m}x{k} {dtype}",
                   lambda b, x, y, w, v: b(ops.LayerNorm, b(ops.Add, x, y), w, v, 1e-5),
                   [((m, k), dtype), ((m, k), dtype), ((k,), dtype), ((k,), dtype)],
                   lambda x, y, w, v: nn.layer_norm(x + y, x.shape[-1:], w, v, 1e-5))  # fmt: skip


def _add_rms(b: Builder, x: Value, y: Value, w: Value) -> tuple[Value, Value]:
    total = b(ops.Add, x, y)
    return total, b(ops.RmsNorm, total, w, 1e-5)


def rows() -> Iterator[Case]:
    for m, k in ((1, 32000), (1, 152000), (4, 32000)):
        yield Case(f"argmax {m}x{k}", lambda b, x: b(ops.ArgMax, x, 1), [((m, k), "f32")],
                   lambda x: x.argmax(-1))  # fmt: skip
    for m, k in ((128, 128), (1536, 128), (16, 32000)):
        yield Case(f"softmax {m}x{k}", lambda b, x: b(ops.Softmax, x, 1), [((m, k), "f32")],
                   lambda x: x.softmax(-1))  # fmt: skip


def quant() -> Iterator[Case]:
    for m, k, dtype in ((1, 576, "bf16"), (1, 2048, "bf16"), (1, 5632, "bf16"), (1, 2048, "f32"), (128, 1536, "f32"),
                        (512, 2048, "bf16"), (512, 5632, "bf16")):  # fmt: skip
        for group in (0, 32, 128):
            if k % max(group, 1) == 0:
                yield Case(f"quantize {m}x{k} {dtype} group {group}",
                           lambda b, x, g=group: b.add_all(ops.Quantize(x, g)), [((m, k), dtype)])  # fmt: skip
    for m, k, dtype in ((1, 576, "bf16"), (1, 2048, "bf16"), (1, 2048, "f32"), (512, 2048, "bf16")):
        yield Case(f"rms_norm+quantize {m}x{k} {dtype}",
                   lambda b, x, w: b.add_all(ops.Quantize(b(ops.RmsNorm, x, w, 1e-5))),
                   [((m, k), dtype), ((k,), dtype)])  # fmt: skip
    for m, k, dtype in ((1, 2048, "f32"), (128, 384, "f32")):
        yield Case(f"layer_norm+quantize {m}x{k} {dtype}",
                   lambda b, x, w, v: b.add_all(ops.Quantize(b(ops.LayerNorm, x, w, v, 1e-5))),
                   [((m, k), dtype), ((k,), dtype), ((k,), dtype)])  # fmt: skip
    for m, k, dtype in ((1, 5632, "bf16"), (512, 5632, "bf16")):
        yield Case(f"silu*up+quantize {m}x{k} {dtype}",
                   lambda b, x, y: b.add_all(ops.Quantize(b(ops.Mul, b(ops.Silu, x), y))),
                   [((m, k), dtype), ((m, k), dtype)])  # fmt: skip
    for m, codes in ((1, "i8"), (512, "i8"), (1, "i4"), (512, "i4")):
        yield Case(f"embedding of {codes} {m}x2048",
                   lambda b, i, c, s: b(ops.Embedding, i, b(ops.Dequantize, c, s, dtype=DType.bf16)),
                   [((1, m), "i64"), ((32000, 2048), codes), ((32000, 16), "f16")])  # fmt: skip


def ropes() -> Iterator[Case]:
    for m, heads, dim, dtype in ((1, 9, 64, "bf16"), (1, 32, 64, "bf16"), (512, 9, 64, "bf16"), (512, 32, 64, "bf16"),
                                 (512, 32, 128, "bf16"), (512, 9, 64, "f32")):  # fmt: skip
        def build(b: Builder, x: Value, cos: Value, sin: Value, m: int = m, heads: int = heads, dim: int = dim) -> Value:
            part = b(ops.Slice, x, (0, 0, 0), (1, m, heads * dim), (1, 1, 1))
            return b(ops.Rope, b(ops.Reshape, part, (1, m, heads, dim)), cos, sin)

        angles = ((1, m, dim), dtype)
        yield Case(f"rope {m}x{heads}x{dim} {dtype}", build, [((1, m, heads * dim * 2), dtype), angles, angles])


GROUPS = {"math": maths, "norms": norms, "rows": rows, "quant": quant, "rope": ropes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="native")
    parser.add_argument("--only", choices=GROUPS, action="append")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    target = parse_target(options.target)
    torch.set_num_threads(1)
    print(f"{target}, one thread", flush=True)
    for name in options.only or GROUPS:
        for case in GROUPS[name]():
            if options.case in case.name:
                measure(case, target)


if __name__ == "__main__":
    main()
