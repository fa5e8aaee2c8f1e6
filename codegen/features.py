"""What a cost model gets to see of a kernel under a schedule: numbers by name, found without generating any code.

Counts and sizes come as logarithms, since times do; knobs come as they are. What only a family can tell (how many tasks,
what must fit a cache or the registers) its emitter adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from tilewright.codegen.kernel import Emitter
from tilewright.codegen.schedule import Schedule
from tilewright.codegen.target import Target
from tilewright.ir import Function, KVType, Value, eval_dim

Features = dict[str, float]


def describer(
    emitter: Emitter, kernel: Function, target: Target, sizes: Mapping[str, int], threads: int
) -> Callable[[Schedule], Features]:
    """A function from a schedule of ``emitter`` to the features of ``kernel`` under it, with dims of ``sizes``."""
    fixed = {**of_kernel(kernel, sizes), **target.facts, "threads": float(threads)}
    family = emitter.features(kernel, target, sizes)

    def describe(schedule: Schedule) -> Features:
        own = family(schedule)
        return {**fixed, **of_schedule(schedule), **own, **sharing(own.get("tasks", 1.0), threads)}

    return describe


def log2(number: float) -> float:
    """The logarithm of a count, 0 for none."""
    return math.log2(number) if number > 1 else 0.0


def of_kernel(kernel: Function, sizes: Mapping[str, int]) -> Features:
    """Work and traffic."""
    flops = sum(eval_dim(op.flops(), sizes) for op in kernel.body)
    read = sum(nbytes(value, sizes) for value in kernel.args)
    written = sum(nbytes(value, sizes) for value in kernel.returns if not isinstance(value.type, KVType))
    found: Features = {"flops": log2(flops), "read": log2(read), "written": log2(written)}
    return found | {"intensity": log2(1 + flops / max(read + written, 1)), "operations": float(len(kernel.body) - 1)}


def nbytes(value: Value, sizes: Mapping[str, int]) -> int:
    """Bytes of a tensor; of a cache, those of one sequence filled to the half."""
    if isinstance(value.type, KVType):
        cache = value.type
        return cache.heads * (cache.dim + cache.own_vdim) * cache.length * cache.dtype.bits // 16
    return math.prod(eval_dim(d, sizes) for d in value.shape) * value.dtype.bits // 8


def of_schedule(schedule: Schedule) -> Features:
    """Knobs as numbers, words by their place in the domain."""
    found = {}
    for key, domain in schedule.domains().items():
        value = getattr(schedule, key)
        found[f"knob.{key}"] = float(domain.index(value) if isinstance(value, str) else value)
    return found


def sharing(tasks: float, threads: int) -> Features:
    """How evenly threads share tasks: the time of the busiest relative to the mean."""
    rounds = math.ceil(tasks / threads)
    return {"tasks": log2(tasks), "imbalance": rounds * threads / max(tasks, 1.0)}
