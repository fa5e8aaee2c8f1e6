"""A workload of a bundle on a GPU: its memory, whether a candidate is right, and how long it takes.

Arguments are uploaded once. Results lie in memory of their own, in which before a check every float is NaN, with bytes
behind it that must stay as they are. Caches are changed in place, and restored before a check.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tilewright.runtime.bundle.arrays import Array, Arrays
from tilewright.runtime.bundle.format import CandidateSpec, LaunchSpec, WorkloadSpec
from tilewright.runtime.cuda import Device, Memory, Modules, Parameters, Stream, Timer
from tilewright.runtime.errors import DeviceError
from tilewright.runtime.measuring import inliers, spread
from tilewright.runtime.tolerance import Expected

_SEAL_BYTES = 64
_UNWRITTEN, _SEAL = 0xFF, 0xA5
_BATCH = 10
"""Calls that are timed without a stop; fewer where they are long."""
_LEAST = 3
_BASELINE = 0.3
"""The baseline's share of the time of a candidate."""
_PRECISION = 0.005
"""The spread over the root of the number of calls from which on a median is known well enough."""
_FLUSH = 2  # times the L2 cache
_SHORTEST = 1e-9


class Result:
    """The memory of one result: a tensor's own, or that of a cache."""

    def __init__(self, device: Device, expected: Sequence[Expected], before: Sequence[Array] = ()) -> None:
        self.expected, self.before = expected, before
        self.sizes = [math.prod(e.shape) * e.array.itemsize for e in expected]
        self.memory = [Memory(device, size + _SEAL_BYTES, "results") for size in self.sizes]

    @property
    def addresses(self) -> list[int]:
        return [m.address for m in self.memory]

    def prepare(self, stream: Stream) -> None:
        """As it is before a call."""
        for memory, size in zip(self.memory, self.sizes):
            stream.fill(memory.address, _UNWRITTEN, size)
            stream.fill(memory.address + size, _SEAL, _SEAL_BYTES)
        for memory, array in zip(self.memory, self.before):
            stream.to_device(memory.address, array)

    def complaint(self, stream: Stream) -> str | None:
        """What is wrong with what is there, or None."""
        for memory, size, want in zip(self.memory, self.sizes, self.expected):
            found = np.empty(size + _SEAL_BYTES, np.uint8)
            stream.to_host(found, memory.address)
            stream.wait()
            if np.any(found[size:] != _SEAL):
                return "is followed by memory that was written to"
            if reason := want.complaint(found[:size].view(want.array.dtype).reshape(want.shape)):
                return reason
        return None


@dataclass
class Kernel:
    """A candidate on the GPU; calling it puts its grids on the stream."""

    stream: Stream
    functions: list[tuple[int, LaunchSpec]]
    parameters: Parameters
    scratch: list[Memory]

    def __call__(self) -> None:
        for function, launch in self.functions:
            self.stream.launch(function, launch.grid, launch.block, launch.shared, self.parameters)


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: the median of ``repeats``, their ``spread``, and the median of the baseline before and after.

    ``drift``: by how much the baseline moved meanwhile.
    """

    seconds: float
    spread: float
    repeats: int
    baseline: float | None
    drift: float


class Bench:
    """The memory of a workload, and its candidates."""

    def __init__(self, device: Device, folder: Path, arrays: Arrays, workload: WorkloadSpec) -> None:
        self.device, self.folder, self.arrays, self.workload = device, folder, arrays, workload
        self.stream, self.modules = Stream(device), Modules(device)
        self.uploaded: dict[str, Memory] = {}
        self.results = [self._result(i) for i in range(len(workload.results))]
        self.clock = Clock(device, self.stream)
        self._baseline: float | None = None

    def _result(self, index: int) -> Result:
        spec = self.workload.results[index]
        before = [] if spec.argument is None else [self.arrays[name] for name in self.workload.arguments[spec.argument]]
        return Result(self.device, [self.arrays.expected(e) for e in spec.expected], before)

    def load(self, candidate: CandidateSpec) -> Kernel:
        """A candidate with all that it works on. Raises DeviceError and MemoryError."""
        image = (self.folder / candidate.cubin).read_bytes()
        functions = [(self.modules.function(image, x.symbol, x.shared), x) for x in candidate.launches]
        scratch = [Memory(self.device, size, "temporaries") for size in candidate.scratch]
        places = [*self._arguments(candidate), *self._tensors(), *(m.address for m in scratch)]
        return Kernel(self.stream, functions, Parameters([*candidate.numbers, *places]), scratch)

    def _arguments(self, candidate: CandidateSpec) -> Iterator[int]:
        changed = {r.argument: result for r, result in zip(self.workload.results, self.results) if r.argument is not None}
        for i, names in enumerate(self.workload.arguments):
            if i in changed:
                yield from changed[i].addresses
            else:
                own = (candidate.packed[i],) if i in candidate.packed else names
                yield from (self._upload(name).address for name in own)

    def _tensors(self) -> list[int]:
        return [a for r, result in zip(self.workload.results, self.results) if r.argument is None for a in result.addresses]

    def _upload(self, name: str) -> Memory:
        if name not in self.uploaded:
            array = np.ascontiguousarray(self.arrays[name])
            memory = Memory(self.device, array.nbytes, "arguments")
            memory.fill(array.ctypes.data, array.nbytes)
            self.uploaded[name] = memory
        return self.uploaded[name]

    def check(self, kernel: Kernel) -> str | None:
        """Call ``kernel`` once; what is wrong with the first result that is not as it should be, or None."""
        self.prepare()
        kernel()
        self.stream.wait()
        return self.complaint()

    def prepare(self) -> None:
        for result in self.results:
            result.prepare(self.stream)

    def complaint(self) -> str | None:
        for i, result in enumerate(self.results):
            if reason := result.complaint(self.stream):
                return f"result {i} {reason}"
        return None

    def time(self, kernel: Kernel, baseline: Kernel | None, seconds: float) -> Timing | str:
        """The time of a call, measured for about so long, or what is wrong with the results of all these calls.

        The baseline's time after one candidate is that before the next.
        """
        before = self._baseline or (self._typical(baseline, seconds) if baseline else None)
        self.prepare()
        samples = self.clock.measure(kernel, seconds)
        if complaint := self.complaint():
            return complaint
        after = self._baseline = self._typical(baseline, seconds) if baseline else None
        kept = np.asarray(samples)[inliers(samples)]
        drift = abs(after - before) / min(after, before) if before and after else 0.0
        near = (before + after) / 2 if before and after else None
        return Timing(float(np.median(kept)), spread(kept), len(kept), near, drift)

    def _typical(self, kernel: Kernel, seconds: float) -> float:
        return float(np.median(self.clock.measure(kernel, _BASELINE * seconds)))

    def alive(self) -> bool:
        """Whether the GPU still takes work from this process: some errors end that."""
        try:
            self.stream.fill(self.results[0].addresses[0], 0, 1)
            self.stream.wait()
        except DeviceError:
            return False
        return True


class Clock:
    """Times calls with events, after each call's data have left the L2 cache: a model reads other layers' between two."""

    def __init__(self, device: Device, stream: Stream) -> None:
        self.stream = stream
        self.flushed = Memory(device, _FLUSH * device.l2_bytes, "emptying the cache")
        self.timers = [Timer(stream) for _ in range(_BATCH)]

    def measure(self, run: Callable[[], None], seconds: float) -> list[float]:
        """Seconds of each of several calls: at least a few, and more until the median is known well or time is up."""
        start = time.perf_counter()
        first = max(self.sample(run, 2))  # these warm up
        count = min(max(int(seconds / first), _LEAST), _BATCH)
        found = self.sample(run, count)
        while time.perf_counter() - start < seconds:
            if len(found) >= _BATCH and spread(found) / math.sqrt(len(found)) < _PRECISION:
                break
            found += self.sample(run, count)
        return found

    def sample(self, run: Callable[[], None], count: int) -> list[float]:
        """Seconds of ``count`` calls, which the GPU gets without waiting for this process in between."""
        for timer in self.timers[:count]:
            self.stream.fill(self.flushed.address, 0, self.flushed.bytes)
            timer.start()
            run()
            timer.stop()
        self.stream.wait()
        return [max(timer.seconds(), _SHORTEST) for timer in self.timers[:count]]
