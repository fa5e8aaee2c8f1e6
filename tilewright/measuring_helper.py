"""A process of ours that answers requests, one at a time: it may die or hang, and then there is another one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

from tilewright.codegen.workers import receive, send

Answer = Callable[[Mapping[str, Any], bytes], tuple[Mapping[str, Any], bytes]]


class HelperError(Exception):
    """The process ended, or was ended after it took too long, without an answer. Another is started when it is asked."""

    def __init__(self, message: str, late: bool) -> None:
        super().__init__(message)
        self.late = late


class Helper:
    """Runs ``command``, or ``python -m module``, when it is first needed, and again after ``jobs`` requests.

    The process is ended by force. Its temporary files are in a folder of its own, which goes with it.
    """

    def __init__(self, module: str, jobs: int | None = None, command: Sequence[str] = ()) -> None:
        self.command = list(command) or [sys.executable, "-m", module]
        self.jobs, self.done = jobs, 0
        self.process: subprocess.Popen[bytes] | None = None
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def ask(self, head: Mapping[str, Any], data: bytes = b"", seconds: float = 60.0) -> tuple[dict[str, Any], bytes]:
        """The answer. Raises HelperError when there is none within ``seconds``."""
        if self.jobs is not None and self.done >= self.jobs:
            self.close()
        process = self.process or self._start()
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            send(process.stdin, head, data)
            answer = receive(process.stdout)
        except (OSError, ValueError, KeyError):
            timer.cancel()
            raise self._lost(late.is_set(), seconds) from None
        timer.cancel()
        self.done += 1
        return answer

    def _lost(self, late: bool, seconds: float) -> HelperError:
        process = self.process
        assert process is not None
        self.close()
        if late:
            return HelperError(f"no answer after {seconds:g} s", True)
        return HelperError(f"the process ended with {process.returncode}", False)

    def _start(self) -> subprocess.Popen[bytes]:
        self.folder = tempfile.TemporaryDirectory(prefix="tilewright-helper-", ignore_cleanup_errors=True)
        path = os.pathsep.join(p for p in sys.path if p)
        environment = os.environ | {"PYTHONPATH": path, "TMPDIR": self.folder.name}
        self.done = 0
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
            start_new_session=True,
        )  # fmt: skip
        return self.process

    def close(self) -> None:
        """End the process; it is started again when it is asked."""
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        with suppress(OSError):
            process.communicate()
        if self.folder is not None:
            self.folder.cleanup()


def serve(answer: Answer) -> None:
    """Answer requests on the standard input until it ends. What a library prints is no answer."""
    replies: IO[bytes] = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            head, data = receive(sys.stdin.buffer)
        except ValueError:
            return
        send(replies, *answer(head, data))
