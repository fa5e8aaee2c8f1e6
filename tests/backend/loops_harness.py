"""Runs one kernel function natively, or as CUDA on an emulated device, and in the interpreter."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tests.cuda.emulator import Emulated, quick_compiler
from tilewright.codegen.cuda.loops import CudaLoopsEmitter
from tilewright.codegen.emitters import pack
from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.mlir import native
from tilewright.codegen.mlir.loops import LoopsEmitter
from tilewright.codegen.target import parse_target
from tilewright.ir import Builder, DType, Function, Module, Return, TensorType, Value, eval_dim, interpret, verify
from tilewright.ir.interpreter import bind_dims

EMITTER = LoopsEmitter()
CPUS = [parse_target("x86-64-v3")] + ([parse_target("native")] if parse_target("native").vector_bits == 512 else [])
CUDA = parse_target("cuda{arch=sm_80}")
TARGETS = [*CPUS, CUDA]
TOLERANCE = {"f64": 1e-12, "f32": 3e-6, "f16": 2e-3, "bf16": 1.6e-2}


def kernel_of(build: Callable[..., Value | Sequence[Value]], *types: tuple) -> Function:
    """A kernel over arguments of the given (shape, dtype); ``build(b, *args)`` gives the results."""
    kernel = Function("k", kind="kernel")
    args = [kernel.arg(f"a{i}", TensorType(tuple(shape), DType(dtype))) for i, (shape, dtype) in enumerate(types)]
    made = build(Builder(kernel), *args)
    kernel.append(Return(tuple(made) if isinstance(made, (list, tuple)) else (made,)))
    return kernel


class Native:
    """A compiled kernel, called as the program would: in chunks of tasks."""

    def __init__(self, kernel: Function, target=CPUS[-1], schedule=None) -> None:
        emitter = CudaLoopsEmitter() if target is CUDA else EMITTER
        reason = emitter.match(kernel, target)
        assert reason is None, reason
        self.kernel = kernel
        schedule = schedule or emitter.default_schedule(kernel, target)
        with quick_compiler():
            self.code: KernelCode = emitter.emit(kernel, schedule, target, "tw_k")
        self.device = Emulated(self.code) if self.code.device else None
        self.function = None if self.device else native.load(self.code.object, "tw_k")

    def __call__(self, inputs: Sequence[np.ndarray], cuts: int = 3, dims: Mapping[str, int] | None = None
                 ) -> list[np.ndarray]:  # fmt: skip
        """The results; ``dims`` are sizes that no input tells."""
        dims = {**(dims or {}), **bind_dims(self.kernel.args, inputs)}
        args = [_aligned(a, v.dtype) for a, v in zip(inputs, self.kernel.args)]
        outs = [_Guarded(v, dims) for v in self.kernel.returns]
        guards = [o.surroundings() for o in outs]
        buffers = [*args, *(o.array for o in outs)]
        if self.device:
            self.device(buffers, dims)
        else:
            self._in_chunks(buffers, cuts, dims)
        for out, guard in zip(outs, guards):
            assert out.surroundings() == guard, "wrote past the end"
        return [o.array for o in outs]

    def _in_chunks(self, buffers: Sequence[np.ndarray], cuts: int, dims: Mapping[str, int]) -> None:
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in buffers]
        tasks = eval_dim(self.code.tasks, dims)
        assert eval_dim(self.code.grain, dims) >= 1
        edges = sorted({tasks * i // cuts for i in range(cuts + 1)})
        for begin, end in itertools.pairwise(edges):
            numbers = [ctypes.c_int64(n) for n in (begin, end, *(dims[name] for name in self.code.dims))]
            self.function(*numbers, *pointers)


class _Guarded:
    """An array between guard bytes."""

    def __init__(self, value: Value, dims: Mapping[str, int]) -> None:
        shape = tuple(eval_dim(d, dims) for d in value.shape)
        size = int(np.prod(shape)) * value.dtype.size
        raw = np.full(size + 256, 0xA5, np.uint8)
        start = -raw.ctypes.data % 64 + 64
        self.raw, self.start, self.stop = raw, start, start + size
        self.array = raw[start:start + size].view(value.dtype.np).reshape(shape)

    def surroundings(self) -> bytes:
        return self.raw[:self.start].tobytes() + self.raw[self.stop:].tobytes()


def _aligned(a: np.ndarray, dtype: DType) -> np.ndarray:
    """A copy as the program passes it: 64-byte aligned, codes of few bits several a byte."""
    a = pack(a, "", dtype)
    raw = np.empty(a.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start:start + a.nbytes].view(a.dtype).reshape(a.shape)
    out[...] = a
    return out


def expected(kernel: Function, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    module = Module("m", dims={name: (1, 1 << 20) for name in kernel.symbols()})
    module.add(kernel)
    verify(module)
    return interpret(module, "k", list(inputs))


def close(got: np.ndarray, want: np.ndarray, dtype: DType, tolerance: float | None = None) -> None:
    """Equal up to rounding of ``dtype``, relative to the largest element too."""
    assert got.shape == want.shape
    if not dtype.is_float:
        np.testing.assert_array_equal(got, want)
        return
    g, w = got.astype(np.float64), want.astype(np.float64)
    tol = tolerance or TOLERANCE[dtype.value]
    np.testing.assert_allclose(g, w, rtol=tol, atol=tol * max(1.0, float(np.max(np.abs(w), where=np.isfinite(w),
                                                                              initial=0.0))))


def check(native_kernel: Native, inputs: Sequence[np.ndarray], tolerance: float | None = None) -> None:
    kernel = native_kernel.kernel
    for got, want, value in zip(native_kernel(inputs), expected(kernel, inputs), kernel.returns):
        close(got, want, value.dtype, tolerance)


def random_array(rng: np.random.Generator, shape: Sequence[int], dtype: str, low: float = -3, high: float = 3):
    kind = DType(dtype)
    if kind is DType.bool:
        return rng.random(shape) < 0.5
    if kind.is_float:
        return rng.uniform(low, high, shape).astype(kind.np)
    if kind.is_narrow_float:
        codes = rng.integers(0, 1 << kind.bits, shape).astype(np.uint8)
        return (codes % 16 + 118 if kind is DType.f8e8m0 else codes).astype(np.uint8).view(kind.np)
    if kind.bits < 8:
        low = -(1 << (kind.bits - 1)) if dtype.startswith("i") else 0
        return rng.integers(low, low + (1 << kind.bits), shape).astype(kind.np)
    return rng.integers(0 if kind is DType.u8 else int(low) * 3, int(high) * 3 + 1, shape).astype(kind.np)
