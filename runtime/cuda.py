"""An NVIDIA GPU through the driver that comes with it: contexts, memory, streams, modules, graphs. Nothing is linked.

The primary context is used, which is the one that PyTorch and others use: pointers mean the same to all of them.
"""

from __future__ import annotations

import ctypes
import math
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tilewright.runtime.driver import OUT_OF_MEMORY, Address, Pointer, Size, driver
from tilewright.runtime.errors import DeviceError, UnsupportedHostError

LIBRARY = "libcuda.so.1"
_MAJOR, _MINOR, _SHARED_A_BLOCK, _SMS, _L2 = 75, 76, 97, 16, 38  # CUdevice_attribute
_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_NON_BLOCKING = 1
_SMALL = 48 << 10  # shared memory that every kernel may have
_PIECE = 256 << 20


class Device:
    """One GPU. ``capability`` is its compute capability, ``sms`` the number of its multiprocessors.

    ``library`` is the driver's, where it has another name than usual.
    """

    def __init__(self, ordinal: int = 0, library: str | None = None) -> None:
        self.driver = driver(library or LIBRARY)
        count = ctypes.c_int()
        self.driver("cuDeviceGetCount", ctypes.byref(count))
        if not 0 <= ordinal < count.value:
            raise UnsupportedHostError(f"there is no GPU {ordinal}; the driver sees {count.value}")
        handle, self.context, name = ctypes.c_int(), Pointer(), ctypes.create_string_buffer(256)
        self.driver("cuDeviceGet", ctypes.byref(handle), ordinal)
        self.driver("cuDeviceGetName", name, 256, handle)
        self.driver("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), handle)
        self.ordinal, self.handle, self.name = ordinal, handle, name.value.decode()
        self.capability = self.attribute(_MAJOR), self.attribute(_MINOR)
        self.sms, self.shared_bytes = self.attribute(_SMS), self.attribute(_SHARED_A_BLOCK)
        self.l2_bytes = self.attribute(_L2)

    def attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self.driver("cuDeviceGetAttribute", ctypes.byref(value), number, self.handle)
        return value.value

    @property
    def version(self) -> str:
        """Of CUDA that the driver offers."""
        value = ctypes.c_int()
        self.driver("cuDriverGetVersion", ctypes.byref(value))
        return f"{value.value // 1000}.{value.value % 1000 // 10}"

    def use(self) -> None:
        """Make this GPU the one that the calling thread talks to."""
        self.driver("cuCtxSetCurrent", self.context)

    def check_arch(self, arch: str, where: str) -> None:
        """Raise UnsupportedHostError when code for ``arch``, as ``sm_90a``, does not run here."""
        match = re.fullmatch(r"sm_(\d+)(\d)([a-z]?)", arch)
        major, minor = self.capability
        if match and int(match[1]) == major and (int(match[2]) == minor if match[3] else int(match[2]) <= minor):
            return
        raise UnsupportedHostError(f"{where}: compiled for {arch}, and this GPU, {self.name}, has compute capability "
                                   f"{major}.{minor}; compile for cuda{{arch=sm_{major}{minor}}}", (arch,))

    def settle(self) -> None:
        """Wait for what was asked for on the default stream, which other streams do not wait for."""
        self.use()
        self.driver("cuStreamSynchronize", None)

    def read(self, address: int, out: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Copy from the GPU's memory into ``out``, which is given back."""
        self.use()
        self.driver("cuMemcpyDtoHAsync_v2", out.ctypes.data, address, out.nbytes, None)
        self.settle()
        return out

    def free(self) -> tuple[int, int]:
        """Bytes that are free, and bytes in all."""
        free, total = Size(), Size()
        self.driver("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value


class Memory:
    """``count`` bytes on a GPU, given back when the object goes. Raises MemoryError with what there is."""

    def __init__(self, device: Device, count: int, what: str) -> None:
        device.use()
        address, size = Address(), max(count, 1)
        code = device.driver.library.cuMemAlloc_v2(ctypes.byref(address), size)
        if code == OUT_OF_MEMORY:
            free, total = device.free()
            raise MemoryError(f"{what}: {count} bytes on {device.name}, of whose {total} bytes {free} are free")
        if code:
            raise DeviceError(f"cannot allocate {count} bytes for {what}: {device.driver.text(code)}")
        self.device, self.bytes, self.address = device, count, address.value
        self.free = weakref.finalize(self, _free, device, "cuMemFree_v2", address.value)
        self.free.atexit = False  # the driver may have ended before

    def zero(self) -> None:
        self.device.use()
        self.device.driver("cuMemsetD8_v2", self.address, 0, max(self.bytes, 1))
        self.device.settle()

    def fill(self, source: int, count: int) -> None:
        """Copy from the host's memory; done when it returns."""
        self.device.use()
        for at in range(0, count, _PIECE):
            self.device.driver("cuMemcpyHtoD_v2", self.address + at, source + at, min(_PIECE, count - at))
        self.device.settle()


class _Pinned:
    """Memory of the host that the GPU reads and writes by itself; an array over it keeps it."""

    def __init__(self, device: Device, size: int) -> None:
        device.use()
        address = Pointer()
        device.driver("cuMemAllocHost_v2", ctypes.byref(address), max(size, 1))
        self.__array_interface__ = {"version": 3, "shape": (size,), "typestr": "|u1", "data": (address.value, False)}
        self.free = weakref.finalize(self, _free, device, "cuMemFreeHost", address.value or 0)
        self.free.atexit = False


def pinned(device: Device, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """An array, with any contents, that copies to and from the GPU run through without a stop."""
    return np.asarray(_Pinned(device, math.prod(shape) * dtype.itemsize)).view(dtype).reshape(shape)


def _free(device: Device, function: str, address: int) -> None:
    library = device.driver.library
    library.cuCtxSetCurrent(device.context)
    getattr(library, function)(address)


class Stream:
    """Work of a GPU in order."""

    def __init__(self, device: Device) -> None:
        device.use()
        self.device, handle = device, Pointer()
        device.driver("cuStreamCreate", ctypes.byref(handle), _NON_BLOCKING)
        self.handle = handle.value or 0
        self.close = weakref.finalize(self, _free, device, "cuStreamDestroy_v2", self.handle)
        self.close.atexit = False

    def to_device(self, address: int, array: np.ndarray[Any, Any]) -> None:
        self.device.driver("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self.handle)

    def to_host(self, array: np.ndarray[Any, Any], address: int) -> None:
        self.device.driver("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self.handle)

    def copy(self, to: int, begin: int, count: int) -> None:
        """Copy bytes from one place on the GPU to another."""
        self.device.driver("cuMemcpyDtoDAsync_v2", to, begin, count, self.handle)

    def fill(self, address: int, byte: int, count: int) -> None:
        """Set ``count`` bytes."""
        self.device.driver("cuMemsetD8Async", address, byte, count, self.handle)

    def launch(self, function: int, grid: Sequence[int], block: int, shared: int, parameters: Parameters) -> None:
        """Run a kernel."""
        given = parameters.pointers
        self.device.driver("cuLaunchKernel", function, *grid, block, 1, 1, shared, self.handle, given, None)

    def wait(self) -> None:
        """Until all that was asked for is done. Raises DeviceError when a kernel failed."""
        self.device.driver("cuStreamSynchronize", self.handle)

    def record(self, launch: Callable[[], None]) -> Graph:
        """What ``launch`` puts on this stream, as a graph; nothing runs."""
        driver, graph = self.device.driver, Pointer()
        driver("cuStreamBeginCapture_v2", self.handle, _THREAD_LOCAL)
        try:
            launch()
        finally:
            driver("cuStreamEndCapture", self.handle, ctypes.byref(graph))
        try:
            return Graph(self.device, graph)
        finally:
            driver("cuGraphDestroy", graph)


class Graph:
    """Launches that are one for the host."""

    def __init__(self, device: Device, graph: ctypes.c_void_p) -> None:
        self.device, handle = device, Pointer()
        device.driver("cuGraphInstantiateWithFlags", ctypes.byref(handle), graph, 0)
        self.handle = handle.value or 0
        self.close = weakref.finalize(self, _free, device, "cuGraphExecDestroy", self.handle)
        self.close.atexit = False

    def run(self, stream: Stream) -> None:
        self.device.driver("cuGraphLaunch", self.handle, stream.handle)


class Modules:
    """Cubins on a GPU. They stay loaded as long as the process has its context."""

    def __init__(self, device: Device) -> None:
        self.device, self._loaded = device, dict[bytes, int]()

    def function(self, image: bytes, symbol: str, shared: int) -> int:
        """A function of a cubin, allowed ``shared`` bytes of dynamic shared memory. Raises DeviceError."""
        self.device.use()
        driver = self.device.driver
        if image not in self._loaded:
            module = Pointer()
            driver("cuModuleLoadData", ctypes.byref(module), image)
            self._loaded[image] = module.value or 0
        function = Pointer()
        driver("cuModuleGetFunction", ctypes.byref(function), self._loaded[image], symbol.encode())
        if shared > _SMALL:
            driver("cuFuncSetAttribute", function, _DYNAMIC_SHARED, shared)
        return function.value or 0


class Timer:
    """Seconds between two points of a stream."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.device = stream, stream.device
        self.events = [self._event() for _ in range(2)]

    def _event(self) -> int:
        event = Pointer()
        self.device.driver("cuEventCreate", ctypes.byref(event), 0)
        weakref.finalize(self, _free, self.device, "cuEventDestroy_v2", event.value or 0).atexit = False
        return event.value or 0

    def start(self) -> None:
        self.device.driver("cuEventRecord", self.events[0], self.stream.handle)

    def stop(self) -> None:
        self.device.driver("cuEventRecord", self.events[1], self.stream.handle)

    def seconds(self) -> float:
        """From start to stop; waits until the stream is there."""
        self.device.driver("cuEventSynchronize", self.events[1])
        milliseconds = ctypes.c_float()
        self.device.driver("cuEventElapsedTime", ctypes.byref(milliseconds), *self.events)
        return milliseconds.value / 1e3


def pointers(addresses: Sequence[int]) -> Any:
    """Addresses as native code takes them."""
    return (Pointer * max(1, len(addresses)))(*addresses)


class Parameters:
    """What a kernel takes: integers of 64 bits (addresses too) and doubles. ``pointers``, to each, are for a launch."""

    def __init__(self, values: Sequence[int | float]) -> None:
        self._values = [ctypes.c_double(v) if isinstance(v, float) else ctypes.c_int64(v) for v in values]
        self.pointers = pointers([ctypes.addressof(v) for v in self._values])
