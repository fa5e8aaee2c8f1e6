"""Masks that are read are right: what a mask is said to mean hides exactly the keys that it hides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tilewright.ir import ArraySource, Builder, DType, Function, Module, Return, TensorType, Value, interpret, ops, sym
from tilewright.ir.ops.attention import visible
from tilewright.passes import Pipeline

B, S = sym("B"), sym("S")
LONGEST = 16


def module(mask: np.ndarray, keep: Any) -> Module:
    """Attention of 2 heads whose mask is ``keep(builder, slice of the stored mask)``."""
    m = Module("m", dims={"B": (1, 4), "S": (1, LONGEST)})
    b = Builder(m.add(Function("forward")))
    q, k, v = (b.function.arg(n, TensorType((B, S, 2, 4), DType.f32)) for n in "qkv")
    stored = m.weight("mask", TensorType((1, 1, *mask.shape), DType.of(mask.dtype)), ArraySource(mask[None, None]))
    part = b.add(ops.Slice(stored, (0, 0, 0, 0), (1, 1, S, S), (1, 1, 1, 1)))
    b.insert(Return((b.add(ops.Attention(q, k, v, keep(b, part))),)))
    return m


def not_zero(b: Builder, x: Value) -> Value:
    return b.add(ops.Not(b.add(ops.Eq(x, b.full(0, x)))))


PLACES = np.arange(LONGEST)
KINDS: dict[str, tuple[np.ndarray, Any, dict[str, Any] | None]] = {
    "tril": (np.tril(np.ones((LONGEST, LONGEST), np.float32)), not_zero, {"causal": True, "window": -1}),
    "bool": (np.tri(LONGEST, dtype=bool), lambda b, x: x, {"causal": True, "window": -1}),
    "hidden": (~np.tri(LONGEST, dtype=bool), lambda b, x: b.add(ops.Not(x)), {"causal": True, "window": -1}),
    "window": (visible(PLACES, PLACES, True, 5, -1, 0), lambda b, x: x, {"causal": True, "window": 5}),
    "bytes": (np.tri(LONGEST, dtype=np.uint8), lambda b, x: b.add(ops.Cast(x, DType.bool)), {"causal": True}),
    "upper": (np.triu(np.ones((LONGEST, LONGEST), bool)), lambda b, x: x, None),
    "shifted": (np.tri(LONGEST, k=1, dtype=bool), lambda b, x: x, None),
    "odd": (np.tri(LONGEST, dtype=bool) ^ np.eye(LONGEST, k=-3, dtype=bool), lambda b, x: x, None),
    "nothing": (np.zeros((LONGEST, LONGEST), bool), lambda b, x: x, None),
    "oblong": (np.tri(LONGEST, LONGEST + 1, dtype=bool), lambda b, x: x, None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_masks_that_a_model_stores(kind: str) -> None:
    mask, keep, fields = KINDS[kind]
    m = module(mask, keep)
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(2, 11, 2, 4)).astype(np.float32) for _ in "qkv"]
    want = interpret(m, "forward", inputs)[0]
    Pipeline.parse("canonicalize,dce").run(m)
    (attention,) = m.ops(ops.Attention)
    assert (attention.attrs["causal"], getattr(attention, "mask", None) is None) == (fields is not None,) * 2
    if fields is not None:
        assert {k: attention.attrs[k] for k in fields} == fields
        assert not m.weights
    np.testing.assert_allclose(interpret(m, "forward", inputs)[0], want, rtol=1e-6, atol=1e-6)


POSITIONS = [
    ("le", 0, {"causal": True}),
    ("lt", 1, {"causal": True}),
    ("lt", 4, {"window_right": 4}),
    ("le", 2, {"window_right": 3}),
    ("gt", -4, {"window": 4}),
    ("ge", -4, {"window": 5}),
    ("ge", 0, {"window": 1}),
    ("lt", 0, None),
    ("le", -1, None),
    ("gt", 0, None),
    ("ge", 1, None),
    ("eq", 0, None),
]


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(("kind", "shift", "fields"), POSITIONS)
def test_masks_of_positions(kind: str, shift: int, fields: dict[str, Any] | None, mirrored: bool) -> None:
    """``key <kind> query + shift``, as it stands or as ``query + shift <mirrored kind> key``."""
    m = Module("m", dims={"B": (1, 4), "S": (1, 64)})
    b = Builder(m.add(Function("forward")))
    q, k, v = (b.function.arg(n, TensorType((B, S, 2, 4), DType.f32)) for n in "qkv")
    query = b.add(ops.Reshape(b.add(ops.Iota(S, DType.i64, shift)), (S, 1)))
    key = b.add(ops.Cast(b.add(ops.Iota(S, DType.i32)), DType.i64))
    kinds = {"le": (ops.Le, ops.Ge), "lt": (ops.Lt, ops.Gt), "gt": (ops.Gt, ops.Lt), "ge": (ops.Ge, ops.Le)}
    plain, other = kinds.get(kind, (ops.Eq, ops.Eq))
    mask = b.add(other(query, key) if mirrored else plain(key, query))
    b.insert(Return((b.add(ops.Attention(q, k, v, b.add(ops.Reshape(mask, (1, 1, S, S))))),)))
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(2, 9, 2, 4)).astype(np.float32) for _ in "qkv"]
    want = interpret(m, "forward", inputs)[0]
    Pipeline.parse("canonicalize,dce").run(m)
    (attention,) = m.ops(ops.Attention)
    defaults = {"causal": False, "window": -1, "window_right": -1, "chunk": 0}
    got = {name: attention.attrs[name] for name in defaults}
    assert got == {**defaults, **(fields or {})}
    np.testing.assert_allclose(interpret(m, "forward", inputs)[0], want, rtol=1e-6, atol=1e-6)
