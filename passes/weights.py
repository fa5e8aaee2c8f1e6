"""Weights made from weights. Their numbers are computed when the artifact is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tilewright.ir import (
    Computation,
    ComputedSource,
    Module,
    Op,
    PartSource,
    TensorType,
    Value,
    Weight,
    WeightSource,
    ops,
)
from tilewright.ir.sources import release


def derive(module: Module, name: str, type: TensorType, parts: Sequence[Weight], make: Callable[..., Any]) -> Weight:
    """A weight of ``type`` that ``make`` computes from the arrays of ``parts``; it has no data when a part has none.

    A taken ``name`` gets a number at the end.
    """
    sources = [p.source for p in parts if p.source is not None]
    source = ComputedSource(tuple(sources), make) if len(sources) == len(parts) else None
    return module.weight(free_name(module, name), type, source)


def derive_together(
    module: Module, names: Mapping[str, TensorType], part: Weight, make: Callable[[Any], Sequence[Any]]
) -> tuple[Weight, ...]:
    """The weights ``names``, which ``make`` computes from ``part`` all at once, in this order."""
    work = Computation(part.source, make) if part.source is not None else None
    return place(module, names, [PartSource(work, i) if work is not None else None for i in range(len(names))])


def place(module: Module, names: Mapping[str, TensorType], sources: Sequence[WeightSource | None]) -> tuple[Weight, ...]:
    """The weights ``names`` with their ``sources``; a taken name gets a number at the end."""
    return tuple(module.weight(free_name(module, n), t, s) for (n, t), s in zip(names.items(), sources, strict=True))


def given(source: WeightSource | None) -> Iterator[np.ndarray[Any, Any]]:
    """The arrays that ``source`` computes its numbers from, one at a time: what is in files is read and let go."""
    if isinstance(source, ComputedSource):
        for part in source.parts:
            yield from given(part)
    elif isinstance(source, PartSource):
        yield from given(source.computation.part)
    elif source is not None:
        yield source.load()
        release(source)


def free_name(module: Module, name: str) -> str:
    """``name``, or ``name.1``, ``name.2``, ... when that is taken."""
    unique, n = name, 0
    while unique in module.weights or unique in module.states:
        n += 1
        unique = f"{name}.{n}"
    return unique


def joined_name(names: Sequence[str]) -> str:
    """``a.q.weight``, ``a.k.weight`` -> ``a.q_k.weight``."""
    split = [n.split(".") for n in names]
    lead = _common(split)
    tail = _common([list(reversed(s[lead:])) for s in split])
    middle = [".".join(s[lead : len(s) - tail]) for s in split]
    last = split[0]
    return ".".join([*last[:lead], "_".join(middle), *last[len(last) - tail :]])


def _common(rows: Sequence[Sequence[str]]) -> int:
    """How many leading items all rows share, keeping one item of each apart."""
    shortest = min(map(len, rows)) - 1
    same = (i for i in range(shortest) if len({row[i] for row in rows}) > 1)
    return next(same, max(shortest, 0))


def as_weight(value: Value | None, rank: int) -> Weight | None:
    """``value`` as a weight of ``rank`` axes, if it is one."""
    return value if isinstance(value, Weight) and value.tensor.rank == rank else None


def weights_of(op: Op) -> dict[str, Weight | None]:
    """The weights of a linear or gated layer by field; None where one is computed."""
    names = ("weight",) if isinstance(op, ops.Linear) else ("gate", "up")
    return {name: as_weight(getattr(op, name), 2) for name in names}
