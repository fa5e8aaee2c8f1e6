"""Schedules: how a kernel is cut and ordered, without changing what it computes.

A schedule is a frozen dataclass whose fields are knobs with a declared domain; the space of schedules follows from the
declarations, and so does the text form ``linear{tile_m=6 tile_v=4 ...}`` that parses back. Constraints that tie knobs
together, or to the target, stand beside them as methods marked with ``@constraint``.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import numpy as np

from tilewright.codegen.target import CpuTarget
from tilewright.codegen.text import format_call, parse_call

_TRIES = 1000  # random schedules until one is valid


class ScheduleError(ValueError):
    """A schedule that is not in its space."""


def knob(default: Any, domain: Sequence[Any]) -> Any:
    """A field of a schedule: its default and the values it may take."""
    if default not in domain:
        raise ScheduleError(f"default {default} is not in the domain {tuple(domain)}")
    return field(default=default, metadata={"domain": tuple(domain)})


def constraint(check: Callable[[Any, CpuTarget], str | None]) -> Any:
    """Mark a method ``(self, target) -> reason | None`` as a constraint: a reason refuses the schedule."""
    check.is_constraint = True  # type: ignore[attr-defined]
    return check


@dataclass(frozen=True)
class Schedule:
    """Base of all schedules; a subclass sets ``name`` and declares knobs."""

    name: ClassVar[str]
    registry: ClassVar[dict[str, type["Schedule"]]] = {}

    def __init_subclass__(cls) -> None:
        Schedule.registry[cls.name] = cls

    @classmethod
    def domains(cls) -> dict[str, tuple[Any, ...]]:
        """Every knob with its values, in order of declaration."""
        return {f.name: f.metadata["domain"] for f in fields(cls)}

    @classmethod
    def default(cls, target: CpuTarget) -> Self:
        """A good schedule without measuring."""
        return cls()

    @classmethod
    def space(cls, target: CpuTarget) -> "Space":
        """All schedules that are valid on ``target``."""
        return Space(cls, target)

    def validate(self, target: CpuTarget) -> Self:
        """This schedule; ScheduleError names the knob outside its domain or the constraint that fails."""
        for key, domain in self.domains().items():
            if getattr(self, key) not in domain:
                raise ScheduleError(f"{self.name}: {key}={getattr(self, key)} is not one of {list(domain)}")
        if reason := self.refusal(target):
            raise ScheduleError(f"{self.text} on {target}: {reason}")
        return self

    def refusal(self, target: CpuTarget) -> str | None:
        """Why the combination of knobs cannot run on ``target``, or None."""
        checks = [check for check in vars(type(self)).values() if hasattr(check, "is_constraint")]
        return next((reason for check in checks if (reason := check(self, target))), None)

    @property
    def text(self) -> str:
        """Canonical text with every knob; ``parse_schedule`` gives an equal schedule back."""
        return format_call(self.name, {key: getattr(self, key) for key in self.domains()})

    def __str__(self) -> str:
        return self.text


class Space:
    """The valid schedules of one class on one target: iterable, to be sampled and searched.

    ``domains`` narrows knobs to the values that matter for a kernel; ``default`` is the schedule chosen by rule, whose
    values always belong to the space. ``refuse`` says, beside the constraints, why a schedule does not suit the kernel.
    """

    def __init__(
        self,
        kind: type[Schedule],
        target: CpuTarget,
        default: Schedule | None = None,
        domains: Mapping[str, Sequence[Any]] | None = None,
        refuse: Callable[[Any], str | None] | None = None,
    ) -> None:
        self.kind, self.target, self.refuse = kind, target, refuse
        self.default = default or kind.default(target)
        narrow = domains or {}
        self.domains = {
            key: tuple(v for v in values if v in narrow.get(key, values) or v == getattr(self.default, key))
            for key, values in kind.domains().items()
        }
        self.knobs = tuple(key for key, values in self.domains.items() if len(values) > 1)

    @property
    def product(self) -> int:
        """How many combinations there are before constraints."""
        return math.prod(len(domain) for domain in self.domains.values())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[Any]:
        for values in itertools.product(*self.domains.values()):
            schedule = self.kind(**dict(zip(self.domains, values)))
            if self.refusal(schedule) is None:
                yield schedule

    def __contains__(self, schedule: object) -> bool:
        if type(schedule) is not self.kind:
            return False
        inside = all(getattr(schedule, key) in values for key, values in self.domains.items())
        return inside and self.refusal(schedule) is None

    def refusal(self, schedule: Any) -> str | None:
        """Why a schedule whose knobs have values of their domains is not valid, or None."""
        return schedule.refusal(self.target) or (self.refuse(schedule) if self.refuse else None)

    def parse(self, text: str) -> Any:
        """The schedule that ``text`` names, None when it is not of this space."""
        try:
            schedule = parse_schedule(text)
        except ValueError:
            return None
        return schedule if schedule in self else None

    def sample(self, rng: np.random.Generator) -> Any:
        """Any schedule, all equally likely."""
        return self._valid(lambda: self.kind(**{key: _pick(values, rng) for key, values in self.domains.items()}))

    def mutate(self, schedule: Any, rng: np.random.Generator) -> Any:
        """``schedule`` with one knob moved, or two; the default where nothing can be moved."""

        def moved() -> Any:
            keys = rng.choice(len(self.knobs), min(1 + (rng.random() < 0.3), len(self.knobs)), replace=False)
            chosen = [self.knobs[i] for i in keys]
            return replace(schedule, **{key: self._other(key, getattr(schedule, key), rng) for key in chosen})

        return self._valid(moved) if self.knobs else self.default

    def cross(self, a: Any, b: Any, rng: np.random.Generator) -> Any:
        """Each knob from one of the two."""
        return self._valid(lambda: replace(a, **{key: getattr(_pick((a, b), rng), key) for key in self.knobs}))

    def _other(self, key: str, value: Any, rng: np.random.Generator) -> Any:
        return _pick([v for v in self.domains[key] if v != value], rng)

    def _valid(self, make: Callable[[], Any]) -> Any:
        """The first valid schedule of many tries, else the default."""
        tries = (make() for _ in range(_TRIES))
        return next((schedule for schedule in tries if self.refusal(schedule) is None), self.default)


def _pick(values: Sequence[Any], rng: np.random.Generator) -> Any:
    return values[int(rng.integers(len(values)))]


def parse_schedule(text: str) -> Schedule:
    """The schedule that ``text`` names; knobs left out take their defaults."""
    name, given = parse_call(text)
    kind = Schedule.registry.get(name)
    if kind is None:
        raise ScheduleError(f"unknown schedule {name!r}; known: {', '.join(sorted(Schedule.registry))}")
    domains = kind.domains()
    values = {}
    for key, word in given.items():
        if key not in domains:
            raise ScheduleError(f"{name} has no knob {key!r}; its knobs: {', '.join(domains)}")
        matches = [value for value in domains[key] if format_call("", {"": value}) == format_call("", {"": word})]
        if not matches:
            raise ScheduleError(f"{name}: {key}={word} is not one of {list(domains[key])}")
        values[key] = matches[0]
    return kind(**values)


def registers(target: CpuTarget) -> int:
    """Vector registers: 32 with AVX-512, otherwise 16."""
    return 32 if target.vector_bits == 512 else 16


@dataclass(frozen=True)
class LinearSchedule(Schedule):
    """``x @ weight.T``: register tile of ``tile_m`` rows by ``tile_v`` vectors, blocks of rows and of K around it.

    ``first``: which blocks a thread finishes before it goes on, those of a panel of the weight or those of the rows of x.
    """

    name: ClassVar[str] = "linear"
    tile_m: int = knob(6, (1, 2, 4, 5, 6, 8, 12, 14))
    tile_v: int = knob(4, (1, 2, 3, 4, 6))
    block_m: int = knob(96, (24, 48, 96, 144, 192, 240, 516))
    block_k: int = knob(1024, (128, 256, 512, 1024, 2048, 4096))
    unroll: int = knob(4, (1, 2, 4, 8))
    prefetch: int = knob(0, (0, 512, 1024, 2048, 4096, 8192))
    first: str = knob("panel", ("panel", "rows"))

    @classmethod
    def default(cls, target: CpuTarget) -> Self:
        return cls() if target.vector_bits == 512 else cls(tile_m=6, tile_v=2, block_k=256)

    @constraint
    def fits_registers(self, target: CpuTarget) -> str | None:
        needed = self.tile_m * self.tile_v + min(self.tile_v, 2) + 1
        have = registers(target)
        return f"a tile needs {needed} vector registers of {have}" if needed > have else None


_ENOUGH_TASKS = 16  # for threads to share a sequence's keys evenly


@dataclass(frozen=True)
class AttentionSchedule(Schedule):
    """Attention: rows (queries of one group of heads) a task holds at most, keys of a block, bytes fetched ahead.

    The rest is for decoding, where rows are few: bytes to fetch ahead, and parts that the keys of a head are cut into,
    so that all threads have work and equally much of it.
    """

    name: ClassVar[str] = "attention"
    rows: int = knob(64, (16, 32, 64, 128))
    keys: int = knob(256, (64, 128, 256, 512))
    prefetch: int = knob(0, (0, 1024, 4096, 8192, 16384))
    parts: int = knob(1, (1, 2, 4, 8, 16, 32))

    @classmethod
    def decoding(cls, target: CpuTarget, dtype: str, heads: int, group: int) -> Self:
        """For one query a head over a cache of ``dtype`` with so many heads, each for a group of query heads.

        The hardware fetches ahead well while little is computed between two lines, and along one memory page. Many rows
        take their sums from block to block, so blocks are larger.
        """
        parts = next((p for p in (1, 2, 4, 8) if p * heads >= _ENOUGH_TASKS), 16)
        if dtype in ("i8", "i4", "i2"):  # their kernel asks for memory by itself
            return cls(keys=128, parts=parts)
        many = group >= 16
        busy = many or (group >= 4 and (dtype == "f32" or target.vector_bits < 512))
        return cls(keys=256 if many else 64, prefetch=8192 if busy else 0, parts=parts)
