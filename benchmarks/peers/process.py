"""A process that answers each line of JSON with a line of JSON. While nobody asks, it waits."""

from __future__ import annotations

import json
import select
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks.peers.workplace import Workplace

PATIENCE = 300.0
"""Seconds after which a process that does not answer is given up."""


class ProcessError(RuntimeError):
    """A process ended or hangs; the message ends with the last that it wrote to standard error."""


class Process:
    """``command``, started in the environment of workers."""

    def __init__(self, place: Workplace, command: Sequence[str]) -> None:
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
                                        text=True, cwd=place.cache, env=place.worker_environment)  # fmt: skip

    def ask(self, request: dict[str, Any], patience: float = PATIENCE) -> dict[str, Any]:
        """Send ``request`` and wait for the answer. ProcessError when there is none: the process is closed then."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise self._failure() from None
        if not select.select([self.process.stdout], [], [], patience)[0]:
            self.process.kill()
            raise self._failure(f"no answer in {patience:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise self._failure()
        return dict(json.loads(line))

    def close(self) -> None:
        """Let it end; kill it when it does not."""
        try:
            self.process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        self.errors.close()

    def _failure(self, what: str = "") -> ProcessError:
        code = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().strip()[-600:]
        self.close()
        return ProcessError("\n".join(part for part in (said, what) if part) or f"exit code {code}")
