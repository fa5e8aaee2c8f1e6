"""What is refused, and how: each message names the module, the line and what to write instead.

    python examples/refusals.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import tilewright


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x.relu()
        return x


class Remember(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x * 2
        return self.last


class Select(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x).abs()


def main() -> None:
    for model in (Branch(), Remember(), Select(), Noise(), Spectrum()):
        try:
            tilewright.compile(model, (torch.eye(4),))
        except tilewright.TilewrightError as error:
            print(f"{type(error).__name__}: {error}\n")


if __name__ == "__main__":
    main()
