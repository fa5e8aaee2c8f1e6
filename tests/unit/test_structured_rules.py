"""Indices of axes that belong together: a shrunk graph computes what the whole one does with zeros in their place."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tilewright.ir import (
    ArraySource,
    Builder,
    DType,
    Function,
    Loc,
    Module,
    Return,
    TensorType,
    Value,
    interpret,
    ops,
    sym,
    verify,
)
from tilewright.passes.structured.groups import Group, Kind, find_groups
from tilewright.passes.structured.shrink import shrink

Array = np.ndarray[Any, Any]
B, S, H = sym("B"), sym("S"), 8
Middle = Callable[["Net", Value], Value]


class Net:
    """``@forward(x[B, S, 8])``: a layer of ``rows``, ``middle``, and a layer that reads what comes out."""

    def __init__(self, rows: int, middle: Middle, reader: type[ops.Linear | ops.GatedLinear] = ops.Linear) -> None:
        self.module = Module("net", dims={"B": (1, 4), "S": (1, 16)})
        self.rng = np.random.default_rng(0)
        function = self.module.add(Function("forward"))
        x = function.arg("x", TensorType((B, S, H), DType.f32))
        self.b = Builder(function, loc=Loc("net"))
        y = middle(self, self.layer(x, rows, bias=True))
        k = int(y.shape[-1])
        weights = [self.weight(H, k) for _ in range(1 if reader is ops.Linear else 2)]
        out = self.b(reader, y, *weights, loc=Loc("reader"))
        self.reader: Any = out.owner
        self.b.insert(Return((out,)))
        verify(self.module)

    def weight(self, *shape: int) -> Value:
        return self.module.constant(self.rng.standard_normal(shape).astype(np.float32), "w")

    def layer(self, x: Value, rows: int, bias: bool = False) -> Value:
        return self.b(ops.Linear, x, self.weight(rows, int(x.shape[-1])), self.weight(rows) if bias else None)

    def split(self, x: Value, heads: int) -> Value:
        return self.b(ops.Reshape, x, (B, S, heads, int(x.shape[-1]) // heads))

    def join(self, x: Value) -> Value:
        return self.b(ops.Reshape, x, (B, S, int(x.shape[2]) * int(x.shape[3])))

    def part(self, x: Value, start: int, stop: int, axis: int = -1) -> Value:
        rank = x.tensor.rank
        axis %= rank
        starts = [start if i == axis else 0 for i in range(rank)]
        stops = [stop if i == axis else d for i, d in enumerate(x.shape)]
        return self.b(ops.Slice, x, starts, stops, (1,) * rank)

    def groups(self, *kinds: Kind) -> tuple[list[Group], list[str]]:
        skips: list[str] = []
        function = self.module.functions["forward"]
        return find_groups(function, kinds or ("channels", "heads"), lambda op, why: skips.append(why)), skips

    def run(self, seed: int = 5) -> Array:
        x = np.random.default_rng(seed).standard_normal((2, 5, H)).astype(np.float32)
        return interpret(self.module, "forward", [x])[0]

    def check(self, group: Group, gone: Array) -> None:
        """Zeros in the columns that read ``gone`` and the smaller graph give the same."""
        for reader in group.readers:
            for weight in reader.operands[1:]:
                array = weight.load().copy()
                array[:, np.isin(group.columns(reader), gone)] = 0
                weight.source = ArraySource(array)
        want = self.run()
        shrink(self.module, self.module.functions["forward"], group.kept(gone))
        verify(self.module)
        np.testing.assert_allclose(self.run(), want, atol=1e-4, rtol=1e-4)


def chain(net: Net, x: Value) -> Value:
    scaled = net.b(ops.Mul, net.b(ops.GeluTanh, x), net.weight(12))
    shifted = net.b(ops.Add, scaled, net.b(ops.Broadcast, net.b(ops.Full, (), 0.5, DType.f32), (12,)))
    return net.b(ops.Where, net.b(ops.Gt, shifted, net.b(ops.Full, (1,), 0.0, DType.f32)), shifted, x)


def gated(net: Net, x: Value) -> Value:
    return net.b(ops.GatedLinear, x, net.weight(12, 6), net.weight(12, 6), net.weight(12), None, act="silu")


def merged(net: Net, x: Value) -> Value:
    flat = net.b(ops.Relu, net.b(ops.Reshape, x, (B * S, 12)))
    return net.b(ops.Reshape, flat, (B, S, 12))


def moved(net: Net, x: Value) -> Value:
    turned = net.b(ops.Transpose, x, (2, 0, 1))
    grown = net.b(ops.Pad, turned, (0, 0, 1), (0, 0, 0))
    back = net.b(ops.Slice, grown, (0, 0, 1), (12, B, S + 1), (1, 1, 1))
    return net.b(ops.Transpose, back, (1, 2, 0))


def halves(net: Net, x: Value) -> Value:
    """The two halves of a layer change places."""
    return net.b(ops.Concat, (net.part(x, 6, 12), net.part(x, 0, 6)), 2)


def normed(net: Net, x: Value) -> Value:
    heads = net.b(ops.RmsNorm, net.split(x, 4), net.weight(3))
    centred = net.b(ops.Sub, heads, net.b(ops.Reduce, heads, "mean", (3,), True))
    return net.join(net.b(ops.Softmax, centred, 3))


@pytest.mark.parametrize("middle", [chain, gated, merged, moved, halves])
@pytest.mark.parametrize("reader", [ops.Linear, ops.GatedLinear])
def test_channels(middle: Middle, reader: Any) -> None:
    net = Net(6 if middle is gated else 12, middle, reader)
    groups, _ = net.groups()
    groups = [g for g in groups if net.reader in g.readers]
    assert [(g.kind, g.count) for g in groups] == [("channels", 6)] * 2 if middle is halves else [("channels", 12)]
    net.check(groups[-1], np.array([0, 3, 4]))


def test_pieces_of_a_reshape_go_whole() -> None:
    net = Net(12, normed)
    [group], _ = net.groups()
    assert (group.kind, group.count) == ("channels", 4), "what softmax and norm need stays together"
    net.check(group, np.array([2]))


def attending(heads: int, kv: int, split_late: bool = True, **extras: Any) -> Middle:
    """Attention over one product that holds q, k and v."""

    def middle(net: Net, x: Value) -> Value:
        bounds = np.cumsum([0, heads, kv, kv]) * 4
        q, k, v = (net.split(net.part(x, int(a), int(b)), int(b - a) // 4) for a, b in pairwise(bounds))
        if extras.get("norm"):
            q, k = (net.b(ops.RmsNorm, value, net.weight(4)) for value in (q, k))
        if extras.get("rope"):
            angle = net.b(ops.Reshape, net.b(ops.Iota, S, DType.f32), (1, S, 1))
            table = net.b(ops.Mul, angle, net.weight(1, 1, 4))
            q, k = (net.b(ops.Rope, value, net.b(ops.Cos, table), net.b(ops.Sin, table)) for value in (q, k))
        bias = net.weight(1, heads, 1, 1) if extras.get("bias") else None
        sinks = net.weight(heads) if extras.get("sinks") else None
        return net.join(net.b(ops.Attention, q, k, v, None, bias, sinks, scale=0.5, causal=True))

    return middle


@pytest.mark.parametrize("extras", [{}, {"norm": True, "rope": True}, {"bias": True, "sinks": True}])
@pytest.mark.parametrize(
    ("heads", "kv", "kind", "units", "gone"),
    [(4, 4, "heads", 4, [1, 2]), (6, 2, "heads", 6, [1, 3]), (6, 2, "groups", 2, [0]), (4, 1, "heads", 4, [0, 2, 3])],
)
def test_heads(heads: int, kv: int, kind: Kind, units: int, gone: list[int], extras: dict[str, bool]) -> None:
    net = Net((heads + 2 * kv) * 4, attending(heads, kv, **extras))
    [group], _ = net.groups("channels", kind)
    assert (group.kind, group.count) == (kind, units)
    sizes = [np.bincount(group.parties)[p] for p in np.unique(group.parties)]
    assert sizes == ([heads // kv] * kv if kind == "heads" and kv not in (1, heads) else [units])
    net.check(group, np.array(gone))
    left = heads - len(gone) * (heads // units)
    [attention] = net.module.functions["forward"].walk(ops.Attention)
    assert attention.operands[0].shape[2] == left
    assert attention.operands[1].shape[2] == (kv - len(gone) if kind == "groups" or heads == kv else kv)


def test_a_single_head_of_keys_is_one_group() -> None:
    [group], _ = Net(24, attending(4, 1)).groups("channels", "groups")
    assert (group.kind, group.count) == ("groups", 1)


def latent(net: Net, x: Value) -> Value:
    """Multi-head latent attention: keys and values of all heads from one small vector, rotated keys shared by them."""
    q = net.split(x, 4)
    narrow = net.layer(x, 6)
    kv = net.split(net.layer(narrow, 4 * 7), 4)
    turned = net.b(ops.Broadcast, net.b(ops.Reshape, net.layer(x, 2), (B, S, 1, 2)), (B, S, 4, 2))
    k = net.b(ops.Concat, (net.part(kv, 0, 3), turned), 3)
    return net.join(net.b(ops.Attention, q, k, net.part(kv, 3, 7), scale=0.5, causal=True))


def test_latent_attention_loses_heads() -> None:
    net = Net(20, latent)
    groups, _ = net.groups()
    group = next(g for g in groups if g.kind == "heads")
    assert group.count == 4
    net.check(group, np.array([1, 3]))


def whole_norm(net: Net, x: Value) -> Value:
    return net.b(ops.RmsNorm, x, net.weight(12))


def kept_too(net: Net, x: Value) -> Value:
    """Another reader that is no layer needs all channels."""
    return net.b(ops.Add, x, net.b(ops.Reduce, x, "sum", (2,), True))


def strided(net: Net, x: Value) -> Value:
    return net.b(ops.Slice, x, (0, 0, 0), (B, S, 12), (1, 1, 2))


@pytest.mark.parametrize(
    ("middle", "reason"),
    [(whole_norm, "nn.rms_norm"), (kept_too, "core.reduce"), (strided, "core.slice"),
     (lambda net, x: net.b(ops.CumSum, x, 2), "core.cumsum")],
)  # fmt: skip
def test_what_is_needed_whole_stays_and_the_reason_is_named(middle: Middle, reason: str) -> None:
    net = Net(12, middle)
    groups, skips = net.groups()
    assert groups == []
    assert any(f"{reason} at module net needs all of it" in why for why in skips)


def test_a_tied_weight_ties_its_layers() -> None:
    net = Net(12, lambda net, x: net.layer(net.b(ops.Relu, x), 12))
    first = next(net.module.functions["forward"].walk(ops.Linear))
    function = net.module.functions["forward"]
    assert first.parent is function
    groups, _ = net.groups()
    assert [g.count for g in groups] == [12, 12]
    other = net.module.add(Function("other"))
    x = other.arg("x", TensorType((B, H), DType.f32))
    y = Builder(other).add(ops.Linear(x, first.operands[1]))
    Builder(other).insert(Return((y,)))
    groups, skips = net.groups()
    assert [g.count for g in groups] == [12]
    assert any("is used by another function" in why for why in skips)
