"""``tilewright.emit_bundle``: kernels of a model under many schedules, to be measured on a GPU machine.

Each distinct kernel is compiled with its default schedule and with some drawn from its space, and goes into a folder with
inputs and the interpreter's results. ``python -m tilewright.runtime.bundle run`` is the other half, for which a machine
needs no more than the core installation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tilewright.bundling_kernel import BundleFiles, KernelFiles
from tilewright.codegen.cuda.target import CudaTarget
from tilewright.codegen.schedule import Schedule
from tilewright.codegen.store import KernelStore, compiler_version, default_folder
from tilewright.codegen.target import parse_target
from tilewright.costmodel.search import RandomSearch
from tilewright.costmodel.workload import Task
from tilewright.ir import TilewrightError
from tilewright.runtime.artifact import ArtifactWriter
from tilewright.runtime.bundle.format import BUNDLE, Bundle
from tilewright.tuning import module_of
from tilewright.workloads import KernelTask, kernel_tasks

EACH = 16
"""Schedules of a kernel, on average, when no number is given."""
_READ, _COMPUTE, _LAUNCH = 2e12, 3e14, 2e-6
"""Bytes and operations a second, and seconds of the shortest kernel: how kernels compare with each other, roughly."""

Progress = Callable[[str, int, int], None]
"""Called as ``progress(kernel, done, total)``."""


@dataclass(frozen=True)
class Emitted:
    """What was written: the folder, its bytes, kernels, schedules, and those among them that the compiler refused."""

    path: Path
    bytes: int
    kernels: int
    schedules: int
    refused: int


def emit_bundle(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    out: str | os.PathLike[str],
    target: str,
    dynamic: Any = None,
    passes: str = "O2",
    max_length: int | None = None,
    dtype: str | None = None,
    task: str | None = None,
    sizes: Mapping[str, int] | None = None,
    trials: int | None = None,
    seed: int = 0,
    progress: Progress = lambda kernel, done, total: None,
) -> Emitted:
    """Write a bundle of the kernels that ``compile`` would make of a model for a GPU; no GPU is needed.

    ``model`` and what describes it are those of ``tilewright.compile``; an artifact's folder does, too. ``trials`` is the
    number of schedules of all kernels together, of which each gets its default and a share by the time that it should
    take; equal ``seed`` draws the same ones. Raises subclasses of TilewrightError, and ArtifactError when something else is
    at ``out``.
    """
    gpu = parse_target(target)
    if not isinstance(gpu, CudaTarget):
        raise TilewrightError(f"a bundle is for a GPU, and {gpu} is none; `tilewright tune` measures here for this machine")
    with ArtifactWriter(out, BUNDLE) as writer:
        module = module_of(model, args, kwargs, dynamic, passes, max_length, dtype, task, gpu)
        kernels = distinct(kernel_tasks(module, gpu, sizes))
        drawn = draw(kernels, gpu, trials, seed)
        files = BundleFiles(writer, gpu, KernelStore(default_folder()), seed)
        total = sum(map(len, drawn))
        for kernel, schedules in zip(kernels, drawn):
            KernelFiles(files, kernel).add(schedules, lambda name: progress(name, files.schedules, total))
        path = writer.commit(Bundle(gpu.text, compiler_version(), files.arrays, tuple(files.workloads)))
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return Emitted(path, size, len(kernels), total, files.refused)


def distinct(kernels: Sequence[KernelTask]) -> list[KernelTask]:
    """Equal kernels as one, which is called as often as all of them."""
    found: dict[tuple[str, tuple[tuple[str, int], ...]], KernelTask] = {}
    for kernel in kernels:
        key = (kernel.text, tuple(sorted(kernel.sizes.items())))
        before = found.get(key)
        found[key] = kernel if before is None else replace(before, frequency=before.frequency + kernel.frequency)
    return list(found.values())


def draw(kernels: Sequence[KernelTask], target: CudaTarget, trials: int | None, seed: int) -> list[list[Schedule]]:
    """Schedules of each kernel, its default first; ``trials`` of all, as far as their spaces have so many."""
    tasks = [kernel.task(target, 1) for kernel in kernels]
    searches = [RandomSearch(task, seed) for task in tasks]
    found: list[list[Any]] = [search.ask(1) for search in searches]
    open_ended = set(range(len(tasks)))
    left = (EACH * len(tasks) if trials is None else trials) - len(tasks)
    while left > 0 and open_ended:  # what small spaces leave goes to the others
        wanted = shares({i: expected_time(tasks[i]) for i in open_ended}, left)
        for i, count in wanted.items():
            more = searches[i].ask(count) if count else []
            found[i] += more
            left -= len(more)
            if len(more) < count:
                open_ended.discard(i)
    return found


def shares(weights: Mapping[int, float], count: int) -> dict[int, int]:
    """``count`` shared by weight, in whole numbers."""
    exact = {i: count * weight / sum(weights.values()) for i, weight in weights.items()}
    found = {i: int(share) for i, share in exact.items()}
    rest = count - sum(found.values())
    for i in sorted(exact, key=lambda i: (found[i] - exact[i], i))[:rest]:
        found[i] += 1
    return found


def expected_time(task: Task) -> float:
    """Seconds of all calls, very roughly, by the kernel's bytes and operations."""
    features = task.features(task.space.default)
    read, flops = (2.0 ** features.get(name, 0.0) for name in ("read", "flops"))
    return float(task.weight * max(read / _READ, flops / _COMPUTE, _LAUNCH))
