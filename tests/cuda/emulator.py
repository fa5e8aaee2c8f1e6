"""CUDA kernels run without a GPU: their C compiled for this CPU, with a device in C++ around it."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tilewright.codegen.cuda import compile as cuda_compile
from tilewright.codegen.cuda.compile import prelude
from tilewright.codegen.kernel import DeviceCode, KernelCode
from tilewright.ir import eval_dim

HERE = Path(__file__).parent
COMPILE = ("g++", "-std=c++17", "-O1", "-w", "-fPIC", "-ffp-contract=off")


def quick_compiler() -> AbstractContextManager[Any]:
    """The device's compiler without optimizations, which take most of its time: that it takes the C shows all the same."""
    return mock.patch.object(cuda_compile, "_OPTIONS", (*cuda_compile._OPTIONS, "--Ofast-compile=mid"))


def translation(device: DeviceCode) -> str:
    """C++ of a kernel's functions, and ``emu_<symbol>(gx, gy, gz, threads, params)`` for each."""
    text = ['#include "emulator.h"', prelude(), '#include "emulator_tail.h"', device.source]
    for name in dict.fromkeys(launch.symbol for launch in device.launches):
        text.append(f'extern "C" void emu_{name}(unsigned x, unsigned y, unsigned z, unsigned threads, void **params) {{ '
                    f"emu_run([](void **p) {{ emu_call({name}, p); }}, {{x, y, z}}, threads, params); }}")  # fmt: skip
    return "\n".join(text)


def library(device: DeviceCode, folder: Path, name: str = "kernel") -> Path:
    """The shared library of a kernel's functions."""
    source, out = folder / f"{name}.cpp", folder / f"{name}.so"
    source.write_text(translation(device))
    compile_cpp(source, out)
    return out


def compile_cpp(source: Path, out: Path, *more: str) -> None:
    """A shared library of a C++ file."""
    run([*COMPILE, "-shared", f"-I{headers().name}", f"-I{HERE}", *more, str(source), "-o", str(out)])


@cache
def headers() -> tempfile.TemporaryDirectory[str]:
    """A folder with the emulator's header compiled: reading it takes longer than most kernels."""
    folder: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory(prefix="tilewright-emulator-")
    run([*COMPILE, "-x", "c++-header", str(HERE / "emulator.h"), "-o", f"{folder.name}/emulator.h.gch"])
    return folder


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:6000]


class Emulated:
    """A compiled CUDA kernel, called with buffers as the program would pass them.

    While ``late`` asynchronous copies arrive when they are waited for, and threads take turns from the last on: a kernel
    that lacks a barrier or a wait gives other results than without.
    """

    def __init__(self, code: KernelCode, late: bool = False) -> None:
        assert code.device is not None
        self.code, self.device, self.late = code, code.device, late
        with tempfile.TemporaryDirectory() as folder:
            self.library = ctypes.CDLL(str(library(code.device, Path(folder))))

    def __call__(self, buffers: Sequence[np.ndarray], dims: Mapping[str, int]) -> None:
        """Run all launches on ``buffers``: arguments, results, scratch."""
        for switch in ("emu_late", "emu_backward"):
            ctypes.c_int.in_dll(self.library, switch).value = int(self.late)
        sizes = [ctypes.c_int64(dims[d]) for d in self.code.dims]
        pointers = [ctypes.c_void_p(b.ctypes.data) for b in buffers]
        params = (ctypes.c_void_p * (len(sizes) + len(pointers)))(*map(ctypes.addressof, [*sizes, *pointers]))
        for launch in self.device.launches:
            if launch.when is not None and not launch.when[1] <= eval_dim(launch.when[0], dims) <= launch.when[2]:
                continue
            grid = [eval_dim(d, dims) for d in launch.grid]
            if all(grid):
                assert launch.block <= 1024
                getattr(self.library, f"emu_{launch.symbol}")(*grid, launch.block, params)
