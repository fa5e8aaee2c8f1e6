"""``torch.compile(model, backend="tilewright")`` computes what eager PyTorch does, at every size, for inference alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch.nn import functional as F

from tilewright.ir import TilewrightError

TOLERANCE = 1e-4  # of the largest value
WIDTH, HEADS = 64, 4


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """A transformer block: attention with a causal mask, a gated feed-forward layer, norms before both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH, eps=1e-6)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate, self.up, self.down = (nn.Linear(*size, bias=False) for size in ((64, 96), (64, 96), (96, 64)))

    def forward(self, x: Tensor) -> Tensor:
        b, s, w = x.shape
        q, k, v = (t.view(b, s, HEADS, w // HEADS).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, w))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 8), nn.Softmax(-1))


def check(compiled: Any, model: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        got, want = compiled(*inputs), model(*inputs)
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()


def graphs() -> int:
    """Graphs that were compiled since the test began."""
    return int(counters["stats"]["unique_graphs"])


def test_mlp() -> None:
    model = mlp().eval()
    compiled = torch.compile(model, backend="tilewright")
    for _ in range(2):
        check(compiled, model, torch.randn(4, 16))
    assert graphs() == 1


def test_mlp_at_any_batch_size() -> None:
    model = mlp().eval()
    compiled = torch.compile(model, backend="tilewright", dynamic=True)
    for batch in (4, 9, 2, 33):
        check(compiled, model, torch.randn(batch, 16))
    assert graphs() == 1


def test_batch_size_becomes_dynamic_by_itself() -> None:
    """Torch's own way without ``dynamic``: one graph for the first size, one for all that differ."""
    model = mlp().eval()
    compiled = torch.compile(model, backend="tilewright")
    for batch in (4, 6, 7, 11, 4):
        check(compiled, model, torch.randn(batch, 16))
    assert graphs() == 2


def test_transformer_block() -> None:
    model = Block().eval()
    compiled = torch.compile(model, backend="tilewright", dynamic=True)
    for shape in ((2, 7), (3, 12), (2, 33)):
        check(compiled, model, torch.randn(*shape, WIDTH))
    assert graphs() == 1


def test_a_graph_break_leaves_two_graphs() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            torch._dynamo.graph_break()
            return self.second(x)

    model = Broken().eval()
    check(torch.compile(model, backend="tilewright"), model, torch.randn(4, 16))
    assert graphs() == 2


def test_several_results_and_integers() -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x.softmax(-1), x.argmax(-1), x[:, ids]

    model = Several().eval()
    x, ids = torch.randn(4, 16), torch.tensor([3, 0, 15])
    with torch.no_grad():
        got, want = torch.compile(model, backend="tilewright")(x, ids), model(x, ids)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert graphs() == 1


def test_options_reach_the_compiler() -> None:
    model = mlp().eval()
    compiled = torch.compile(model, backend="tilewright", options={"target": "x86-64-v3", "passes": "O0"})
    check(compiled, model, torch.randn(4, 16))
    wrong = torch.compile(mlp().eval(), backend="tilewright", options={"target": "z80"})
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="z80"):
        wrong(torch.randn(4, 16))


def test_results_are_tensors_of_their_own() -> None:
    """A later call must not write into the result of an earlier one, nor into its input."""
    model = mlp().eval()
    compiled = torch.compile(model, backend="tilewright")
    x, y = torch.randn(4, 16), torch.randn(4, 16)
    kept_x = x.clone()
    with torch.no_grad():
        first = compiled(x)
        kept = first.clone()
        compiled(y)
    assert torch.equal(first, kept)
    assert torch.equal(x, kept_x)


def test_gradients_are_refused() -> None:
    model = mlp()
    compiled = torch.compile(model, backend="tilewright")
    with pytest.raises(BackendCompilerFailed, match=r"is for inference; call the model under torch\.no_grad") as caught:
        compiled(torch.randn(4, 16))
    assert isinstance(caught.value.inner_exception, TilewrightError)
    model.requires_grad_(False)
    with pytest.raises(BackendCompilerFailed, match="is for inference"):
        torch.compile(model, backend="tilewright")(torch.randn(4, 16, requires_grad=True))
    check(torch.compile(model, backend="tilewright"), model, torch.randn(4, 16))


def test_what_is_unsupported_is_refused_by_name() -> None:
    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.svd(x)[1]

    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="svd"):
        torch.compile(Unknown().eval(), backend="tilewright")(torch.randn(4, 4))
