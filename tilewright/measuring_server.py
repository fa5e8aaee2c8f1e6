"""The process that measures: it holds the memory of one workload and forks a process for each candidate.

A process of its own has no threads, and no locks that a fork would copy. It ends when its input does, and with it what it
has forked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tilewright.codegen.store import decode, encode
from tilewright.codegen.target import parse_target
from tilewright.codegen.trial import shim
from tilewright.costmodel.measurement import AbandonedError, Effort, isolated
from tilewright.ir import TilewrightError
from tilewright.measuring_bench import Bench, Blocks
from tilewright.measuring_helper import serve
from tilewright.measuring_inputs import Subject
from tilewright.measuring_trial import Candidate, trial

_INPUT = 0


def described(candidate: Candidate) -> dict[str, Any]:
    """A candidate as a request says it: without its object."""
    head = encode(replace(candidate.code, object=b""))
    return {"library": candidate.library, "name": candidate.name, "code": head}


def _candidate(said: Mapping[str, Any]) -> Candidate:
    return Candidate(said["library"], said["name"], decode(said["code"], b""))


class Server:
    """Answers ``open`` (a workload) and ``trial`` (a candidate of it)."""

    def __init__(self) -> None:
        self.bench: Bench | None = None
        self.blocks = Blocks()

    def answer(self, request: Mapping[str, Any], _: bytes = b"") -> tuple[Mapping[str, Any], bytes]:
        return (self.open(request) if "kernel" in request else self.trial(request)), b""

    def open(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self.bench is not None:
            self.bench.close()
        self.bench = None
        try:
            subject = Subject.parse(request["kernel"], dict(request["sizes"]), parse_target(request["target"]))
            self.bench = Bench.make(subject, request["threads"], request["seed"], self.blocks)
        except (TilewrightError, ValueError, KeyError, MemoryError) as error:
            return {"refused": f"{type(error).__name__}: {error}"}
        return {"bytes_moved": subject.bytes_moved(), "flops": subject.flops()}

    def trial(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """``{"status": ...}`` with what ``trial`` gives, or with an error."""
        bench = self.bench
        assert bench is not None
        candidate = _candidate(request["candidate"])
        baseline = _candidate(request["baseline"]) if request["baseline"] else None
        try:
            for each in filter(None, (candidate, baseline)):
                bench.prepare(each.code, keep=baseline.code.packing.values() if baseline else ())
            library = shim(bench.subject.target)
        except (TilewrightError, ValueError, MemoryError) as error:
            return {"status": "refused", "error": f"{type(error).__name__}: {error}"}
        effort = Effort(**request["effort"])
        outcome = isolated(lambda: trial(bench, library, candidate, baseline, effort), request["timeout"], _INPUT)
        if outcome.status != "ok":
            return {"status": outcome.status, "error": outcome.error}
        if "wrong" in outcome.value:
            return {"status": "wrong", "error": outcome.value["wrong"]}
        return {"status": "ok", **outcome.value}


def main() -> None:
    try:
        serve(Server().answer)
    except AbandonedError:
        return


if __name__ == "__main__":
    main()
