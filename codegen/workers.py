"""Kernels compiled in several processes: LLVM's bindings let one thread in at a time.

The caller's process takes jobs too. Another one is a plain ``python -m`` that imports the code generator alone: it inherits
no threads and no locks, and needs no guard in the user's script. Whoever compiles a kernel, the code is the same. What goes
wrong in another process is done again in this one, so that errors are raised here, with their source locations, and those
of the first kernel that has one.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from tilewright.codegen.emitters import emitter
from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.schedule import Schedule, parse_schedule
from tilewright.codegen.store import decode, encode
from tilewright.codegen.target import CpuTarget, parse_target
from tilewright.ir import Function, Module, TilewrightError, parse_module, print_module

_JOBS_A_WORKER = 16
"""Starting a process and its imports take as long as about eight kernels."""


@dataclass(frozen=True)
class Job:
    """A kernel to compile. ``key`` is its name in the store and, shortened, that of its function."""

    kernel: Function
    family: str
    schedule: Schedule
    key: str

    def compile(self, target: CpuTarget) -> KernelCode:
        return emitter(self.family).emit(self.kernel, self.schedule, target, f"tw_{self.key[:16]}")


@dataclass
class Compilation:
    """Compiles ``jobs``; ``dims`` are the ranges of their module's symbols. ``workers``: processes besides this one."""

    jobs: Sequence[Job]
    target: CpuTarget
    dims: Mapping[str, tuple[int, int]]
    workers: int | None = None
    left: deque[int] = field(default_factory=deque)
    codes: dict[int, KernelCode] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)

    def run(self, progress: Callable[[int], None] = lambda done: None) -> list[KernelCode]:
        """The code of every job, in order. Raises what compiling the first one that fails raises."""
        self.left.extend(range(len(self.jobs)))
        helpers = [Helper(self) for _ in range(self.helpers())]
        try:
            while (index := self.next()) is not None:
                progress(len(self.codes))
                start = time.perf_counter()
                self.codes[index] = self.jobs[index].compile(self.target)
                self.seconds[index] = time.perf_counter() - start
        except TilewrightError:
            pass  # raised again below, unless an earlier kernel fails too
        finally:
            self.left.clear()
            for helper in helpers:
                helper.finish()
        return [self.codes.get(i) or job.compile(self.target) for i, job in enumerate(self.jobs)]

    def helpers(self) -> int:
        if self.workers is not None:
            return self.workers
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(processors - 1, len(self.jobs) // _JOBS_A_WORKER)

    def next(self) -> int | None:
        """The first job that nobody has; ``popleft`` needs no lock."""
        try:
            return self.left.popleft()
        except IndexError:
            return None


class Helper:
    """A process that compiles, and the thread that hands it jobs until there are none, or it has failed."""

    def __init__(self, work: Compilation) -> None:
        self.work = work
        command = [sys.executable or "python3", "-m", __name__]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.process: subprocess.Popen[bytes] | None = None
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
        except OSError:
            return
        self.requests, self.replies = self.process.stdin, self.process.stdout
        self.thread = threading.Thread(target=self.feed, daemon=True)
        self.thread.start()

    def feed(self) -> None:
        assert self.requests is not None
        assert self.replies is not None
        while (index := self.work.next()) is not None:
            start = time.perf_counter()
            try:
                send(self.requests, self.request(self.work.jobs[index]))
                head, code = receive(self.replies)
                self.work.codes[index] = decode(head, code)
                self.work.seconds[index] = time.perf_counter() - start
            except (OSError, ValueError, KeyError):
                return  # the others go on without it; its job is still to be done

    def request(self, job: Job) -> dict[str, Any]:
        module = Module("kernel", functions={job.kernel.name: job.kernel}, dims=dict(self.work.dims))
        return {
            "module": print_module(module), "family": job.family, "schedule": str(job.schedule),
            "target": self.work.target.text, "key": job.key,
        }  # fmt: skip

    def finish(self) -> None:
        """Waits for the job in work, if any, and ends the process."""
        if self.process is None:
            return
        self.thread.join()
        self.process.kill()
        with contextlib.suppress(OSError):  # what it did not read is lost
            self.process.communicate()


def send(stream: IO[bytes], head: Mapping[str, Any], data: bytes = b"") -> None:
    stream.write(json.dumps({**head, "bytes": len(data)}).encode() + b"\n" + data)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """Raises ValueError at the end of the stream."""
    head: dict[str, Any] = json.loads(stream.readline())
    return head, stream.read(head["bytes"])


def answer(request: Mapping[str, Any]) -> KernelCode:
    """The code of a requested kernel, as ``Job.compile`` makes it."""
    (kernel,) = parse_module(request["module"]).functions.values()
    family = request["family"]
    emitter(family)  # registers its schedules
    job = Job(kernel, family, parse_schedule(request["schedule"]), request["key"])
    return job.compile(parse_target(request["target"]))


def main() -> None:
    """Serves requests until the input ends or one cannot be answered."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no reply
    while True:
        request, _ = receive(sys.stdin.buffer)
        code = answer(request)
        send(replies, encode(code), code.object)


if __name__ == "__main__":
    main()
