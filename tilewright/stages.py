"""What a compilation reports while it runs, and the folder that its artifact lies in meanwhile."""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Progress = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and how much there is."""


class Stages:
    """Times the stages of a compilation and hands progress on."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress: Progress = progress or (lambda stage, done, total: None)
        self.seconds: dict[str, float] = {}
        self.running: tuple[str, float] | None = None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.running = (name, time.perf_counter())
        self.progress(name, 0, 1)
        yield
        self.seconds = self.finished()
        self.running = None
        self.progress(name, 1, 1)

    def finished(self) -> dict[str, float]:
        """Seconds of each stage, the running one so far."""
        now = {} if self.running is None else {self.running[0]: time.perf_counter() - self.running[1]}
        return {**self.seconds, **now}


class Holder:
    """A temporary folder that lives as long as the compiled model."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="tilewright-")
        self.path = Path(self.folder) / "artifact"
        self.close = weakref.finalize(self, shutil.rmtree, self.folder, True)
