"""Fusion: what shares a kernel, what it means, and taking a kernel apart again."""

from __future__ import annotations

import numpy as np
import pytest

from tilewright.ir import (
    ArraySource,
    Builder,
    DType,
    Function,
    Module,
    Return,
    TensorType,
    interpret,
    ops,
    parse_module,
    sym,
    verify,
)
from tilewright.passes.base import PassContext
from tilewright.passes.fuse import Fuse, unfuse
from tilewright.passes.plan_memory import PlanMemory, root

B, S = sym("B"), sym("S")
F32 = DType.f32


def two_layers() -> Module:
    """``h += 0.5 * down(silu(up(h)))`` twice with the same weights, then softmax of a slice."""
    module = Module("m", dims={"B": (1, 8), "S": (1, 64)})
    function = module.add(Function("forward"))
    h = x = function.arg("x", TensorType((B, S, 8), F32))
    rng = np.random.default_rng(0)
    up = module.constant(rng.standard_normal((24, 8)).astype("f4"), "up")
    down = module.constant(rng.standard_normal((8, 24)).astype("f4"), "down")
    b = Builder(function)
    for _ in range(2):
        y = b(ops.Linear, b(ops.Silu, b(ops.Linear, h, up)), down)
        h = b(ops.Add, b(ops.Mul, y, b(ops.Full, (), 0.5, F32)), h)
    part = b(ops.Slice, h, (0, 0, 2), (B, S, 8), (1, 1, 1))
    b.insert(Return((b(ops.Softmax, b(ops.Exp, part), 2), x)))
    return module


def run(module: Module) -> list[np.ndarray]:
    x = np.random.default_rng(1).standard_normal((2, 5, 8)).astype("f4")
    return interpret(module, "forward", [x])


def kernels(module: Module) -> list[list[str]]:
    return [[op.name for op in k.body[:-1]] for k in module.kernels()]


def test_fused_module_means_the_same_and_equal_kernels_are_one():
    module = two_layers()
    want = run(module)
    assert Fuse().run(module, PassContext())
    verify(module)
    for a, b in zip(run(module), want):
        np.testing.assert_array_equal(a, b)
    assert sorted(kernels(module)) == [
        ["core.slice", "core.exp", "nn.softmax"],
        ["nn.linear", "core.full", "core.mul", "core.add"],
        ["nn.linear", "core.silu"],
    ]
    assert [op.callee for op in module.ops(ops.Call)][:2] == [op.callee for op in module.ops(ops.Call)][2:4]


def test_a_threshold_is_in_the_kernel_of_each_layer_that_it_leads_to():
    text = """
module @m {
  dim B : 1..8
  weight @a : tensor<4x6xf32>
  weight @b : tensor<6x4xf32>
  weight @least : tensor<1xf32>
  func @forward(%x: tensor<Bx6xf32>) {
    %0 = nn.linear(%x, @a) : tensor<Bx4xf32>
    %1 = sparse.threshold(%0, @least) : tensor<Bx4xf32>
    %2 = nn.linear(%1, @b) : tensor<Bx6xf32>
    %3 = nn.gated_linear(%1, @b, @b) : tensor<Bx6xf32>
    %4 = core.add(%2, %3) : tensor<Bx6xf32>
    %5 = sparse.threshold(%4, @least) : tensor<Bx6xf32>
    return([%5])
  }
}
"""
    module, x = parse_module(text), np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    for weight in module.weights.values():
        weight.source = ArraySource(np.full([int(d) for d in weight.shape], 0.5, np.float32))
    want = interpret(module, "forward", [x])[0]
    Fuse().run(module, PassContext())
    verify(module)
    np.testing.assert_array_equal(interpret(module, "forward", [x])[0], want)
    assert kernels(module) == [
        ["nn.linear"],
        ["sparse.threshold", "nn.gated_linear"],
        ["sparse.threshold", "nn.linear", "core.add", "sparse.threshold"],
    ]


def test_single_mode_makes_one_kernel_an_operation():
    module = two_layers()
    want = run(module)
    Fuse(mode="single").run(module, PassContext())
    assert all(len(names) == 1 for names in kernels(module))
    for a, b in zip(run(module), want):
        np.testing.assert_array_equal(a, b)


def test_unfuse_takes_one_kernel_apart():
    module = two_layers()
    want = run(module)
    Fuse().run(module, PassContext())
    name = next(k.name for k in module.kernels() if len(k.body) == 5)
    unfuse(module, name)
    verify(module)
    assert name not in module.functions or len(module.functions[name].body) == 2
    for a, b in zip(run(module), want):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mode", ["full", "single"])
def test_no_two_live_values_share_a_slot(mode):
    module = two_layers()
    Fuse(mode=mode).run(module, PassContext())
    PlanMemory().run(module, PassContext())
    function = module.functions["forward"]
    last = {}
    for i, op in enumerate(function.body):
        last.update({root(v): i for v in op.operands})
    owner: dict[int, object] = {}
    for i, op in enumerate(function.body):
        if not isinstance(op, ops.Call):
            continue
        for slot, value in zip(op.slots, op.results):
            if slot < 0:
                continue
            before = owner.get(slot)
            assert before is None or last.get(before, -1) < i, f"slot {slot} still holds {before} at {op}"
            owner[slot] = value
    returned = {root(v) for v in function.returns}
    for op in module.ops(ops.Call):
        for slot, value in zip(op.slots, op.results):
            assert (slot < 0) == (value in returned)
