"""The native side: the C sources every artifact is linked with, and an artifact's opened library."""

from __future__ import annotations

import ctypes
import itertools
import weakref
from pathlib import Path
from typing import Any

from tilewright.runtime.errors import DamagedArtifactError

_opened = itertools.count(1)
_DIMS = ctypes.POINTER(ctypes.c_int64)
_POINTERS = ctypes.POINTER(ctypes.c_void_p)
_SAMPLE = (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_int64, ctypes.c_double,
           ctypes.c_double)  # fmt: skip
"""logits, dtype, count, temperature, top_k, top_p, number: see ``sampling.h``."""


def native_sources() -> list[Path]:
    """The C files to compile into kernels.so, for speed with ``-O3``; their headers lie beside them."""
    return [Path(__file__).with_name(name) for name in ("pool.c", "sampling.c")]


class Library:
    """An opened kernels.so, typed by the program ABI; unloaded when the last reference goes."""

    def __init__(self, descriptor: int, where: str, entries: list[str]) -> None:
        self._where = where
        try:
            self._cdll = ctypes.CDLL(_unique_name(descriptor) if Path("/proc/self/fd").exists() else where)
        except OSError as error:
            raise DamagedArtifactError(f"{where}: cannot be loaded ({error}); check that it was compiled for this "
                                       "system and that its file system is not mounted noexec") from error
        # No finalizer at exit: a daemon thread may still be inside.
        weakref.finalize(self, _unload, self._cdll._handle).atexit = False
        self.pool_create = self._function("tw_pool_create", ctypes.c_void_p, ctypes.c_int)
        self.pool_destroy = self._function("tw_pool_destroy", None, ctypes.c_void_p)
        self.sample = self._function("tw_sample", ctypes.c_int64, *_SAMPLE)
        self.run = {name: self._run_function(name) for name in entries}
        self.sizes = {name: self._function(f"tw_{name}_sizes", None, _DIMS, _DIMS) for name in entries}

    def _run_function(self, entry: str) -> Any:
        types = (ctypes.c_void_p, _DIMS, _POINTERS, _POINTERS, _POINTERS, ctypes.c_void_p, ctypes.c_void_p)
        return self._function(f"tw_{entry}", ctypes.c_int32, *types)

    def _function(self, symbol: str, result: Any, *arguments: Any) -> Any:
        try:
            function = getattr(self._cdll, symbol)
        except AttributeError as error:
            raise DamagedArtifactError(f"{self._where}: has no symbol {symbol}, which the manifest asks for; the two "
                                       "are not from one compilation. Compile or copy the artifact again") from error
        function.restype = result
        function.argtypes = arguments
        return function


def _unique_name(descriptor: int) -> str:
    """A path to the open file that was never used before in this process.

    The dynamic linker returns the library that it already has under a name without looking at the file, so neither
    the artifact's path (it may have been replaced) nor a descriptor's number (they come again) would do. ``//`` and
    ``/.`` between the parts spell a counter and change nothing else.
    """
    counter = "".join("/." if bit == "1" else "/" for bit in f"{next(_opened):b}")
    return f"/proc/self/fd{counter}/{descriptor}"


def _unload(handle: int) -> None:
    import _ctypes

    _ctypes.dlclose(handle)


