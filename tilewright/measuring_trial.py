"""One trial of one candidate, in a process of its own: is it right, and how fast beside the baseline?"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.trial import Launch, Launcher
from tilewright.costmodel.measurement import Effort, compare
from tilewright.ir import eval_dim
from tilewright.measuring_bench import Bench, Copies
from tilewright.measuring_inputs import Array
from tilewright.runtime.memory import address, pages, parts_of_pages
from tilewright.runtime.tolerance import Expected

_SEAL_BYTES = 64
_UNWRITTEN, _SEAL = 0xFF, 0xA5


@dataclass(frozen=True)
class Candidate:
    """A kernel in a library, where its name is ``name``; the object in ``code`` is not needed any more."""

    library: str
    name: str
    code: KernelCode


class Sealed:
    """Memory of an array, with bytes behind it that must stay as they are; as long as it is unwritten floats are NaN."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        size = math.prod(shape) * dtype.itemsize
        raw = pages(size + _SEAL_BYTES, huge=True)
        raw[...] = _UNWRITTEN
        self.array = raw[:size].view(dtype).reshape(shape)
        self.seal = raw[size : size + _SEAL_BYTES]
        self.seal[...] = _SEAL

    def complaint(self, want: Expected) -> str | None:
        broken = bool(np.any(self.seal != _SEAL))
        return "is followed by memory that was written to" if broken else want.complaint(self.array)


class Results:
    """Memory for what a kernel gives: results, and caches that it changes."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        wanted = enumerate(bench.expected)
        self.tensors = {i: Sealed(want.shape, want.array.dtype) for i, (want, *_) in wanted if i not in bench.changed}
        self.caches = {arg: self._cache(arg) for arg in bench.changed.values()}

    def _cache(self, arg: int) -> Copies:
        """The first copy is what the inputs say, which is checked; the others are only there to be written to."""
        first = self.bench.cache_before(arg)
        parts = parts_of_pages([a.nbytes for a in first] * self.bench.copies)
        for part, array in zip(parts, first):
            part[...] = array.reshape(-1).view(np.uint8)
        return [tuple(parts[at : at + len(first)]) for at in range(0, len(parts), len(first))]

    def complaint(self) -> str | None:
        """What is wrong with the first result that is not as it should be."""
        for i, want in enumerate(self.bench.expected):
            if i in self.tensors:
                found = self.tensors[i].complaint(want[0])
            else:
                memory = self.caches[self.bench.changed[i]][0]
                pairs = zip(want, memory)
                found = next((c for w, m in pairs if (c := w.complaint(_as(m, w.array)))), None)
            if found:
                return f"result {i} {found}"
        return None

    def launch(self, launcher: Launcher, candidate: Candidate) -> Launch:
        """Calls of ``candidate`` that leave what they compute here."""
        code, dims = candidate.code, self.bench.subject.dims
        scratch = [pages(eval_dim(size, dims), huge=True) for size in code.scratch]
        after = [address(s.array) for s in self.tensors.values()] + [address(s) for s in scratch]
        rows = [[*self.bench.pointers(code, copy, self.caches), *after] for copy in range(self.bench.copies)]
        made = launcher.launch(candidate.library, candidate.name, code, dims, rows)
        made.kept = (made.kept, self, scratch)
        return made


def _as(memory: Array, like: Array) -> Array:
    return memory[: like.nbytes].view(like.dtype).reshape(like.shape)


def trial(bench: Bench, shim: Path, candidate: Candidate, baseline: Candidate | None, effort: Effort) -> dict[str, Any]:
    """Run ``candidate`` and look at its results, then time it beside ``baseline``, which is known to be right.

    Gives ``{"wrong": why}`` or the fields of a Timing; without a baseline nothing.
    """
    launcher = Launcher(shim, bench.threads)
    results = Results(bench)
    run = results.launch(launcher, candidate)
    run(1)
    if complaint := results.complaint():
        return {"wrong": complaint}
    if baseline is None:
        return {}
    beside = Results(bench).launch(launcher, baseline)
    timing = compare(run, beside, effort)
    if complaint := results.complaint():
        return {"wrong": f"not always: {complaint}"}
    return asdict(timing)

