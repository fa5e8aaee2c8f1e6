"""The library of NVIDIA's driver: the functions of it that are used, and its errors as exceptions."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from tilewright.runtime.errors import DeviceError, UnsupportedHostError

OUT_OF_MEMORY = 2

Pointer = ctypes.c_void_p
Address = ctypes.c_uint64
Size = ctypes.c_size_t
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDriverGetVersion": (Pointer,),
    "cuDeviceGetCount": (Pointer,),
    "cuDeviceGet": (Pointer, ctypes.c_int),
    "cuDeviceGetName": (Pointer, ctypes.c_int, ctypes.c_int),
    "cuDeviceGetAttribute": (Pointer, ctypes.c_int, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (Pointer, ctypes.c_int),
    "cuCtxSetCurrent": (Pointer,),
    "cuMemGetInfo_v2": (Pointer, Pointer),
    "cuMemAlloc_v2": (Pointer, Size),
    "cuMemFree_v2": (Address,),
    "cuMemAllocHost_v2": (Pointer, Size),
    "cuMemFreeHost": (Pointer,),
    "cuMemcpyHtoD_v2": (Address, Pointer, Size),
    "cuMemcpyHtoDAsync_v2": (Address, Pointer, Size, Pointer),
    "cuMemcpyDtoHAsync_v2": (Pointer, Address, Size, Pointer),
    "cuMemcpyDtoDAsync_v2": (Address, Address, Size, Pointer),
    "cuMemsetD8_v2": (Address, ctypes.c_ubyte, Size),
    "cuMemsetD8Async": (Address, ctypes.c_ubyte, Size, Pointer),
    "cuModuleLoadData": (Pointer, ctypes.c_char_p),
    "cuModuleGetFunction": (Pointer, Pointer, ctypes.c_char_p),
    "cuFuncSetAttribute": (Pointer, ctypes.c_int, ctypes.c_int),
    "cuLaunchKernel": (Pointer, *[ctypes.c_uint] * 7, Pointer, Pointer, Pointer),
    "cuStreamCreate": (Pointer, ctypes.c_uint),
    "cuStreamDestroy_v2": (Pointer,),
    "cuStreamSynchronize": (Pointer,),
    "cuStreamBeginCapture_v2": (Pointer, ctypes.c_int),
    "cuStreamEndCapture": (Pointer, Pointer),
    "cuGraphInstantiateWithFlags": (Pointer, Pointer, ctypes.c_uint64),
    "cuGraphLaunch": (Pointer, Pointer),
    "cuGraphDestroy": (Pointer,),
    "cuGraphExecDestroy": (Pointer,),
    "cuEventCreate": (Pointer, ctypes.c_uint),
    "cuEventRecord": (Pointer, Pointer),
    "cuEventSynchronize": (Pointer,),
    "cuEventElapsedTime": (Pointer, Pointer, Pointer),
    "cuEventDestroy_v2": (Pointer,),
    "cuGetErrorName": (ctypes.c_int, Pointer),
    "cuGetErrorString": (ctypes.c_int, Pointer),
}


class Driver:
    """The driver's functions. Raises UnsupportedHostError when there is no driver, or it finds no GPU."""

    def __init__(self, name: str) -> None:
        try:
            self.library = ctypes.CDLL(name)
        except OSError as error:
            raise UnsupportedHostError(f"no CUDA driver ({error}); install NVIDIA's, or compile for a CPU") from None
        for function, types in _FUNCTIONS.items():
            try:
                found = getattr(self.library, function)
            except AttributeError:
                raise UnsupportedHostError(f"the CUDA driver {name} has no {function}; update it") from None
            found.argtypes, found.restype = types, ctypes.c_int
        if code := self.library.cuInit(0):
            raise UnsupportedHostError(f"the CUDA driver finds no GPU that it can use: {self.text(code)}")

    def __call__(self, function: str, *arguments: Any) -> None:
        """Call a function of the driver. Raises DeviceError with its name, and MemoryError when memory is out."""
        if code := getattr(self.library, function)(*arguments):
            if code == OUT_OF_MEMORY:
                raise MemoryError(f"{function}: the GPU has no more memory")
            raise DeviceError(f"{function} fails: {self.text(code)}")

    def address(self, function: str) -> int:
        """Where a function of the driver is, for native code to call."""
        return ctypes.cast(getattr(self.library, function), Pointer).value or 0

    def text(self, code: int) -> str:
        """An error as the driver names and describes it."""
        parts = []
        for function in ("cuGetErrorName", "cuGetErrorString"):
            found = ctypes.c_char_p()
            getattr(self.library, function)(code, ctypes.byref(found))
            parts.append((found.value or b"?").decode(errors="replace"))
        return f"{parts[0]} ({parts[1]})"


@functools.cache
def driver(name: str) -> Driver:
    """The driver of this process."""
    return Driver(name)
