"""tilewright behind ``torch.compile``: the model stays an ``nn.Module``, its calls run compiled code.

    python examples/torch_compile.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A transformer block as one writes it by hand: ``[B, S, 256]`` -> the same."""

    def __init__(self, width: int = 256, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    eager = nn.Sequential(*(Block() for _ in range(4))).eval()
    compiled = torch.compile(eager, backend="tilewright", dynamic=True)
    for shape in ((2, 64, 256), (3, 100, 256), (8, 17, 256)):
        x = torch.randn(shape)
        want, got = eager(x), compiled(x)
        print(f"{list(shape)}: relative difference {((got - want).abs().max() / want.abs().max()).item():.1e}")
    print("compiled graphs:", torch._dynamo.utils.counters["stats"]["unique_graphs"])


if __name__ == "__main__":
    main()
