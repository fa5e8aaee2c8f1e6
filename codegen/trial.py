"""Compiled kernels run at full speed without a program: by the runtime's thread pool, from a library of many candidates.

``link_trials`` makes one library of them all. A ``Launcher`` has the pool, its threads pinned to processors, and makes of
a kernel and the memory it works on a ``Launch``, which is called so many times in a row.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.link import link
from tilewright.codegen.target import CpuTarget
from tilewright.ir import CodegenError, eval_dim
from tilewright.runtime.artifact import native_sources

TRIAL_KEY = "trial00000000000"
"""The key that candidates are compiled with: equal code is equal to the last byte, and their names are of one length."""

_MOST = 64  # dims and pointers of a kernel
_HEAD = 6  # numbers of a call before these
_SOURCE = """
#include "pool.h"
typedef struct { tw_task part; void (*kernel)(void); int64_t tasks, grain, last, first, a[MOST]; } call;
TW_EXPORT void tw_trial(tw_pool *pool, call *calls, int64_t copies, int64_t at, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        call *c = calls + (at + i) % copies;
        c->first = 0;
        tw_pool_run(pool, c->part, c, c->tasks, c->grain);
        if (!c->last) continue;
        c->first = c->tasks;
        tw_pool_run(pool, c->part, c, c->last, 1);
    }
}
"""


def _part(count: int) -> str:
    """The function that calls a kernel of ``count`` dims and pointers for a range of its tasks."""
    types, values = ", int64_t" * count, "".join(f", c->a[{i}]" for i in range(count))
    return (
        f"TW_EXPORT void tw_part{count}(int64_t begin, int64_t end, void *arg) {{ const call *c = arg; "
        f"((void (*)(int64_t, int64_t{types}))c->kernel)(c->first + begin, c->first + end{values}); }}"
    )


def link_trials(codes: Sequence[KernelCode], folder: Path, target: CpuTarget) -> tuple[Path, list[str]]:
    """One library with the kernels of ``codes``, all made with ``TRIAL_KEY``, and the name of each in it.

    Raises CodegenError when the linker will not have them.
    """
    objects, names = [], []
    for i, code in enumerate(codes):
        name = f"{code.symbol[:-8]}{i:08}"
        path = folder / f"{i}.o"
        # Names of one length: the object's table of names stays as it is but for the bytes of this one.
        path.write_bytes(code.object.replace(code.symbol.encode(), name.encode()))
        objects.append(path)
        names.append(name)
    out = folder / "trials.so"
    link(folder, objects, [], [], out, target)
    for path in objects:
        path.unlink()
    return out, names


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tilewright-trial-")


@functools.cache
def shim(target: CpuTarget) -> Path:
    """A library with the pool and what calls kernels from it; compiled once a process."""
    source, out = Path(_folder().name, "trial.c"), Path(_folder().name, "trial.so")
    source.write_text("\n".join([_SOURCE.replace("MOST", str(_MOST)), *map(_part, range(_MOST + 1))]))
    pool = [p for p in native_sources() if p.name == "pool.c"]
    link(Path(_folder().name), [], [source, *pool], sorted({p.parent for p in native_sources()}), out, target)
    return out


class Launcher:
    """A pool of ``threads`` threads, each on a processor of its own where there are as many."""

    def __init__(self, library: Path, threads: int) -> None:
        self.shim = ctypes.CDLL(str(library))
        self.shim.tw_pool_create.restype = ctypes.c_void_p
        self.shim.tw_trial.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3
        self.shim.tw_trial.restype = None
        before = _threads()
        self.pool = self.shim.tw_pool_create(threads)
        if not self.pool:
            raise MemoryError(f"cannot make {threads} threads")
        _pin([0, *sorted(_threads() - before)])

    def launch(
        self, library: str, name: str, code: KernelCode, dims: Mapping[str, int], pointers: Sequence[Sequence[int]]
    ) -> Launch:
        """Calls of the kernel ``name`` of ``library``; ``pointers`` are those of each copy of its memory."""
        opened = ctypes.CDLL(library)
        sizes = [dims[d] for d in code.dims]
        count = len(sizes) + len(pointers[0])
        if count > _MOST:
            raise CodegenError(f"{name} takes {count} sizes and pointers; at most {_MOST} can be called for a trial")
        head = [_address(self.shim, f"tw_part{count}"), _address(opened, name)]
        head += [eval_dim(n, dims) for n in (code.tasks, code.grain, code.last)]
        block = np.zeros((len(pointers), _HEAD + _MOST), np.int64)
        for row, given in zip(block, pointers):
            row[: _HEAD + count] = [*head, 0, *sizes, *given]
        return Launch(self, block, opened)


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


@dataclass
class Launch:
    """A kernel and its arguments: ``launch(n)`` runs it n times, each with the next copy of its memory.

    ``kept`` is what must stay while there are calls: the library, and memory that only the calls know.
    """

    launcher: Launcher
    block: np.ndarray
    kept: object = None
    at: int = 0

    def __call__(self, count: int) -> None:
        copies = len(self.block)
        self.launcher.shim.tw_trial(self.launcher.pool, self.block.ctypes.data, copies, self.at, count)
        self.at = (self.at + count) % copies


def _threads() -> set[int]:
    """The threads of this process, as the system numbers them; none where it does not say."""
    with suppress(OSError):
        return {int(name) for name in os.listdir("/proc/self/task")}
    return set()


def _pin(threads: Sequence[int]) -> None:
    """Put each thread (0 is the calling one) on a processor of its own, unless there are more threads than processors."""
    if sys.platform != "linux":
        return
    processors = sorted(os.sched_getaffinity(0))
    if len(threads) > len(processors):
        return
    for thread, processor in zip(threads, processors):
        with suppress(OSError):
            os.sched_setaffinity(thread, {processor})
