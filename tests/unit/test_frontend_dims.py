"""Sizes that vary: names, ranges, outputs' names, and torch's expressions as dimensions of the IR."""

import json

import numpy as np
import pytest
import sympy
import torch
from torch import nn
from torch.utils._sympy.functions import CeilToInt, CleanDiv, FloorDiv, IntTrueDiv, Max, Min, Mod

from tilewright.frontend import trace
from tilewright.frontend.symbols import NotADim, SymbolTable
from tilewright.ir import interpret, parse_module, print_module, same_dim, sym

s, t = sympy.Symbol("s77", integer=True, positive=True), sympy.Symbol("u0", integer=True)
N = sym("N")


@pytest.mark.parametrize(
    ("expr", "want"),
    [
        (FloorDiv(s, 3), sympy.floor(N / 3)),
        (CleanDiv(4 * s, 2), 2 * N),
        (Mod(s, 4), sympy.Mod(N, 4)),
        (CeilToInt(IntTrueDiv(s, 2)), sympy.floor((N + 1) / 2)),
        (Max(0, 256 - s), 256 - N),
        (Min(s, 512), N),
        (Max(s, 64), sympy.Max(N, 64)),
        (2 * s**2 - 1, 2 * N**2 - 1),
    ],
)
def test_expressions(expr, want):
    assert same_dim(SymbolTable({s: N}, {"N": (1, 256)}).rewrite(expr), want)


def test_data_dependent_sizes_are_no_dims():
    with pytest.raises(NotADim, match="the size u0 is unknown until run time"):
        SymbolTable({s: N}, {}).rewrite(s + t)


def test_nested_floors_are_the_same_size():
    floor = sympy.floor
    assert same_dim(floor((floor(N / 2) + 1) / 3), floor((N + 2) / 6))
    assert not same_dim(floor((floor(N / 2) + N / 2) / 3), floor(N / 3))


class Two(nn.Module):
    def forward(self, x, pair, scale=2.0):
        return {"sum": pair[0] + x * scale, "rest": (pair[1]["deep"].sum(-1), x.shape[0], None)}


def test_names_of_inputs_and_outputs():
    x, a, b = torch.randn(4, 3), torch.randn(4, 3), torch.randn(5, 6)
    dynamic = {"x": {0: "B"}, "pair": [{0: "B"}, {"deep": {1: ("T", 2, 9)}}]}
    module = trace(Two(), (x,), {"pair": [a, {"deep": b}], "scale": 3.0}, dynamic)
    assert [arg.name for arg in module.functions["forward"].args] == ["x", "pair_0", "pair_1_deep"]
    assert json.loads(module.meta["outputs"]) == ["sum", "rest.output_0"]
    assert module.dims == {"B": (1, 65536), "T": (2, 9)}
    got = interpret(module, "forward", [x.numpy(), a.numpy(), b.numpy()])
    np.testing.assert_allclose(got[0], (a + 3 * x).numpy(), rtol=1e-6)
    assert parse_module(print_module(module)) == module


def test_examples_of_size_one_do_not_fix_the_size():
    module = trace(nn.Linear(4, 2), (torch.randn(1, 1, 4),), dynamic={"input": {0: "B", 1: "S"}})
    assert [str(d) for d in module.functions["forward"].args[0].shape] == ["B", "S", "4"]
    module = trace(nn.Linear(4, 2), (torch.randn(1, 1, 4),))
    assert module.functions["forward"].args[0].shape == (1, 1, 4)


def test_what_the_ops_need_narrows_a_range_that_nobody_gave():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = nn.Parameter(torch.randn(32, 4))

        def forward(self, x):
            return x + self.positions[: x.shape[1]]

    assert trace(Table(), (torch.randn(2, 5, 4),), dynamic={"x": {1: "S"}}).dims == {"S": (1, 32)}
    convolution = trace(nn.Conv1d(4, 4, 5), (torch.randn(2, 4, 9),), dynamic={"input": {2: "S"}})
    assert convolution.dims["S"][0] == 5


def test_weights_are_shared_with_the_model_and_unused_ones_left_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.same = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.same.weight = self.used.weight
            self.register_buffer("offset", torch.ones(4))
            self.plain = torch.full((4,), 2.0)

        def forward(self, x):
            return self.same(self.used(x)) + self.offset * self.plain + torch.tensor([1.0, 2.0, 3.0, 4.0])

    model = Model()
    module = trace(model, (torch.randn(2, 4),))
    assert {"used.weight", "used.bias", "same.bias", "offset", "plain"} <= set(module.weights)
    assert not {"same.weight", "unused.weight"} & set(module.weights)
    assert np.shares_memory(module.weights["used.weight"].load(), model.used.weight.detach().numpy())


def test_one_tensor_given_for_two_arguments_stays_two_inputs():
    class Difference(torch.nn.Module):
        def forward(self, x, y):
            return x - 2 * y

    same = torch.ones(3)
    module = trace(Difference(), (same, same))
    x, y = np.array([1, 2, 3], np.float32), np.array([5, 6, 7], np.float32)
    np.testing.assert_array_equal(interpret(module, "forward", [x, y])[0], x - 2 * y)
