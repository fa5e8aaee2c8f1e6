"""The system's C compiler: it compiles the program and links kernels, program and thread pool into one library."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tilewright.codegen.target import CpuTarget, Target
from tilewright.ir import CodegenError


def compiler() -> str:
    """``$CC`` or the first of cc, gcc, clang on PATH; raises CodegenError when there is none."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    raise CodegenError("no C compiler was found; install gcc or clang, or name one in CC (running an artifact needs none)")


def target_flags(target: Target) -> list[str]:
    """What lets the C compiler use the vectors of ``target``, in the spelling of every gcc and clang of ten years.

    The host of a GPU is any x86-64.
    """
    if not isinstance(target, CpuTarget):
        return []
    wide = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")] if target.vector_bits == 512 else []
    return ["-mavx2", "-mfma", *wide, f"-mprefer-vector-width={target.vector_bits}"]


def link(
    folder: Path, objects: Sequence[Path], sources: Sequence[Path], includes: Sequence[Path], out: Path,
    target: Target,
) -> None:  # fmt: skip
    """Compile ``sources`` for ``target`` and link them with ``objects`` into the shared library ``out``.

    The library depends on libc alone. Raises CodegenError with what the compiler printed.
    """
    flags = [*_flags(target), *(f"-I{p}" for p in includes), "-shared", "-Wl,-z,noexecstack", "-Wl,-z,defs"]
    _run([compiler(), *flags, *map(str, [*sources, *objects]), "-o", str(out), "-lm"], folder)


def native_objects(folder: Path, sources: Sequence[Path], target: Target) -> list[Path]:
    """Objects of C files that are always the same, in ``folder``; what they include lies beside them.

    They are compiled once a process. Raises CodegenError as ``link`` does.
    """
    found = []
    for source in sources:
        found.append(folder / f"{source.stem}.native.o")
        found[-1].write_bytes(_object(compiler(), source, target))
    return found


@cache
def _object(compiler: str, source: Path, target: Target) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "native.o")
        _run([compiler, *_flags(target), "-c", str(source), "-o", str(out)], Path(folder))
        return out.read_bytes()


def _flags(target: Target) -> list[str]:
    return ["-O3", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-pthread", *target_flags(target)]


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CodegenError(f"{command[0]} failed with {done.returncode}:\n{done.stderr.strip()[-4000:]}")
