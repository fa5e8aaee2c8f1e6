"""What cannot be traced faithfully is refused, with the module, the user's line and what to do."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from tilewright.frontend import trace
from tilewright.ir import TraceError, UnsupportedError


class Model(nn.Module):
    """Calls ``fn(self, x)`` behind a layer."""

    def __init__(self, fn):
        super().__init__()
        self.fn, self.layer = fn, nn.Linear(8, 8)
        self.cache, self.calls, self.seen = None, 0, []
        self.register_buffer("total", torch.zeros(8))

    def forward(self, x):
        return self.fn(self, self.layer(x))


def branch(self, x):
    if x.sum() > 0:  # here: branch
        return x
    return -x


def item(self, x):
    return x * int(x.sum().item())  # here: item


def as_list(self, x):
    return x + sum(x.sum(0).tolist())  # here: as_list


def assertion(self, x):
    assert x.sum() > 0  # here: assertion
    return x


def selection(self, x):
    return x[x > 0]  # here: selection


def nonzero(self, x):
    return x.nonzero()  # here: nonzero


def attribute(self, x):
    self.cache = x  # here: attribute
    return x * 2


def counter(self, x):
    self.calls += 1  # here: counter
    return x * 2


def container(self, x):
    self.seen.append(x)
    return x * 2


def buffer(self, x):
    self.total += x.sum(0)  # here: buffer
    return x + self.total


def random(self, x):
    return x + torch.rand_like(x)  # here: random


def dropout(self, x):
    return nn.functional.dropout(x, 0.5, True)  # here: dropout


def with_numpy(self, x):
    return x + torch.from_numpy(np.sin(x.detach().numpy()))  # here: with_numpy


def view(self, x):
    return x.view(2, -1)  # here: view


def fixed(self, x):
    return x + torch.ones(4, 8)  # here: fixed


def size_branch(self, x):
    if x.shape[0] > 5:  # here: size_branch
        return x * 2
    return x


def halves(self, x):
    a, b = x.chunk(2, 0)
    return a + b  # here: halves


def condition(self, x):
    return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))  # here: condition


def unknown(self, x):
    return torch.linalg.svd(x)[0]  # here: unknown


def bug(self, x):
    return x @ torch.ones(3, 3)  # here: bug


CASES = [
    (branch, TraceError, "branch depends on tensor values", "torch.where"),
    (item, TraceError, "reads tensor values", "pass it in"),
    (as_list, UnsupportedError, "reads tensor values", "keep them in tensors"),
    (assertion, TraceError, "assertion about tensor values", "leave it out"),
    (selection, UnsupportedError, "aten.index.Tensor: the result's shape depends on data", "mask"),
    (nonzero, UnsupportedError, "aten.nonzero.default: the result's shape depends on data", "mask"),
    (attribute, TraceError, "writes the attribute cache of Model (tensor)", "return the value"),
    (counter, TraceError, "writes the attribute calls of Model (int)", "return the value"),
    (container, TraceError, "writes the attribute seen of Model (list)", "return the value"),
    (buffer, TraceError, "writes the buffer total", "pass it in again"),
    (random, UnsupportedError, "aten.rand_like.default draws random numbers", "pass them in"),
    (dropout, UnsupportedError, "draws random numbers", "model.eval()"),
    (with_numpy, TraceError, "numpy inside forward", "torch function"),
    (view, TraceError, "not for B = 3", 'give a range where it holds ("B", low, high)'),
    (fixed, TraceError, "dimension B (x, axis 0) can only be 4", "axis static"),
    (size_branch, TraceError, "holds only where B <= 5, not for B = 7", "for every B"),
    (halves, TraceError, "not for B = 3", "for every B"),
    (condition, UnsupportedError, "control flow inside the graph", "torch.where"),
    (unknown, UnsupportedError, "aten._linalg_svd.default is not supported", "other operations"),
    (bug, TraceError, "RuntimeError while tracing: a and b must have same reduction dim", ""),
]


def line_of(name):
    with open(__file__) as file:
        return next((i for i, text in enumerate(file, 1) if text.rstrip().endswith(f"# here: {name}")), None)


@pytest.mark.parametrize(("fn", "kind", "what", "remedy"), CASES, ids=[c[0].__name__ for c in CASES])
def test_refusal(fn, kind, what, remedy, capfd):
    model = Model(fn).train()
    with pytest.raises(kind) as caught:
        trace(model, (torch.ones(4, 8),), dynamic={"x": {0: "B"}})
    message = str(caught.value)
    assert what in message
    assert remedy in message
    line = line_of(fn.__name__)
    where = rf"at module Model, .*test_frontend_refusals\.py:{line}$" if line else "at module Model$"
    assert re.search(where, message)
    assert (model.cache, model.calls, model.seen, model.training) == (None, 0, [], True)
    assert capfd.readouterr() == ("", ""), "torch's own dump reaches the user"


def test_a_given_range_is_a_promise_that_is_checked():
    with pytest.raises(TraceError, match=r"holds only where B <= 5, not for B = 7"):
        trace(Model(size_branch), (torch.ones(4, 8),), dynamic={"x": {0: ("B", 1, 9)}})
    module = trace(Model(size_branch), (torch.ones(4, 8),), dynamic={"x": {0: ("B", 1, 5)}})
    assert module.dims == {"B": (1, 5)}


def test_the_module_of_an_inner_layer_is_named():
    class Inner(nn.Module):
        def forward(self, x):
            return x if x.mean() > 0 else -x

    with pytest.raises(TraceError, match=r"at module 1\.0, .*test_frontend_refusals"):
        trace(nn.Sequential(nn.Linear(8, 8), nn.Sequential(Inner())), (torch.ones(4, 8),))


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"y": {0: "B"}}, r"dynamic names \['y'\], but the inputs are \['x'\]"),
        ({"x": {2: "B"}}, "rank 2, there is no axis 2"),
        ({"x": {0: "batch"}}, 'expected an upper case name such as "B"'),
        ({"x": {0: ("B", 1)}}, 'expected an upper case name such as "B"'),
        ({"x": {0: "B", 1: "B"}}, "dimension B is 4 in one input and 8 in another"),
    ],
)
def test_wrong_dynamic(dynamic, message):
    with pytest.raises(TraceError, match=message):
        trace(Model(lambda self, x: x), (torch.ones(4, 8),), dynamic=dynamic)


def test_two_names_of_one_size():
    class Sum(nn.Module):
        def forward(self, x, y):
            return x + y

    with pytest.raises(TraceError, match="dimensions B and C are always equal: give them one name"):
        trace(Sum(), (torch.ones(4), torch.ones(4)), dynamic={"x": {0: "B"}, "y": {0: "C"}})
    assert trace(Sum(), (torch.ones(1), torch.ones(1)), dynamic={"x": {0: "B"}, "y": {0: "B"}}).dims["B"][0] == 1


def test_missing_and_wrong_inputs():
    with pytest.raises(TraceError, match="needs example inputs"):
        trace(nn.Linear(2, 2))
    with pytest.raises(TraceError, match=r"Linear\.forward"):
        trace(nn.Linear(2, 2), (torch.ones(2), 3))


def test_a_model_that_returns_no_tensor():
    with pytest.raises(TraceError, match="forward returns no tensor"):
        trace(Model(lambda self, x: 3), (torch.ones(4, 8),))


def test_importing_the_frontend_imports_neither_torch_nor_transformers():
    code = "import sys, tilewright.frontend; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tracing_a_plain_module_does_not_import_transformers():
    code = (
        "import sys, torch; from tilewright.frontend import trace; trace(torch.nn.Linear(2, 2), (torch.ones(3, 2),));"
        "assert 'transformers.modeling_utils' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
