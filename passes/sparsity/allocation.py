"""How the zeros are shared out over layers under one budget. One more way is one function and one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np

from tilewright.ir import Module, Op, PassError, Weight
from tilewright.passes.base import PassContext
from tilewright.passes.calibration.channels import channel_statistics
from tilewright.passes.calibration.data import OPTION, Array

if TYPE_CHECKING:
    from tilewright.passes.prune import Prune

Layers = Mapping[Op, Sequence[Weight]]
Allocate = Callable[["Prune", Module, PassContext, Layers], dict[Weight, float]]
"""The share of zeros of each weight; in sum, weighted by sizes, that of the pass."""

_SAMPLE = 1 << 16  # weights of a layer that stand for all
_OUTLIER = 5.0  # times the mean


def uniform(options: Prune, module: Module, ctx: PassContext, layers: Layers) -> dict[Weight, float]:
    """The same share everywhere."""
    return {weight: options.target for weights in layers.values() for weight in weights}


def everywhere(options: Prune, module: Module, ctx: PassContext, layers: Layers) -> dict[Weight, float]:
    """One limit for all layers: of the share of a layer's squared output that the loss of a weight is.

    With calibration data outputs are those that inputs with independent channels give, else squares of weights count.
    """
    found = saliencies(options, module, ctx, layers)
    weights = list(found)
    sizes = np.array([int(w.tensor.elements) for w in weights], np.float64)
    low, high = max(0.0, options.target - options.spread), min(1.0, options.target + options.spread)
    units = [options.shape.units(found[w]).reshape(-1) for w in weights]
    relative = [np.sort(u) / (u.mean() * size) for u, size in zip(units, sizes)]

    def shares(limit: float) -> Array:
        return np.clip([np.searchsorted(r, limit) / len(r) for r in relative], low, high)

    a, b = 0.0, max(float(r[-1]) for r in relative)
    for _ in range(60):
        middle = (a + b) / 2
        a, b = (middle, b) if shares(middle) @ sizes < options.target * sizes.sum() else (a, middle)
    return dict(zip(weights, balanced(shares(b), sizes, options.target)))


def owl(options: Prune, module: Module, ctx: PassContext, layers: Layers) -> dict[Weight, float]:
    """Fewer zeros where more products of a weight and its input's norm are outliers (OWL, arXiv:2310.05175)."""
    if ctx.options.get(OPTION) is None:
        raise PassError("allocation=owl needs calibration data, as it counts outliers among products with inputs")
    found = saliencies(options, module, ctx, layers)
    weights = list(found)
    sizes = np.array([int(w.tensor.elements) for w in weights], np.float64)
    products = [np.sqrt(found[w]) for w in weights]
    outliers = np.array([(p > _OUTLIER * p.mean()).mean() for p in products])
    reach = outliers.max() - outliers.min()
    density = (outliers - outliers.min()) / reach * 2 * options.spread if reach else outliers * 0
    return dict(zip(weights, balanced(-density, sizes, options.target)))


def balanced(shares: Array, sizes: Array, target: float) -> list[float]:
    """``shares`` moved together so that their mean by ``sizes`` is ``target``, each in 0..1."""
    for _ in range(8):
        shares = np.clip(shares + (target - shares @ sizes / sizes.sum()), 0, 1)
    return [float(s) for s in shares]


def saliencies(options: Prune, module: Module, ctx: PassContext, layers: Layers) -> dict[Weight, Array]:
    """Of a sample of the rows of each weight ``w^2 * mean(x^2)``, f32 ``[R, K]``; without data ``w^2``."""
    squares = channel_statistics(module, ctx, f"allocation={options.allocation}", lambda found: found.square)
    found: dict[Weight, Array] = {}
    for weight in dict.fromkeys(w for weights in layers.values() for w in weights):
        n, k = map(int, weight.shape)
        picked = np.unique(np.linspace(0, n - 1, min(n, max(1, _SAMPLE // k))).astype(np.int64))
        rows = np.square(weight.load()[picked].astype(np.float32))
        weight.release()
        found[weight] = rows * squares.get(weight.name, np.float32(1))
    return found


ALLOCATIONS: dict[str, Allocate] = {"uniform": uniform, "global": everywhere, "owl": owl}
"""What the option ``allocation`` of the pass ``prune`` may be."""


def find_allocation(name: str) -> Allocate:
    """The way called ``name``; raises PassError with those that exist."""
    if name not in ALLOCATIONS:
        close = get_close_matches(name, ALLOCATIONS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise PassError(f"prune has no allocation {name!r}{hint}; there are {', '.join(ALLOCATIONS)}")
    return ALLOCATIONS[name]
