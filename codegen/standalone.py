"""One compiled kernel in this process, run on plain arrays: what bisect and tests compare with the interpreter."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tilewright.codegen.attention_pattern import KINDS
from tilewright.codegen.cache import cache_layout
from tilewright.codegen.emitters import choose, pack
from tilewright.codegen.kernel import Emitter
from tilewright.codegen.mlir.native import load
from tilewright.codegen.schedule import Schedule
from tilewright.codegen.target import CpuTarget
from tilewright.ir import Function, KVType, Value, eval_dim

Operand = Any
"""An array, or the pair (K, V) of a cache, each ``[B, length, heads, size]``."""


def aligned(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    """Zeros that start at a multiple of 64 bytes, as the runtime's buffers do."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def aligned_copy(array: np.ndarray) -> np.ndarray:
    out = aligned(array.shape, array.dtype)
    out[...] = array
    return out


class StandaloneKernel:
    """A kernel function compiled for this host: ``kernel(operands, dims)`` gives its results, operands unchanged.

    ``emitter`` and ``schedule`` are chosen by rule when left out. Raises CodegenError when no family can lower it.
    """

    def __init__(
        self, kernel: Function, target: CpuTarget, emitter: Emitter | None = None, schedule: Schedule | None = None
    ) -> None:
        emitter = emitter or choose(kernel, target)
        self.kernel, self.target = kernel, target
        self.code = emitter.emit(kernel, schedule or emitter.default_schedule(kernel, target), target, "kernel")
        self.run = load(self.code.object, "kernel")

    def __call__(self, operands: Sequence[Operand], dims: Mapping[str, int]) -> list[Operand]:
        """The results; the work is done in two ranges, as two threads would."""
        buffers: list[np.ndarray] = []
        caches: dict[Value, tuple[np.ndarray, np.ndarray]] = {}
        for i, (arg, value) in enumerate(zip(self.kernel.args, operands)):
            if isinstance(arg.type, KVType):
                caches[arg] = tuple(map(aligned_copy, cache_layout(arg.type, self.target).write(*value)))  # type: ignore[assignment]
                buffers += [*caches[arg], *map(aligned_copy, self.own(arg, dims))]
            else:
                buffers.append(aligned_copy(pack(value, self.code.packing.get(i, ""), arg.dtype)))
        outputs = {v: aligned([eval_dim(d, dims) for d in v.shape], v.dtype.np)
                   for v in self.kernel.returns if not isinstance(v.type, KVType)}  # fmt: skip
        scratch = [aligned([eval_dim(size, dims)], np.dtype(np.uint8)) for size in self.code.scratch]
        self.launch([*buffers, *outputs.values(), *scratch], dims)
        return [outputs[v] if v in outputs else self.cache(v, caches) for v in self.kernel.returns]

    def launch(self, buffers: Sequence[np.ndarray], dims: Mapping[str, int]) -> None:
        tasks, last = eval_dim(self.code.tasks, dims), eval_dim(self.code.last, dims)
        sizes = [ctypes.c_int64(dims[d]) for d in self.code.dims]
        pointers = [ctypes.c_void_p(b.ctypes.data) for b in buffers]
        kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * (2 + len(sizes)), *[ctypes.c_void_p] * len(pointers))
        run = ctypes.cast(self.run, kind)
        for begin, end in ((0, tasks // 2), (tasks // 2, tasks), (tasks, tasks + last)):
            run(begin, end, *sizes, *pointers)

    def own(self, cache: Value, dims: Mapping[str, int]) -> tuple[np.ndarray, ...]:
        """What sequences have beside their pages, as long as they have no tokens."""
        start = next(op.start for op in cache.users if isinstance(op, KINDS[1:]))
        return cache_layout(cache.cache, self.target).own(eval_dim(start.shape[0], dims))

    def cache(self, value: Value, caches: Mapping[Value, tuple[np.ndarray, np.ndarray]]) -> Operand:
        """A cache that the kernel changed in place, as plain arrays."""
        origin = value
        while origin not in caches:
            assert origin.owner is not None
            origin = next(v for v in origin.owner.operands if isinstance(v.type, KVType))
        return cache_layout(value.cache, self.target).read(*caches[origin])
