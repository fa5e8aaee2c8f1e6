"""What a system under test is: how to get it, its ways to run a model, and how a worker drives it."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.peers.shapes import Shape
from benchmarks.peers.workplace import Workplace


@dataclass(frozen=True)
class Variant:
    """One way to run a model.

    ``width`` is the width class of the weights, ``f32``, ``bf16``, ``int8`` or ``int4``, and decides what it is compared
    with. ``models``: those it runs. ``rounds``: at most so many measurements. ``isa``: ``avx2`` where the system is held
    to that. ``a8``: activations are int8, too. ``options``: what the system itself needs to know.
    """

    name: str
    width: str
    models: str = "SML"
    rounds: int | None = None
    isa: str = "native"
    a8: bool = False
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)


class Engine:
    """A loaded model in a worker. A measurement gives seconds; those that make no sense for a system are not asked for."""

    self_timed: ClassVar[bool] = False
    """Whether each measurement warms up and repeats by itself."""
    quiet: ClassVar[float] = 0.05
    """Share of the machine's time that other processes may take during a measurement."""

    load_seconds: float | None = None
    """Seconds that loading took, where that is not the time of ``Peer.load``."""

    def prefill(self, tokens: int) -> float:
        """Seconds from a prompt of ``tokens`` tokens to the first new one, in an empty context."""
        raise NotImplementedError

    def decode(self, context: int, tokens: int) -> float:
        """Seconds of ``tokens`` greedy decode steps after a prompt of ``context`` tokens, the prompt's time left out."""
        raise NotImplementedError

    def encode(self, batch: int, length: int) -> float:
        """Seconds of an encoder on ``batch`` texts of ``length`` tokens."""
        raise NotImplementedError

    def peak_bytes(self) -> int:
        """The most memory that has been resident so far, mapped files included."""
        lines = Path("/proc/self/status").read_text().splitlines()
        [line] = [line for line in lines if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024

    def facts(self) -> dict[str, Any]:
        """What else to record of this model."""
        return {}


class Peer(ABC):
    """A system. The part above ``load`` runs in the benchmark's process, the rest in a worker in its own environment."""

    name: ClassVar[str]
    title: ClassVar[str]
    requirements: ClassVar[tuple[str, ...]] = ()
    """Pinned packages of its environment; none: it runs in the environment of the benchmark."""
    variants: ClassVar[tuple[Variant, ...]] = ()

    def variant(self, name: str) -> Variant:
        """The variant called ``name``; KeyError lists those that exist."""
        found = {variant.name: variant for variant in self.variants}
        if name not in found:
            raise KeyError(f"{self.name} has no variant {name}; it has {', '.join(found)}")
        return found[name]

    def python(self, place: Workplace) -> Path:
        """The interpreter of its workers."""
        return place.python(self.name) if self.requirements else place.own_python

    def setup(self, place: Workplace) -> None:
        """Install it."""
        if self.requirements:
            place.environment(self.name, self.requirements)

    def is_ready(self, place: Workplace, shape: Shape, variant: Variant) -> bool:
        """Whether everything is there that ``load`` needs."""
        made = place.is_done(self.step_name(shape, variant)) and self.path(place, shape, variant).exists()
        return made and self.python(place).exists()

    def step_name(self, shape: Shape, variant: Variant) -> str:
        """The step that ends when ``path`` is whole."""
        return f"{self.name}-{shape.name}-{variant.name}"

    @abstractmethod
    def path(self, place: Workplace, shape: Shape, variant: Variant) -> Path:
        """The file or folder of a model in the format of ``variant``."""

    def prepare(self, place: Workplace, shape: Shape, variant: Variant) -> None:  # noqa: B027
        """Make ``path`` from the checkpoint, where the system does not read that itself."""

    def convert(self, place: Workplace, shape: Shape, variant: Variant) -> None:
        """The part of ``prepare`` that needs the system's own packages; in the worker."""
        raise NotImplementedError

    @abstractmethod
    def load(self, place: Workplace, shape: Shape, variant: Variant, threads: int) -> Engine:
        """Open a model, ready to run; in the worker."""


def prompt(shape: Shape, tokens: int, seed: int = 0) -> list[int]:
    """Token ids that look like nothing in particular, the same for all systems; no special ones."""
    state, ids = seed * 7919 + 1, []
    for _ in range(tokens):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        ids.append(300 + (state >> 33) % (shape.vocabulary - 300))
    return ids


def run_worker(place: Workplace, peer: Peer, shape: Shape, variant: Variant, log: str) -> None:
    """Run ``peer.convert`` in the peer's environment."""
    from benchmarks.peers.worker import request

    text = json.dumps(request("convert", place, peer.name, shape.name, variant.name))
    place.run([peer.python(place), "-m", "benchmarks.peers.worker", text], log)
