"""Candidates compiled by several processes, each of which a candidate may crash or hold up.

Unlike ``codegen.workers`` nothing is compiled in the process that asks, and what goes wrong is an answer.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

from tilewright.codegen.emitters import emitter
from tilewright.codegen.facts import facts
from tilewright.codegen.kernel import KernelCode
from tilewright.codegen.schedule import parse_schedule
from tilewright.codegen.store import decode, encode
from tilewright.codegen.target import parse_target
from tilewright.codegen.trial import TRIAL_KEY
from tilewright.codegen.workers import Job
from tilewright.costmodel.workload import Workload
from tilewright.ir import Function, parse_module
from tilewright.measuring_helper import Helper, HelperError, serve

_JOBS = 500
"""After so many a process is replaced: LLVM keeps some memory of every kernel."""
_LONGEST = 2000  # characters of an error that are kept


@dataclass(frozen=True)
class Made:
    """The code of a candidate and facts about it, or why there is none."""

    code: KernelCode | None = None
    facts: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


class Compiler(Protocol):
    """Makes the code of candidates, under the name ``tw_`` and ``TRIAL_KEY``."""

    def compile(self, workload: Workload, schedules: Sequence[str]) -> list[Made]: ...

    def close(self) -> None: ...


class Compilers:
    """``count`` processes, by default one a processor. A kernel that takes more than ``seconds`` is given up."""

    def __init__(self, count: int | None = None, seconds: float = 60.0, command: Sequence[str] = ()) -> None:
        affinity = getattr(os, "sched_getaffinity", None)
        count = count or (len(affinity(0)) if affinity else os.cpu_count() or 1)
        self.seconds = seconds
        self.helpers = [Helper(__name__, _JOBS, command) for _ in range(count)]

    def compile(self, workload: Workload, schedules: Sequence[str]) -> list[Made]:
        """The code of each of ``schedules``, in order."""
        made: dict[int, Made] = {}
        left: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(len(schedules)):
            left.put(i)

        def feed(helper: Helper) -> None:
            while True:
                try:
                    index = left.get_nowait()
                except queue.Empty:
                    return
                made[index] = self._one(helper, workload, schedules[index])

        threads = [threading.Thread(target=feed, args=(h,), daemon=True) for h in self.helpers[: len(schedules)]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [made[i] for i in range(len(schedules))]

    def _one(self, helper: Helper, workload: Workload, schedule: str) -> Made:
        request = {"kernel": workload.kernel, "family": workload.family, "schedule": schedule, "target": workload.target}
        try:
            head, code = helper.ask(request, seconds=self.seconds)
            if "refused" in head:
                return Made(error=head["refused"])
            return Made(decode(head, code), head["facts"])
        except HelperError as error:
            return Made(error=f"compiling it: {error}")
        except OSError as error:
            return Made(error=f"no process to compile it: {error}")

    def close(self) -> None:
        """End the processes."""
        for helper in self.helpers:
            helper.close()


@lru_cache(maxsize=4)
def _kernel(text: str) -> Function:
    (kernel,) = parse_module(text).functions.values()
    return kernel


def answer(request: Mapping[str, Any], _: bytes = b"") -> tuple[Mapping[str, Any], bytes]:
    """The code of a candidate, or why it is refused."""
    try:
        emitter(request["family"])  # registers its schedules
        target = parse_target(request["target"])
        schedule = parse_schedule(request["schedule"])
        if reason := schedule.refusal(target):
            return {"refused": reason}, b""
        code = Job(_kernel(request["kernel"]), request["family"], schedule, TRIAL_KEY).compile(target)
    except Exception as error:  # whatever an emitter, or LLVM, has against it
        return {"refused": f"{type(error).__name__}: {error}"[:_LONGEST]}, b""
    return {**encode(code), "facts": facts(code.object)}, code.object


if __name__ == "__main__":
    serve(answer)
