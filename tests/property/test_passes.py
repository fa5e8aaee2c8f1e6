"""Passes on random graphs: results stay, the text form still round-trips, and a second run has nothing left to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.ir import (
    ArraySource,
    Builder,
    Dim,
    DType,
    Function,
    Module,
    Return,
    TensorType,
    Value,
    as_dim,
    eval_dim,
    interpret,
    parse_module,
    print_module,
    product,
    same_dim,
    sym,
    verify,
)
from tilewright.ir import ops as o
from tilewright.passes import Pipeline

B, S = sym("B"), sym("S")
SIZES = st.sampled_from([B, S, 1, 2, 3, 4])
NUMBERS = st.sampled_from([0.0, 1.0, -1.0, 2.0, 0.5, 3.0, 0.7])
UNARY = [o.Neg, o.Abs, o.Tanh, o.Sigmoid, o.Relu, o.Cos, o.Erf, o.Sqrt, o.Reciprocal, o.Rsqrt]
PIPELINES = ["canonicalize", "fold,dce", "cse", "clean", "clean,fusions", "fuse-norm,fuse-rope,fuse-attention,fuse-gate-up"]


class Graph:
    """A function in the making: float values to draw from, each step adds one."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.module = Module("m", dims={"B": (1, 8), "S": (1, 8)})
        self.function = self.module.add(Function("forward"))
        self.b = Builder(self.function)
        shapes = [(B, S, 4), tuple(draw(st.lists(SIZES, min_size=1, max_size=3))), (S,)]
        self.pool: list[Value] = [self.function.arg(f"x{i}", TensorType(s, DType.f32)) for i, s in enumerate(shapes)]

    def pick(self) -> Value:
        return self.draw(st.sampled_from(self.pool))

    def number(self, value: float) -> Value:
        return self.b.add(o.Full((), value, DType.f32))

    def weight(self, *shape: Dim) -> Value:
        rng = np.random.default_rng(len(self.module.weights))
        sizes = [int(d) for d in shape]
        name = f"w{len(self.module.weights)}"
        return self.module.weight(name, TensorType(shape, DType.f32), ArraySource(rng.normal(size=sizes).astype("f4")))


def unary(g: Graph, x: Value) -> Any:
    kind = g.draw(st.sampled_from(UNARY))
    safe = kind in (o.Sqrt, o.Reciprocal, o.Rsqrt)
    return kind(g.b.add(o.Add(g.b.add(o.Abs(x)), g.number(1.0))) if safe else x)


def with_number(g: Graph, x: Value) -> Any:
    number = g.number(g.draw(NUMBERS))
    kind = g.draw(st.sampled_from([o.Add, o.Sub, o.Mul, o.Maximum, o.Minimum]))
    if g.draw(st.booleans()):
        return o.Pow(g.b.add(o.Abs(x)), g.number(g.draw(st.sampled_from([1.0, 2.0, 3.0, 0.5]))))
    return kind(x, number) if g.draw(st.booleans()) else kind(number, x)


def binary(g: Graph, x: Value) -> Any:
    fits = [y for y in g.pool if _broadcasts(x.shape, y.shape)]
    y = g.draw(st.sampled_from(fits))
    if g.draw(st.booleans()):
        return o.Where(g.b.add(g.draw(st.sampled_from([o.Lt, o.Ge]))(x, y)), x, y)
    return g.draw(st.sampled_from([o.Add, o.Mul, o.Sub]))(x, y)


def _broadcasts(a: Any, b: Any) -> bool:
    return all(x == 1 or y == 1 or same_dim(x, y) for x, y in zip(a[::-1], b[::-1]))


def transpose(g: Graph, x: Value) -> Any:
    return o.Transpose(x, tuple(g.draw(st.permutations(range(x.tensor.rank)))))


def reshape(g: Graph, x: Value) -> Any:
    shape, i = list(x.shape), g.draw(st.integers(0, x.tensor.rank))
    match g.draw(st.sampled_from(["one", "join", "split", "squeeze", "flat"])):
        case "join" if i + 1 < len(shape):
            shape[i : i + 2] = [as_dim(shape[i] * shape[i + 1])]
        case "split" if i < len(shape) and shape[i] == 4:
            shape[i : i + 1] = [2, 2]
        case "squeeze" if i < len(shape) and shape[i] == 1:
            del shape[i]
        case "flat":
            shape = [product(shape)]
        case _ if len(shape) < 5:
            shape.insert(i, 1)
    return o.Reshape(x, tuple(shape))


def broadcast(g: Graph, x: Value) -> Any:
    sizes = [g.draw(SIZES) if d == 1 else d for d in x.shape]
    return o.Broadcast(x, (*g.draw(st.lists(SIZES, max_size=1)), *sizes) if len(sizes) < 4 else tuple(sizes))


def cut(g: Graph, x: Value) -> Any:
    starts, stops, steps = [], [], []
    for d in x.shape:
        start = g.draw(st.integers(0, d - 1)) if isinstance(d, int) and d > 1 else 0
        stop = g.draw(st.integers(start + 1, d)) if isinstance(d, int) and d > 1 else d
        starts, stops, steps = [*starts, start], [*stops, stop], [*steps, g.draw(st.sampled_from([1, 1, 2]))]
    return o.Slice(x, tuple(starts), tuple(stops), tuple(steps))


def concat(g: Graph, x: Value) -> Any:
    axis = g.draw(st.integers(0, x.tensor.rank - 1))
    same = [y for y in g.pool if _same_but(x.shape, y.shape, axis)]
    return o.Concat((x, *g.draw(st.lists(st.sampled_from(same), max_size=2))), axis)


def _same_but(a: Any, b: Any, axis: int) -> bool:
    return len(a) == len(b) and all(same_dim(x, y) for i, (x, y) in enumerate(zip(a, b)) if i != axis)


def reduce(g: Graph, x: Value) -> Any:
    axis, keep = g.draw(st.integers(0, x.tensor.rank - 1)), g.draw(st.booleans())
    if g.draw(st.booleans()):
        return o.Softmax(x, axis)
    return o.Reduce(x, g.draw(st.sampled_from(["sum", "mean", "max"])), (axis,), keep)


def layer(g: Graph, x: Value) -> Any:
    k = x.shape[-1]
    if not isinstance(k, int):
        return o.Abs(x)
    match g.draw(st.sampled_from(["linear", "matmul", "biased", "norm", "gated"])):
        case "matmul" if x.tensor.rank >= 2:
            return o.Matmul(x, g.weight(k, 4))
        case "biased":
            return o.Add(g.b.add(o.Linear(x, g.weight(4, k))), g.weight(4))
        case "norm":
            return o.RmsNorm(x, g.weight(k))
        case "gated":
            return o.Mul(g.b.add(o.Silu(g.b.add(o.Linear(x, g.weight(4, k))))), g.b.add(o.Linear(x, g.weight(4, k))))
    return o.Linear(x, g.weight(4, k))


def positions(g: Graph, x: Value) -> Any:
    """x shifted by an iota along its last axis."""
    index = g.b.add(o.Cast(g.b.add(o.Iota(x.shape[-1], DType.i64, g.draw(st.integers(-2, 2)), 2)), DType.f32))
    return o.Add(x, g.b.add(o.Mul(index, g.number(g.draw(NUMBERS)))))


def casts(g: Graph, x: Value) -> Any:
    wide = g.b.add(o.Cast(x, DType.f64))
    return o.Cast(g.b.add(o.Neg(wide)) if g.draw(st.booleans()) else wide, DType.f32)


STEPS: list[Callable[[Graph, Value], Any]] = [
    unary, with_number, binary, transpose, transpose, reshape, reshape, broadcast, cut, concat, reduce, layer,
    positions, casts,
]  # fmt: skip


@st.composite
def graphs(draw: st.DrawFn) -> Module:
    g = Graph(draw)
    for _ in range(draw(st.integers(1, 12))):
        x = g.pick()
        step = draw(st.sampled_from(STEPS)) if x.shape else unary
        g.pool.append(g.b.add(step(g, x)))
    outputs = draw(st.lists(st.sampled_from(g.pool[3:]), min_size=1, max_size=3))
    g.b.insert(Return((g.pool[-1], *outputs)))
    return g.module


def run(module: Module, sizes: dict[str, int]) -> list[Any]:
    rng = np.random.default_rng(0)
    shapes = [[eval_dim(d, sizes) for d in a.shape] for a in module.functions["forward"].args]
    return interpret(module, "forward", [rng.normal(size=s).astype(np.float32) for s in shapes])


@pytest.mark.parametrize("pipeline", PIPELINES)
@settings(max_examples=150)
@given(graphs(), st.integers(1, 3), st.integers(1, 4))
def test_results_stay(pipeline: str, module: Module, b: int, s: int) -> None:
    verify(module)
    sizes = {"B": b, "S": s}
    want = run(module, sizes)
    Pipeline.parse(pipeline).run(module)
    assert parse_module(print_module(module)) == module
    for x, y in zip(want, run(module, sizes), strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(x).max(initial=0.0))))


@settings(max_examples=100)
@given(graphs())
def test_canonical_form_is_stable(module: Module) -> None:
    pipeline = Pipeline.parse("canonicalize")
    pipeline.run(module)
    text = print_module(module)
    pipeline.run(module)
    assert print_module(module) == text
