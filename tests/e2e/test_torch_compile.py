"""torch.compile with ``dynamic=True`` makes inputs of Python floats; here they are constants, and guarded."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def test_a_float_that_changes_is_compiled_anew() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16)).eval()
    compiled = torch.compile(model, backend="tilewright", dynamic=True)
    x = torch.randn(2, 3, 32)
    first = compiled(x)
    torch.testing.assert_close(first, model(x))
    model[0].eps = 10.0
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), first)


@torch.no_grad()
def test_sizes_that_a_layer_ties_down_are_fixed() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(128, 5)).eval()
    compiled = torch.compile(model, backend="tilewright", dynamic=True)
    for batch in (2, 5):
        x = torch.randn(batch, 3, 16, 16)
        torch.testing.assert_close(compiled(x), model(x))
