"""One CUDA kernel on the emulated device, run on plain arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.cuda.emulator import Emulated, quick_compiler
from tilewright.codegen.cache import cache_layout
from tilewright.codegen.kernel import Emitter
from tilewright.codegen.schedule import Schedule
from tilewright.codegen.target import parse_target
from tilewright.ir import Function, KVType, eval_dim

_GUARD = 256
_UNTOUCHED = 0xA5


class Buffer:
    """Memory for one array, aligned, between bytes that nobody may change."""

    def __init__(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self.raw = np.full(size + 2 * _GUARD, _UNTOUCHED, np.uint8)
        self.start = -self.raw.ctypes.data % 64 + 64
        self.stop = self.start + size
        self.array = self.raw[self.start : self.stop].view(dtype).reshape(shape)

    @classmethod
    def of(cls, array: np.ndarray) -> Buffer:
        made = cls(array.shape, array.dtype)
        made.array[...] = array
        return made

    def check(self) -> None:
        around = (self.raw[: self.start], self.raw[self.stop :])
        assert all((part == _UNTOUCHED).all() for part in around), "wrote outside of a buffer"


@dataclass
class DeviceCache:
    """A cache in the layout of the device, that kernels change in place."""

    type: KVType
    target: str
    parts: tuple[Buffer, Buffer]

    @classmethod
    def of(cls, type: KVType, target: str, value: tuple[np.ndarray, np.ndarray]) -> DeviceCache:
        k, v = cache_layout(type, parse_target(target)).write(*value)
        return cls(type, target, (Buffer.of(k), Buffer.of(v)))

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """K and V, ``[B, length, heads, size]``."""
        return cache_layout(self.type, parse_target(self.target)).read(*(p.array for p in self.parts))


class EmulatedKernel:
    """A kernel function compiled by ``emitter``; called as `StandaloneKernel` is, but a cache may be a `DeviceCache`."""

    def __init__(
        self, kernel: Function, emitter: Emitter, target: str, schedule: Schedule | None = None, late: bool = False
    ) -> None:
        device = parse_target(target)
        reason = emitter.match(kernel, device)
        assert reason is None, reason
        self.kernel, self.target = kernel, target
        self.schedule = schedule or emitter.default_schedule(kernel, device)
        with quick_compiler():
            self.code = emitter.emit(kernel, self.schedule, device, "kernel")
        self.run = Emulated(self.code, late)

    def __call__(self, operands: Sequence[Any], dims: Mapping[str, int]) -> list[Any]:
        buffers, caches = [], []
        for arg, value in zip(self.kernel.args, operands):
            if isinstance(arg.type, KVType):
                caches.append(value if isinstance(value, DeviceCache) else DeviceCache.of(arg.type, self.target, value))
                buffers += caches[-1].parts
            else:
                buffers.append(Buffer.of(value))
        outputs = {v: Buffer([eval_dim(d, dims) for d in v.shape], v.dtype.np)
                   for v in self.kernel.returns if not isinstance(v.type, KVType)}  # fmt: skip
        scratch = [Buffer([eval_dim(size, dims)], np.dtype(np.uint8)) for size in self.code.scratch]
        buffers += [*outputs.values(), *scratch]
        self.run([b.array for b in buffers], dims)
        for buffer in buffers:
            buffer.check()
        return [outputs[v].array if v in outputs else caches[0].read() for v in self.kernel.returns]
