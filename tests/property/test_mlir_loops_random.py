"""Random chains of operations: a loop kernel gives what the interpreter gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.backend.loops_harness import EMITTER, TARGETS, Native, check, kernel_of, random_array
from tilewright.ir import Builder, DType, Value, ops, product, sym

S = sym("S")
Step = Callable[[Builder, Value, Value], Value]


@dataclass(frozen=True)
class Named:
    """A step that prints as its name."""

    name: str
    apply: Step

    def __repr__(self) -> str:
        return self.name


def _reshape(split: int) -> Step:
    def apply(b: Builder, x: Value, other: Value) -> Value:
        last = x.shape[-1]
        if len(x.shape) > 2 and split == 1:
            return b(ops.Reshape, x, (*x.shape[:-2], product(x.shape[-2:])))
        return b(ops.Reshape, x, (*x.shape[:-1], last // split, split)) if last % split == 0 else x

    return apply


def _transpose(b: Builder, x: Value, other: Value) -> Value:
    rank = len(x.shape)
    return b(ops.Transpose, x, (*range(rank - 2), rank - 1, rank - 2))


def _slice(b: Builder, x: Value, other: Value) -> Value:
    last = x.shape[-1]
    if not isinstance(last, int) or last < 6:
        return x
    lead = x.shape[:-1]
    return b(ops.Slice, x, (*(0 for _ in lead), 1), (*lead, last - 2), (*(1 for _ in lead), 2 if last % 2 else 1))


def _concat(b: Builder, x: Value, other: Value) -> Value:
    return b(ops.Concat, (x, b(ops.Neg, x)), len(x.shape) - 1)


def _pad(b: Builder, x: Value, other: Value) -> Value:
    lead = [0] * (len(x.shape) - 1)
    return b(ops.Pad, x, (*lead, 2), (*lead, 1), 0.5)


def _rows(kind: type) -> Step:
    def apply(b: Builder, x: Value, other: Value) -> Value:
        axis = len(x.shape) - 1
        return b(kind, x, axis) if kind is ops.Softmax else b(kind, x)

    return apply


def _reduce(fn: str, axis: int) -> Step:
    def apply(b: Builder, x: Value, other: Value) -> Value:
        total = b(ops.Reduce, x, fn, (len(x.shape) - 1 if axis else 0,), True)
        return b(ops.Sub, x, total)

    return apply


def _binary(b: Builder, x: Value, other: Value) -> Value:
    """With the second argument, when its last axis still fits."""
    return b(ops.Mul, x, other) if x.shape[-1] == other.shape[-1] else b(ops.Add, x, x)


def _where(b: Builder, x: Value, other: Value) -> Value:
    return b(ops.Where, b(ops.Gt, x, b.full(0.0, x)), x, b(ops.Tanh, x))


STEPS = [
    Named("split2", _reshape(2)), Named("split3", _reshape(3)), Named("merge", _reshape(1)), Named("swap", _transpose),
    Named("slice", _slice), Named("concat", _concat), Named("pad", _pad), Named("softmax", _rows(ops.Softmax)),
    Named("rms", _rows(ops.RmsNorm)), Named("norm", _rows(ops.LayerNorm)), Named("max", _reduce("max", 1)),
    Named("sum", _reduce("mean", 0)), Named("mul", _binary), Named("where", _where),
    Named("sigmoid", lambda b, x, other: b(ops.Sigmoid, x)), Named("neg", lambda b, x, other: b(ops.Neg, x)),
    Named("cast", lambda b, x, other: b(ops.Cast, b(ops.Cast, x, DType.f64), DType.f32)),
]  # fmt: skip


@given(
    st.lists(st.sampled_from(STEPS), min_size=1, max_size=6),
    st.sampled_from([1, 4, 12, 16, 21, 48]),
    st.sampled_from(TARGETS),
    st.booleans(),
)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_random_chains(steps: list[Named], width: int, target, both: bool) -> None:
    def build(b: Builder, x: Value, other: Value) -> list[Value]:
        made = [x]
        for step in steps:
            made.append(step.apply(b, made[-1], other))
        same = [v for v in made[1:-1] if v.shape == made[-1].shape]
        return [made[-1], *(same[:1] if both else [])]

    kernel = kernel_of(build, ((S, 3, width), "f32"), ((width,), "f32"))
    if EMITTER.match(kernel, target) is not None:
        return
    native = Native(kernel, target)
    rng = np.random.default_rng(3)
    for size in (1, 2, 19):
        check(native, [random_array(rng, (size, 3, width), "f32"), random_array(rng, (width,), "f32")], 1e-4)
