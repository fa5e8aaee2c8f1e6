"""Which measurements a run consists of, and in what order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from benchmarks.peers.peer import Peer, Variant
from benchmarks.peers.tasks import TASKS
from benchmarks.peers.works import Work

WIDTHS = ("int4", "int8", "bf16", "f32")


@dataclass(frozen=True)
class Job:
    """A system with a model loaded does some tasks."""

    model: str
    system: str
    variant: Variant
    tasks: tuple[str, ...]

    @property
    def group(self) -> tuple[str, bool, str]:
        """Jobs with the same one are loaded together and take turns: model, whether held to AVX2, kind of weights."""
        width = self.variant.width
        return self.model, self.variant.isa == "avx2", "quantized" if width in ("int4", "int8") else width

    @property
    def family(self) -> str:
        """Variants of a system with the same family differ in a setting alone; only the best of them counts."""
        return str(self.variant.options.get("family", self.variant.name))

    def __str__(self) -> str:
        return f"{self.model} {self.system} {self.variant.name}"


def jobs(works: Sequence[Work], models: Sequence[str], systems: Mapping[str, Peer], own: str) -> list[Job]:
    """One job a model and variant, with what all works ask of it; what is compared stands together."""
    found = []
    for model in models:
        of_model = []
        for system, peer in systems.items():
            for variant in peer.variants:
                tasks = {task for work in works if takes_part(work, model, system, variant, own) for task in work.tasks}
                if tasks:
                    of_model.append(Job(model, system, variant, tuple(name for name in TASKS if name in tasks)))
        found += sorted(of_model, key=lambda job: (job.variant.isa == "avx2", WIDTHS.index(job.variant.width)))
    return found


def groups(all_jobs: Iterable[Job]) -> list[list[Job]]:
    """Jobs that take turns, in the order of ``jobs``."""
    return [list(group) for _, group in groupby(all_jobs, key=lambda job: job.group)]


def takes_part(work: Work, model: str, system: str, variant: Variant, own: str) -> bool:
    """Whether a variant of a system is measured for ``work``."""
    if model not in work.models or model not in variant.models:
        return False
    if system == own:
        return work.own(variant)
    return work.peers(variant) and (not work.systems or system in work.systems)


def turns(group: Sequence[Job], repeats: int) -> Iterator[tuple[int, str, Job]]:
    """Round by round, task by task, every job in turn: neighbours in time are compared with each other."""
    for number in range(repeats):
        for task in TASKS:
            if number >= (TASKS[task].rounds or repeats):
                continue
            for job in group:
                if task in job.tasks and number < (job.variant.rounds or repeats):
                    yield number, task, job
