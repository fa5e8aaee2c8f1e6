"""torch.compile: what it hands to a backend besides the graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


class Normed(nn.Module):
    """Has a Python float (eps) and a fixed last axis, which ``dynamic=True`` makes symbols at first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x))


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


@torch.no_grad()
def test_floats_and_fixed_axes_of_a_dynamic_graph() -> None:
    model = Normed().eval()
    compiled = torch.compile(model, backend="tilewright", dynamic=True)
    for rows in (2, 5):
        x = torch.randn(rows, 3, 32)
        torch.testing.assert_close(compiled(x), model(x))


@torch.no_grad()
def test_a_float_that_changes_is_compiled_anew() -> None:
    model = Normed().eval()
    compiled = torch.compile(model, backend="tilewright", dynamic=True)
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(compiled(x), model(x))
    model.norm.eps = 10.0
    torch.testing.assert_close(compiled(x), model(x))


@torch.no_grad()
def test_options_go_to_compile() -> None:
    model = Normed().eval()
    quantized = torch.compile(model, backend="tilewright", options={"passes": "w8a16"})
    x = torch.randn(4, 3, 32)
    error = (quantized(x) - model(x)).abs().max() / model(x).abs().max()
    assert 1e-5 < error < 2e-2
