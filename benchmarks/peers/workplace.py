"""The folder that environments, builds and models are kept in, and steps that are done once."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


class StepError(RuntimeError):
    """A command of a step failed; the message has the last line of its log."""


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/tilewright/bench``, by default below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tilewright" / "bench"


@dataclass(frozen=True)
class Workplace:
    """``cache``: where everything lies. Commands run with low priority and write to a log a step.

    A step leaves a stamp, ``stamps/<name>.json``, with what it was made from and the seconds it took. It is done again
    when that differs, or when the stamp is removed.
    """

    cache: Path
    say: Callable[[str], None] = print
    own_python: Path = Path(sys.executable)
    """The interpreter with the tilewright to measure."""

    def folder(self, *parts: str) -> Path:
        """A folder below the cache; made when missing."""
        path = self.cache.joinpath(*parts)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def model(self, model: str) -> Path:
        """The folder of all formats of a model: ``hf`` is the Hugging Face checkpoint."""
        return self.folder("models", model)

    def python(self, venv: str) -> Path:
        """The interpreter of an environment."""
        return self.cache / "venv" / venv / "bin" / "python"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One part at a time in this cache: two would measure, or overwrite, each other. Waits for the other one."""
        with (self.folder() / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self.say("waiting for another command to end")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @property
    def worker_environment(self) -> dict[str, str]:
        """Environment of workers: they see this folder and nothing else of the project but what is installed."""
        link = self.folder("path") / "benchmarks"
        if not link.exists():
            link.symlink_to(ROOT / "benchmarks")
        return {**os.environ, "PYTHONPATH": str(link.parent), "PYTHONSAFEPATH": "1"}

    def is_done(self, name: str) -> bool:
        """Whether a step has been done, whatever from."""
        return (self.folder("stamps") / f"{name}.json").is_file()

    def step(self, name: str, made_from: str, action: Callable[[], None]) -> None:
        """Run ``action`` unless it was run with ``made_from`` before."""
        stamp = self.folder("stamps") / f"{name}.json"
        if stamp.is_file() and json.loads(stamp.read_text())["made_from"] == made_from:
            return
        self.say(f"{name} ...")
        start = time.perf_counter()
        action()
        seconds = time.perf_counter() - start
        stamp.write_text(json.dumps({"made_from": made_from, "seconds": round(seconds, 1)}) + "\n")
        self.say(f"{name}: {seconds:.0f} s")

    def run(self, command: Sequence[str | Path], log: str) -> None:
        """Run ``command`` with low priority; raises StepError with the last line of the log."""
        path = self.folder("logs") / f"{log}.log"
        texts = [str(part) for part in command]
        with path.open("a") as file:
            print("$", shlex.join(texts), file=file, flush=True)
            done = subprocess.run(["nice", "-n", "10", *texts], cwd=self.cache, stdout=file, stderr=subprocess.STDOUT,
                                  env=self.worker_environment)  # fmt: skip
        if done.returncode:
            last = path.read_text(errors="replace").splitlines()[-1]
            raise StepError(f"exit code {done.returncode} of {Path(texts[0]).name}: {last[:300]}; all of it is in {path}")

    def environment(self, venv: str, requirements: Sequence[str]) -> None:
        """A virtual environment with exactly pinned packages; torch first, so that nothing asks for another one."""

        def make() -> None:
            if not self.python(venv).exists():
                self.run([sys.executable, "-m", "venv", self.cache / "venv" / venv], f"venv-{venv}")
            install = [self.python(venv), "-m", "pip", "install", "--no-cache-dir", "--quiet"]
            torch = [item for item in requirements if item.startswith("torch==")]
            if torch:
                self.run([*install, *torch], f"venv-{venv}")
            self.run([*install, *requirements], f"venv-{venv}")

        self.step(f"venv-{venv}", " ".join(requirements), make)
