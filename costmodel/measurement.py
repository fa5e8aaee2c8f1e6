"""Measuring: code of unknown worth in a forked process, and times that say something on a machine that drifts.

Nothing here knows what is measured. ``isolated`` runs a function that may crash or hang. ``compare`` times two things in
turn, since the ratio of neighbours in time moves less with the machine than either of them.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import math
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn

import numpy as np

from tilewright.runtime.measuring import inliers, spread

Calls = Callable[[int], object]
"""Makes so many calls of what is timed."""
Clock = Callable[[], float]

_PR_SET_PDEATHSIG = 1
_MOST_CALLS = 1 << 20
_WAIT = 0.001  # seconds between two looks at a process that has said all it had to say


# --- isolation --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How ``isolated`` work ended; ``value`` is what it gave when it ended well, ``error`` says why it did not."""

    status: Literal["ok", "crashed", "timeout"]
    value: Any = None
    error: str = ""


class AbandonedError(Exception):
    """Nobody waits for the outcome any more."""


def isolated(work: Callable[[], Any], seconds: float, abandon: int | None = None) -> Outcome:
    """Run ``work`` in a forked process and give its value, which must be fit for JSON.

    A process that ends by a signal has crashed, and so has one whose ``work`` raises. One that is not through after
    ``seconds`` is killed with all the processes of its group. It also dies with this one, whatever kills that (on Linux).
    When nothing more can come from the file ``abandon``, the process is killed and AbandonedError raised.
    """
    reader, writer = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(work, writer, parent)
    os.close(writer)
    with suppress(OSError):  # the child does the same; whoever comes first
        os.setpgid(child, child)
    try:
        return _collect(child, reader, seconds, abandon)
    finally:
        os.close(reader)
        _end(child)


def _child(work: Callable[[], Any], writer: int, parent: int) -> NoReturn:
    """Run ``work`` and write what it gives; never returns to the code that forked."""
    try:
        faulthandler.disable()  # the crash is looked for
        os.setpgid(0, 0)
        die_with(parent)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        try:
            said: dict[str, Any] = {"value": work()}
        except BaseException as error:
            said = {"raised": f"{type(error).__name__}: {error}"}
        with os.fdopen(writer, "w") as answer:
            json.dump(said, answer)
    finally:
        os._exit(0)


def die_with(parent: int) -> None:
    """Have the system kill this process when ``parent``, which made it, ends. Linux only; elsewhere nothing happens."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def _collect(child: int, reader: int, seconds: float, abandon: int | None) -> Outcome:
    deadline = time.monotonic() + seconds
    said = bytearray()
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([reader] if abandon is None else [reader, abandon], [], [], left)
        if reader in ready:
            part = os.read(reader, 1 << 16)
            said += part
            if not part:
                return _outcome(child, bytes(said), deadline)
        elif abandon in ready:
            raise AbandonedError
    return Outcome("timeout", error=f"not through after {seconds:g} s")


def _outcome(child: int, said: bytes, deadline: float) -> Outcome:
    """What a process that has closed its pipe says, or how it ended."""
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            return Outcome("timeout", error="closed its pipe and did not end")
        time.sleep(_WAIT)
    how = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    if how is not None and how.si_code != os.CLD_EXITED:
        return Outcome("crashed", error=f"ended by {signal.Signals(how.si_status).name}")
    try:
        answer = json.loads(said)
    except ValueError:
        return Outcome("crashed", error="ended without an answer")
    if "raised" in answer:
        return Outcome("crashed", error=answer["raised"])
    return Outcome("ok", answer["value"])


def _end(child: int) -> None:
    """Kill what is left of the group, and take note of the end of its first process."""
    with suppress(OSError):
        os.killpg(child, signal.SIGKILL)
    with suppress(OSError):
        os.kill(child, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(child, 0)


# --- times ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    A sample is as many calls as take ``sample`` seconds. At least ``least`` samples are taken, and more until the median
    is known to ``precision`` (spread over the square root of their number) or ``budget`` seconds are over. When the
    baseline moved by more than ``drift`` meanwhile, all is done once more. What takes ``hopeless`` times as long as the
    baseline is not measured finely. A call of a quarter of the budget is a sample even when it is the first.
    """

    budget: float = 0.2
    sample: float = 0.002
    least: int = 8
    precision: float = 0.005
    drift: float = 0.1
    hopeless: float = 2.5

    def times(self, factor: float) -> Effort:
        """So many times the samples, and as much more precision as they give."""
        least = max(1, round(self.least * factor))
        return replace(self, budget=self.budget * factor, least=least, precision=self.precision / math.sqrt(factor))


@dataclass(frozen=True)
class Timing:
    """``seconds`` of a call, ``spread`` (interquartile range over median), over ``repeats`` calls.

    ``baseline`` is what a call of the baseline took at the same time; ``drift`` by how much that moved.
    """

    seconds: float
    spread: float
    repeats: int
    baseline: float
    drift: float


@dataclass
class Probe:
    """Samples of one thing: seconds of a call, and when."""

    run: Calls
    clock: Clock
    sample: float
    calls: int = 1
    seconds: list[float] = field(default_factory=list)
    at: list[float] = field(default_factory=list)

    def read(self) -> tuple[float, float]:
        start = self.clock()
        self.run(self.calls)
        end = self.clock()
        return (start + end) / 2, max(end - start, 1e-9) / self.calls

    def warm(self, long: float) -> float:
        """Run until a sample is as long as it should be; gives the seconds of a call: a sample too if it is ``long``."""
        while True:
            at, each = self.read()
            if each >= long:
                self.at.append(at)
                self.seconds.append(each)
                return each
            wanted = min(math.ceil(self.sample / each), _MOST_CALLS)
            if wanted <= 2 * self.calls:
                return each
            self.calls = wanted

    def take(self) -> None:
        """One sample. The other probe left the caches as it liked: where calls are short, one comes before it."""
        if self.calls > 1:
            self.run(1)
        at, each = self.read()
        self.at.append(at)
        self.seconds.append(each)


def compare(
    candidate: Calls, baseline: Calls, effort: Effort | None = None, clock: Clock = time.perf_counter
) -> Timing:
    """Time ``candidate`` and ``baseline`` in turn.

    Each sample of the candidate is divided by the baseline at that moment, interpolated between the samples before and
    after. The ratio of the result is the median of these; outliers among them count for nothing.
    """
    effort = effort or Effort()
    first = _attempt(candidate, baseline, effort, clock)
    if first.drift <= effort.drift:
        return first
    second = _attempt(candidate, baseline, effort, clock)
    return min(first, second, key=lambda timing: timing.drift)


def _attempt(candidate: Calls, baseline: Calls, effort: Effort, clock: Clock) -> Timing:
    own, base = Probe(candidate, clock, effort.sample), Probe(baseline, clock, effort.sample)
    start, long = clock(), effort.budget / 4
    least = 2 if own.warm(long) > effort.hopeless * base.warm(long) else effort.least
    if not base.seconds:
        start = clock()
        base.take()
    while not _enough(own, base, effort, least, clock() - start):
        own.take()
        own.take()
        base.take()
    return _timing(own, base)


def _enough(own: Probe, base: Probe, effort: Effort, least: int, spent: float) -> bool:
    count = len(own.seconds)
    if spent >= effort.budget:
        return count > 0
    if count < least:
        return False
    return least < effort.least or spread(ratios(own, base)) / math.sqrt(count) < effort.precision


def ratios(own: Probe, base: Probe) -> np.ndarray[Any, Any]:
    """Each sample over the baseline of its moment."""
    return np.asarray(own.seconds) / np.interp(own.at, base.at, base.seconds)


def _timing(own: Probe, base: Probe) -> Timing:
    found = ratios(own, base)
    kept = inliers(found)
    seconds = float(np.median(np.asarray(own.seconds)[kept]))
    steps = np.abs(np.diff(base.seconds)) / np.minimum(base.seconds[:-1], base.seconds[1:])
    drift = float(np.median(steps)) if len(steps) else 0.0
    baseline = seconds / float(np.median(found[kept]))
    return Timing(seconds, spread(found[kept]), int(kept.sum()) * own.calls, baseline, drift)
