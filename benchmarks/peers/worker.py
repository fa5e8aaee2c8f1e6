"""What runs inside the environment of a peer: it answers requests, objects of JSON.

    python -m benchmarks.peers.worker '{"do": "convert", "system": "openvino", "model": "S", ...}'

Without an argument it reads requests from standard input, a line each, and answers with a line each: ``load`` a model,
``measure`` a task with it.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.peer import Engine
from benchmarks.peers.shapes import SHAPES
from benchmarks.peers.systems import PEERS
from benchmarks.peers.tasks import TASKS
from benchmarks.peers.workplace import Workplace

BLOCK = 0.25
ENOUGH = 0.5
"""Seconds over which a task is repeated at a turn."""
PATIENCE = 6.0
"""Seconds to wait at most for other processes to keep still."""


def request(do: str, place: Workplace, system: str, model: str, variant: str, **more: Any) -> dict[str, Any]:
    """What a worker is asked to do with a model."""
    return {"do": do, "cache": str(place.cache), "system": system, "model": model, "variant": variant, **more}


@dataclass(frozen=True)
class Block:
    """Measurements in a row: seconds of each, and the share of the machine's time that other processes took."""

    values: tuple[float, ...]
    others: float


class Watch:
    """The share of all cores' time, since it was made, that was spent outside of this process and its children."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: by the clock, of all cores in use (the time stolen from a virtual machine counts), of this process."""
        busy = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        idle = {3, 4}
        ticks = sum(int(value) for i, value in enumerate(busy) if i not in idle)
        return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])

    def __call__(self) -> float:
        wall, busy, own = (now - start for now, start in zip(self._now(), self.start))
        return max(0.0, busy - own) / (wall * (os.cpu_count() or 1))


def block(measure: Callable[[], float], seconds: float = BLOCK) -> Block:
    """Measure for ``seconds`` (at least once)."""
    watch, start, values = Watch(), time.perf_counter(), [measure()]
    while time.perf_counter() - start < seconds:
        values.append(measure())
    return Block(tuple(values), watch())


def undisturbed(measure: Callable[[], float], still: float) -> Block:
    """Measure over ``ENOUGH`` seconds in which others took less than ``still`` of the machine's time; or the best try."""
    start, blocks = time.perf_counter(), []
    while True:
        blocks.append(block(measure))
        quiet = [b for b in blocks if b.others < still]
        passed = time.perf_counter() - start
        if (quiet and passed > ENOUGH) or passed > PATIENCE:
            break
    chosen = quiet or [min(blocks, key=lambda b: b.others)]
    return Block(tuple(v for b in chosen for v in b.values), max(b.others for b in chosen))


def measure(engine: Engine, name: str) -> Block:
    """A task, warmed up and repeated."""
    task = TASKS[name]
    method = partial(getattr(engine, task.method), *task.arguments)
    if not engine.self_timed:
        getattr(engine, task.method)(*task.warm_up)
    return undisturbed(method, engine.quiet)


class Worker:
    """Answers requests, one after the other; keeps the model that it loaded."""

    engine: Engine

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Do what was asked for: ``convert``, ``load`` or ``measure``."""
        if asked["do"] == "measure":
            done = measure(self.engine, asked["task"])
            seconds = float(f"{statistics.median(done.values):.5g}")
            return {"seconds": seconds, "others": round(done.others, 3), "peak_bytes": self.engine.peak_bytes()}
        place, peer, shape = Workplace(Path(asked["cache"])), PEERS[asked["system"]], SHAPES[asked["model"]]
        variant = peer.variant(asked["variant"])
        if asked["do"] == "convert":
            peer.convert(place, shape, variant)
            return {}
        start = time.perf_counter()
        self.engine = peer.load(place, shape, variant, asked["threads"])
        passed = time.perf_counter() - start
        return {"load_seconds": round(self.engine.load_seconds or passed, 3), "facts": self.engine.facts()}


def main() -> None:
    """Libraries print what they like: that goes to standard error, answers to standard output."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.argv[1:] or sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
