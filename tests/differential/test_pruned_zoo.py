"""Structures of the zoo's models: which are found, and that graphs without some compute what zeros in their place do."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from tests.traced_zoo import traced
from tests.zoo import ZOO
from tilewright.ir import ArraySource, Weight, interpret, verify
from tilewright.passes import Pipeline
from tilewright.passes.structured.axes import Axis
from tilewright.passes.structured.branches import find_branches
from tilewright.passes.structured.groups import Group, Kind, find_groups
from tilewright.passes.structured.shrink import shrink

Array = np.ndarray[Any, Any]
FOUND: dict[str, tuple[dict[Kind, int], int]] = {
    "llama": ({"heads": 2, "channels": 2}, 4),
    "qwen3": ({"heads": 2, "channels": 2}, 4),
    "gemma2": ({"heads": 2, "channels": 2}, 4),
    "phi3": ({"heads": 2, "channels": 2}, 4),
    "gpt2": ({"heads": 2, "channels": 2}, 4),
    "gpt-neox": ({"heads": 2, "channels": 2}, 2),
    "mixtral": ({"heads": 2}, 4),
    "bert": ({"heads": 2, "channels": 2}, 4),
    "t5": ({"heads": 2, "channels": 4}, 10),
    "vit": ({"heads": 2, "channels": 2}, 4),
    "mlp": ({"channels": 2}, 0),
}
"""Groups by kind, and residual branches. Attention of t5 shares a bias a head, experts have no rule."""


def some(group: Group) -> Array:
    """A third of the units of each party."""
    parties = [np.nonzero(group.parties == p)[0] for p in np.unique(group.parties)]
    return np.concatenate([units[1 :: 3 if len(units) > 2 else 2] for units in parties])


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("heads", ["heads", "groups"])
def test_graphs_without_some_units(name: str, heads: Kind) -> None:
    module = traced(name)
    Pipeline.parse("clean,fusions").run(module)
    function = module.functions["forward"]
    groups = find_groups(function, ["channels", heads], lambda op, why: None)
    found = Counter("heads" if g.kind == "groups" else g.kind for g in groups)
    assert (found, len(find_branches(function))) == FOUND[name]
    kept: dict[Axis, Array] = {}
    for group in groups:
        gone = some(group)
        for op in group.readers:
            for weight in (v for v in op.operands if isinstance(v, Weight) and v.tensor.rank == 2):
                array = weight.load().copy()
                array[:, np.isin(group.columns(op), gone)] = 0
                weight.source = ArraySource(array)
        kept |= {axis: kept.get(axis, True) & mask for axis, mask in group.kept(gone).items()}
    inputs = {k: v.numpy() for k, v in ZOO[name].inputs(ZOO[name].shapes[1]).items()}
    want = interpret(module, "forward", inputs)
    shrink(module, function, kept)
    verify(module)
    for a, b in zip(want, interpret(module, "forward", inputs), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5, rtol=2e-5)
