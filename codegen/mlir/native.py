"""Load compiled kernels into this process and call them: for tests, benchmarks and tuning.

Not part of an artifact: there the kernels are linked once, together with the program that calls them.
"""

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tilewright.codegen.link import compiler
from tilewright.codegen.mlir.builder import Kernel
from tilewright.codegen.mlir.lower import compile_kernel


class NativeKernel:
    """A callable kernel: ``kernel(begin, end, dims, arrays)``. The arrays' memory is used in place."""

    def __init__(self, kernel: Kernel) -> None:
        self._function = load(compile_kernel(kernel), kernel.name)

    @property
    def address(self) -> int:
        """Where the function is in memory."""
        return ctypes.cast(self._function, ctypes.c_void_p).value or 0

    def __call__(self, begin: int, end: int, dims: Sequence[int], arrays: Sequence[np.ndarray | None]) -> None:
        numbers = [ctypes.c_int64(n) for n in (begin, end, *dims)]
        self._function(*numbers, *(ctypes.c_void_p(None if a is None else a.ctypes.data) for a in arrays))

    def bind(self, begin: int, end: int, dims: Sequence[int], arrays: Sequence[np.ndarray | None]):
        """A zero-argument callable with everything converted already, for timing; it keeps the arrays alive."""
        numbers = [ctypes.c_int64(n) for n in (begin, end, *dims)]
        pointers = [ctypes.c_void_p(None if a is None else a.ctypes.data) for a in arrays]
        function, arguments = self._function, (*numbers, *pointers)
        return lambda kept=tuple(arrays): function(*arguments)


def load(code: bytes, name: str) -> Any:
    """The function ``name`` of object code, for good. By way of the C compiler linking takes ten times as long."""
    with tempfile.TemporaryDirectory(prefix="tilewright-") as folder:
        source, library = Path(folder, "kernel.o"), Path(folder, "kernel.so")
        source.write_bytes(code)
        subprocess.run([shutil.which("ld") or compiler(), "-shared", "-o", library, source, "-lm"], check=True)
        function = getattr(ctypes.CDLL(str(library)), name)
    function.restype = None
    return function


def numpy_dtype(dtype: str) -> np.dtype:
    """The numpy dtype of one of our dtype names."""
    names = {"u8": "uint8", "bool": "bool", "bf16": ml_dtypes.bfloat16}
    return np.dtype(names.get(dtype) or {"f": "float", "i": "int"}[dtype[0]] + dtype[1:])


def aligned(shape: int | Sequence[int], dtype: str, fill: float | None = 0) -> np.ndarray:
    """An array whose memory starts on a cache line, as the runtime's buffers do; ``fill=None`` leaves it unset."""
    kind = numpy_dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    array = raw[start:start + size].view(kind).reshape(shape)
    if fill is not None:
        array[...] = fill
    return array
