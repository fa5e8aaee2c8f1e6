"""A module of your own, compiled once for every batch size.

    python examples/custom_module.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import tilewright


class Scorer(nn.Module):
    """Features ``[B, 32]`` -> probabilities ``[B, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.out = nn.LayerNorm(32), nn.Linear(32, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.nn.functional.gelu(self.wide(self.norm(x)))
        return self.out(hidden).softmax(-1)


def main() -> None:
    torch.manual_seed(0)
    model = Scorer().eval()
    # Axis 0 of x varies and is called B; sizes outside of 1..256 are refused when the model is called.
    compiled = tilewright.compile(model, (torch.randn(4, 32),), dynamic={"x": {0: ("B", 1, 256)}})
    print(f"{len(compiled.report.kernels)} kernels for {compiled.report.target}")
    for batch in (1, 3, 200):
        x = torch.randn(batch, 32)
        with torch.no_grad():
            error = (compiled(x) - model(x)).abs().max().item()
        print(f"batch {batch:3}: largest difference from eager PyTorch {error:.1e}")
    try:
        compiled(torch.randn(257, 32))
    except ValueError as error:
        print(f"batch 257: {error}")


if __name__ == "__main__":
    main()
