"""The zoo's models as the frontend traces them, each once a process."""

from __future__ import annotations

from functools import cache

import torch

from tests.zoo import ZOO
from tilewright.bisect import copy_of
from tilewright.frontend import trace
from tilewright.ir import Module

OWN = ("nanogpt", "resnet", "mlp", "convnet")
"""Models that are not of transformers: nobody but the caller knows their inputs."""


@cache
def known(name: str) -> Module:
    """As a user would: the model alone for those of transformers, example and ranges for the others. Not to be changed."""
    return from_example(name) if name in OWN else trace(ZOO[name].model())


@cache
def from_example(name: str, dtype: torch.dtype = torch.float32) -> Module:
    """With example and ranges, the weights as ``dtype``. Not to be changed."""
    entry = ZOO[name]
    dynamic = {arg: {axis: (dim, *entry.dims[dim]) for axis, dim in axes.items()} for arg, axes in entry.axes.items()}
    return trace(entry.model().to(dtype), (), cast(entry.example(), dtype), dynamic)


def traced(name: str, dtype: torch.dtype = torch.float32) -> Module:
    """The same, a copy."""
    return copy_of(from_example(name, dtype))


def cast(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
