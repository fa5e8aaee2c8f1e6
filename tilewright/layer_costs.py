"""Seconds that linear layers of any size take for one row, measured on this machine: what ``prune-structured`` may ask for.

A few sizes are compiled and timed, what is between them is interpolated: an eighth of a size apart at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from tilewright.codegen.target import CpuTarget, Target
from tilewright.ir import Builder, DType, Function, Module, PassError, Return, TensorType, ops
from tilewright.passes.pipeline import Pipeline
from tilewright.runtime.host import default_threads

Time = Callable[[int, int, DType], float]
"""Seconds of a layer with a weight ``[rows, columns]`` of an element type."""
LEAST = 128
"""Rows and columns of the smallest layer that is timed; smaller ones cost their part of it."""
_BYTES = 1 << 26  # of weights that a run reads: more than caches hold, as the weights of a model are
_MOST = 32  # layers in a run
_REPEATS = 9


def layer_costs(target: Target, stored: str | None = None) -> Time:
    """Times of layers on this machine that are stored in the scheme ``stored``, or as they are.

    Raises PassError for a target that is no CPU, and for a scheme that does not exist.
    """
    if not isinstance(target, CpuTarget):
        raise PassError(f"cost=measured: layers are timed on CPUs, the target is {target.text}; take cost=bytes")
    passes = Pipeline.parse(f"quantize{{scheme={stored}}},cse,dce,kernels" if stored else "kernels")
    return Interpolated(lambda rows, columns, dtype: measured(target, passes, rows, columns, dtype))


@dataclass
class Interpolated:
    """``exact`` asked at few sizes only; times between them lie on lines. What was asked is kept."""

    exact: Time
    known: dict[tuple[int, int, DType], float] = field(default_factory=dict)

    def __call__(self, rows: int, columns: int, dtype: DType) -> float:
        share = min(rows / LEAST, 1.0) * min(columns / LEAST, 1.0)
        found = 0.0
        for n, part in corners(max(rows, LEAST)):
            for k, other in corners(max(columns, LEAST)):
                found += part * other * self.at(n, k, dtype) if part * other else 0.0
        return share * found

    def at(self, rows: int, columns: int, dtype: DType) -> float:
        key = rows, columns, dtype
        if key not in self.known:
            self.known[key] = self.exact(rows, columns, dtype)
        return self.known[key]


def corners(size: int) -> list[tuple[int, float]]:
    """The sizes that are timed around ``size``, with their parts: multiples of 128 and of an eighth of a power of two."""
    step = max(LEAST, (1 << size.bit_length() - 1) // 8)
    low = size // step * step
    part = (size - low) / step
    return [(low, 1 - part), (low + step, part)]


def measured(target: Target, passes: Pipeline, rows: int, columns: int, dtype: DType) -> float:
    """Seconds a layer, one row, all threads; the median of nine runs over layers that no cache holds together."""
    from tilewright.compiler import lower

    bytes = rows * columns * dtype.bits // 8
    count = min(_MOST, -(-_BYTES // bytes))
    done = lower(layers(rows, columns, dtype, count), passes, target)
    with done.session(default_threads()) as session:
        call = session.bind("forward", x=np.ones((1, columns), dtype.np))
        call()
        return median(timed(call) for _ in range(_REPEATS)) / count


def timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def layers(rows: int, columns: int, dtype: DType, count: int) -> Module:
    """``count`` layers with an input and weights of their own; weights are views of few numbers until they are stored."""
    rng = np.random.default_rng(0)
    module = Module("layers")
    function = module.add(Function("forward"))
    x = function.arg("x", TensorType((1, columns), dtype))
    b = Builder(function)
    array = rng.standard_normal((rows, columns), np.float32).astype(dtype.np)
    results = [b(ops.Linear, x, module.constant(array, f"w{i}")) for i in range(count)]
    b.insert(Return(tuple(results)))
    return module
