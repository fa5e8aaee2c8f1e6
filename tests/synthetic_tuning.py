"""Kernels that exist as a formula only: spaces whose best schedule is known, and a runner that answers at once.

The formulas have what makes real schedules hard to choose: register tiles that spill, blocks that leave a cache, rows that
do not divide, a memory limit that hides all of it for some sizes. Noise is 3 %, drawn from a hash of the schedule.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from tilewright.costmodel.features import Sample, Trials
from tilewright.costmodel.workload import Choice, Measurement, Task, Workload

NOISE = 0.03
Knobs = dict[str, int]


def draw(values: Sequence[Any], rng: np.random.Generator) -> Any:
    return values[int(rng.integers(len(values)))]


@dataclass(frozen=True)
class ToyChoice:
    """A value for each knob."""

    family: str
    values: tuple[tuple[str, int], ...]

    @cached_property
    def text(self) -> str:
        return f"{self.family}{{{' '.join(f'{name}={value}' for name, value in self.values)}}}"


@dataclass(frozen=True)
class Family:
    """Knobs with their domains, which combinations are valid, the seconds of one, and facts that describe it."""

    name: str
    domains: Mapping[str, tuple[int, ...]]
    default: Knobs
    sizes: tuple[str, ...]
    facts: Callable[[Knobs, Knobs], dict[str, float]]
    seconds: Callable[[dict[str, float]], float]
    registers: Callable[[Knobs], int] = lambda knobs: 0


class ToySpace:
    """Implements ``costmodel.workload.Space``."""

    def __init__(self, family: Family) -> None:
        self.family = family

    @property
    def default(self) -> ToyChoice:
        return self.choice(self.family.default)

    def choice(self, knobs: Knobs) -> ToyChoice:
        return ToyChoice(self.family.name, tuple((name, knobs[name]) for name in self.family.domains))

    def valid(self, choice: ToyChoice) -> bool:
        return self.family.registers(dict(choice.values)) <= 48  # more than the 32 there are: some spill

    def __iter__(self) -> Iterator[ToyChoice]:
        names = list(self.family.domains)
        for values in itertools.product(*self.family.domains.values()):
            if self.valid(choice := self.choice(dict(zip(names, values)))):
                yield choice

    def parse(self, text: str) -> ToyChoice | None:
        name, _, rest = text.rstrip("}").partition("{")
        if name != self.family.name:
            return None
        return self.choice({key: int(value) for key, value in (word.split("=") for word in rest.split())})

    def sample(self, rng: np.random.Generator) -> ToyChoice:
        while True:
            choice = self.choice({k: draw(domain, rng) for k, domain in self.family.domains.items()})
            if self.valid(choice):
                return choice

    def mutate(self, choice: Choice, rng: np.random.Generator) -> ToyChoice:
        knobs = dict(self.parse(choice.text).values)
        while True:
            moved = dict(knobs)
            for _ in range(int(rng.integers(1, 3))):
                name = draw(tuple(knobs), rng)
                moved[name] = draw(self.family.domains[name], rng)
            if self.valid(result := self.choice(moved)):
                return result

    def cross(self, a: Choice, b: Choice, rng: np.random.Generator) -> ToyChoice:
        left, right = dict(self.parse(a.text).values), dict(self.parse(b.text).values)
        mixed = self.choice({name: (left if rng.random() < 0.5 else right)[name] for name in left})
        return mixed if self.valid(mixed) else self.choice(left)


def _linear_facts(sizes: Knobs, k: Knobs) -> dict[str, float]:
    m, n, depth = sizes["m"], sizes["n"], sizes["k"]
    rows = math.ceil(m / k["tile_m"]) * k["tile_m"]
    columns = math.ceil(n / (16 * k["tile_v"])) * 16 * k["tile_v"]
    block = min(k["block_k"], depth)
    return {
        **{f"size_{name}": value for name, value in sizes.items()},
        **{f"knob_{name}": value for name, value in k.items()},
        "flops": 2.0 * rows * columns * depth,
        "waste": rows * columns / (m * n),
        "bytes": 4.0 * n * depth,
        "registers": k["tile_m"] * k["tile_v"] + k["tile_v"] + 1.0,
        "panel_bytes": 4.0 * block * 16 * k["tile_v"],
        "loads_per_fma": (k["tile_m"] + k["tile_v"]) / (k["tile_m"] * k["tile_v"]),
        "store_bytes": 4.0 * m * n * math.ceil(depth / block),
    }


def _linear_seconds(f: dict[str, float]) -> float:
    efficiency = 1 / (1 + 0.9 * max(0.0, f["loads_per_fma"] - 0.5))
    efficiency *= 1 / (1 + 0.15 * max(0.0, f["registers"] - 32))
    efficiency *= min(1.0, 0.3 + f["knob_tile_m"] * f["knob_tile_v"] / 10)  # latency of an fma hidden
    efficiency *= {1: 0.8, 2: 0.92, 4: 1.0, 8: 0.97}[int(f["knob_unroll"])]
    over = max(0.0, math.log2(f["panel_bytes"] / 32768))
    efficiency /= 1 + 0.2 * over
    computing = f["flops"] / (2.4e11 * efficiency)
    ahead = {0: 0.7, 512: 0.85, 2048: 1.0, 8192: 0.9}[int(f["knob_prefetch"])]
    reading = f["bytes"] / (38e9 * ahead) * (1.0 if f["knob_order"] or f["size_m"] < 8 else 1.25)
    return max(computing, reading) + 0.3 * min(computing, reading) + f["store_bytes"] / 60e9


def _attention_facts(sizes: Knobs, k: Knobs) -> dict[str, float]:
    tasks = sizes["heads"] * k["parts"] * math.ceil(sizes["q"] / k["rows"])
    return {
        **{f"size_{name}": value for name, value in sizes.items()},
        **{f"knob_{name}": value for name, value in k.items()},
        "tasks": tasks,
        "bytes": 512.0 * sizes["heads"] * sizes["keys"],
        "block_bytes": 512.0 * k["keys"],
        "merges": float(tasks * (k["parts"] > 1)),
        "uneven": math.ceil(tasks / 2) * 2 / tasks,
    }


def _attention_seconds(f: dict[str, float]) -> float:
    reading = f["bytes"] / 40e9 * math.ceil(f["size_q"] / f["knob_rows"]) * f["uneven"]
    reading *= {0: 1.3, 1024: 1.1, 4096: 1.0, 8192: 1.05, 16384: 1.15}[int(f["knob_prefetch"])]
    computing = f["bytes"] * f["size_q"] / 2e11 * (1 + 0.1 * abs(math.log2(f["block_bytes"] / 65536)))
    return reading + computing + 2e-7 * f["merges"] + 1e-7 * f["tasks"]


def _loops_facts(sizes: Knobs, k: Knobs) -> dict[str, float]:
    return {
        **{f"size_{name}": value for name, value in sizes.items()},
        **{f"knob_{name}": value for name, value in k.items()},
        "bytes": 8.0 * sizes["rows"] * sizes["width"],
        "tasks": math.ceil(sizes["rows"] / k["block"]),
        "tail": (sizes["width"] % (16 * k["vectors"])) / sizes["width"],
    }


def _loops_seconds(f: dict[str, float]) -> float:
    work = f["bytes"] / 50e9 * (1 + 2 * f["tail"]) * (1 + 0.08 * abs(math.log2(f["knob_vectors"] * f["knob_unroll"] / 8)))
    return work + 1.5e-7 * f["tasks"] + 1e-10 * f["size_width"] * f["knob_block"]


FAMILIES = {
    "linear": Family(
        "linear",
        {
            "tile_m": (1, 2, 4, 6, 8, 12),
            "tile_v": (1, 2, 3, 4, 6),
            "block_k": (128, 256, 512, 1024, 2048, 4096),
            "unroll": (1, 2, 4, 8),
            "prefetch": (0, 512, 2048, 8192),
            "order": (0, 1),
        },
        {"tile_m": 6, "tile_v": 4, "block_k": 1024, "unroll": 1, "prefetch": 0, "order": 0},
        ("m", "n", "k"),
        _linear_facts,
        _linear_seconds,
        lambda k: k["tile_m"] * k["tile_v"] + k["tile_v"] + 1,
    ),
    "attention": Family(
        "attention",
        {
            "rows": (16, 32, 64, 128),
            "keys": (64, 128, 256, 512),
            "prefetch": (0, 1024, 4096, 8192, 16384),
            "parts": (1, 2, 4, 8, 16, 32),
        },
        {"rows": 64, "keys": 256, "prefetch": 0, "parts": 1},
        ("heads", "q", "keys"),
        _attention_facts,
        _attention_seconds,
    ),
    "loops": Family(
        "loops",
        {"block": (1, 2, 4, 8, 16, 32, 64), "unroll": (1, 2, 4, 8), "vectors": (1, 2, 3, 4)},
        {"block": 1, "unroll": 1, "vectors": 1},
        ("rows", "width"),
        _loops_facts,
        _loops_seconds,
    ),
}


def workload(family: str, *sizes: int) -> Workload:
    names = FAMILIES[family].sizes
    return Workload(family, f"module @{family} {{}}", tuple(zip(names, sizes)), "cpu{arch=znver5}", 2, "toy")


def facts(w: Workload, choice: Choice) -> dict[str, float]:
    """The features of a schedule."""
    family = FAMILIES[w.family]
    words = choice.text.rstrip("}").split("{")[1].split()
    return family.facts(dict(w.sizes), {key: int(value) for key, value in (word.split("=") for word in words)})


def true_seconds(w: Workload, choice: Choice) -> float:
    return FAMILIES[w.family].seconds(facts(w, choice))


@lru_cache
def optimum(w: Workload) -> float:
    """Seconds of the best schedule of all, without noise."""
    return min(true_seconds(w, choice) for choice in ToySpace(FAMILIES[w.family]))


def crashes(text: str) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest()[:4], 16) % 40 == 0


def measure(w: Workload, choice: Choice, drift: float = 1.0) -> Measurement:
    """As a runner would; the baseline is the default."""
    space = ToySpace(FAMILIES[w.family])
    if crashes(choice.text) and choice.text != space.default.text:
        return Measurement(choice.text, "crashed", error="signal 11")
    digest = hashlib.sha256((w.key + choice.text).encode()).digest()
    noise = float(np.random.default_rng(list(digest)).normal(0, NOISE))
    described = facts(w, choice)
    return Measurement(
        choice.text,
        "ok",
        seconds=true_seconds(w, choice) * math.exp(noise) * drift,
        spread=NOISE,
        repeats=20,
        baseline=true_seconds(w, space.default) * drift,
        metrics={
            "spills": max(0.0, described.get("registers", 0) - 32),
            "vector_registers": min(32.0, described.get("registers", 8)),
            "code_bytes": 400 + 90 * described.get("registers", 8) * described.get("knob_unroll", 1),
            "bytes_moved": described["bytes"] + described.get("store_bytes", 0),
        },
    )


class ToyRunner:
    """Implements ``costmodel.workload.Runner``; the machine grows slower by 1 % a call, up to 30 %."""

    def __init__(self) -> None:
        self.calls = 0

    def measure(
        self, workload: Workload, baseline: str, schedules: Sequence[str], effort: float = 1.0
    ) -> list[Measurement]:
        self.calls += 1
        space = ToySpace(FAMILIES[workload.family])
        return [measure(workload, space.parse(text), 1 + 0.01 * min(30, self.calls)) for text in schedules]


def task(w: Workload, weight: float = 1.0) -> Task:
    return Task(w, ToySpace(FAMILIES[w.family]), lambda choice: facts(w, choice), weight, name=f"{w.family}{w.sizes}")


def random_workload(family: str, rng: np.random.Generator) -> Workload:
    match family:
        case "linear":
            m = int(rng.choice((1, 1, 2, 4, 8, 16, 37, 64, 128, 200, 512)))
            return workload(family, m, *(int(64 * rng.integers(4, 128)) for _ in range(2)))
        case "attention":
            queries = int(rng.choice((1, 1, 16, 100, 512)))
            return workload(family, int(rng.integers(1, 33)), queries, int(rng.integers(64, 8192)))
        case _:
            return workload(family, int(rng.choice((1, 4, 32, 200, 1024))), int(16 * rng.integers(4, 512)))


def trials(w: Workload, count: int, seed: int = 0) -> Trials:
    """The default and ``count - 1`` other schedules, measured."""
    rng, space = np.random.default_rng([seed, int(w.key[:8], 16)]), ToySpace(FAMILIES[w.family])
    chosen = {space.default.text: space.default}
    while len(chosen) < count:
        choice = space.sample(rng)
        chosen[choice.text] = choice
    samples = tuple(Sample(facts(w, choice), measure(w, choice)) for choice in chosen.values())
    return Trials(w, samples, default=space.default.text)


def many_trials(workloads: Mapping[str, int], seed: int = 0, least: int = 10, most: int = 60) -> list[Trials]:
    """``workloads`` of each family, of random sizes, with ``least`` to ``most`` schedules each."""
    rng = np.random.default_rng(seed)
    result: dict[str, Trials] = {}
    for family, count in workloads.items():
        wanted = len(result) + count
        while len(result) < wanted:
            w = random_workload(family, rng)
            result[w.key] = trials(w, int(rng.integers(least, most + 1)), seed)
    return list(result.values())
