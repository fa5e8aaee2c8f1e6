"""CUDA C -> cubin, by NVIDIA's run-time compiler: a library of its own, that needs neither a toolkit nor a GPU."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from tilewright.codegen.cuda.target import CudaTarget
from tilewright.ir import CodegenError

PACKAGE = "nvidia-cuda-nvrtc-cu12"
"""Version 12: drivers from 525 on load its cubins, those of CUDA 13 too."""
_OPTIONS = ("--std=c++17", "--ptxas-options=-v", "--extra-device-vectorization", "-default-device")
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


@dataclass(frozen=True)
class Cubin:
    """Compiled functions. ``resources`` by function: ``registers`` a thread, ``spills`` and ``shared`` in bytes."""

    image: bytes
    resources: dict[str, dict[str, int]]


def prelude() -> str:
    """The CUDA C that all kernels begin with."""
    return Path(__file__).with_name("prelude.cuh").read_text()


def compile_source(source: str, target: CudaTarget) -> Cubin:
    """The cubin of ``source``, which is put behind `prelude`. Raises CodegenError with what the compiler said."""
    library, program = nvrtc(), ctypes.c_void_p()
    text = (prelude() + source).encode()
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), text, b"kernel.cu", 0, None, None))
    try:
        options = [f"--gpu-architecture={target.arch}".encode(), *(o.encode() for o in _OPTIONS)]
        failed = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        log = _read(library, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if failed:
            raise CodegenError(f"the CUDA compiler refuses a kernel for {target}:\n{log[:4000]}")
        return Cubin(_read(library, program, "CUBIN"), resources(log))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def resources(log: str) -> dict[str, dict[str, int]]:
    """What the assembler says that each function uses."""
    found: dict[str, dict[str, int]] = {}
    name = ""
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            name = match[1]
            found[name] = {"registers": 0, "spills": 0, "shared": 0}
        elif name and (match := _SPILLS.search(line)):
            found[name]["spills"] = int(match[2])
        elif name and (match := _USED.search(line)):
            found[name] |= {"registers": int(match[1]), "shared": int(match[2] or 0)}
    return found


@cache
def nvrtc() -> ctypes.CDLL:
    """The compiler's library. Raises CodegenError when it is not installed."""
    try:
        files = metadata.files(PACKAGE) or []
        path = next(Path(str(f.locate())) for f in files if f.name.startswith("libnvrtc.so."))
        library = ctypes.CDLL(str(path))
    except (metadata.PackageNotFoundError, StopIteration, OSError) as error:
        raise CodegenError(f"no CUDA compiler ({error}); pip install 'tilewright[cuda]'") from None
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _read(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    data = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, data))
    return data.raw


def _check(library: ctypes.CDLL, code: int) -> None:
    if code:
        raise CodegenError(f"the CUDA compiler fails: {library.nvrtcGetErrorString(code).decode()}")
