"""What is measured with a loaded model: a method of ``Engine`` and its arguments."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """``work``: tokens of one measurement, 0 where the figure is a latency in milliseconds. ``rounds``: at most so many.

    ``reads``: its speed is that of memory.
    """

    method: str
    arguments: tuple[int, ...]
    warm_up: tuple[int, ...]
    work: int = 0
    rounds: int | None = None
    reads: bool = False

    @property
    def unit(self) -> str:
        return "tokens/s" if self.work else "ms"

    def figure(self, seconds: float) -> float:
        """The figure that tables show."""
        return self.work / seconds if self.work else seconds * 1e3

    def seconds(self, figure: float) -> float:
        """The seconds of a measurement that gave ``figure``."""
        return self.work / figure if self.work else figure / 1e3

    @property
    def higher_is_better(self) -> bool:
        return self.work > 0


def _latency(batch: int) -> Task:
    return Task("encode", (batch, 128), (batch, 128), rounds=5)


TASKS = {
    "prefill": Task("prefill", (512,), (512,), work=512, rounds=4),
    "decode": Task("decode", (128, 64), (128, 8), work=64, reads=True),
    "decode-4k": Task("decode", (4032, 64), (128, 8), work=64, rounds=2, reads=True),
    "encode-1": _latency(1),
    "encode-32": _latency(32),
    "attention": Task("attention", (128, 4160), (128, 4160), reads=True),
}
