"""``method=clip``: how far the range of each group's codes should reach, found by trying.

A narrower range has finer steps and clips the largest numbers. Of 25 widths each group takes the one whose error,
weighted by the mean square of the inputs it meets, is least: the search that OmniQuant (arXiv:2308.13137) and AWQ
(arXiv:2306.00978) make, with the inputs' second moments in place of the inputs.
"""

from __future__ import annotations

import numpy as np

from tilewright.passes.calibration.data import Array
from tilewright.passes.formats import Format, Params, check_finite
from tilewright.passes.formats.base import check_params

SHRINKS = np.linspace(1.0, 0.4, 25, dtype=np.float32)
_AT_ONCE = 1 << 21  # elements that are tried at a time: they stay in the cache


def clipped(format: Format, weight: Array, importance: Array | None = None, name: str = "weight") -> tuple[Array, ...]:
    """The arrays of ``format.parts`` for ``weight`` ``[N, K]``, each group clipped where its error is least.

    ``importance`` f32 ``[K]`` is the mean square of each input channel; without it all count the same. Raises PassError
    for numbers that are not finite.
    """
    n, k = weight.shape
    groups = format.groups(k)
    matters = None if importance is None else importance.reshape(groups, -1)
    step = max(1, _AT_ONCE // k)
    codes: list[Array] = []
    found: list[Params] = []
    for start in range(0, n, step):
        block = weight[start : start + step].astype(np.float32).reshape(-1, groups, k // groups)
        check_finite(block, name, start)
        found.append(search(format, block, matters, format.shared(block, matters)))
        check_params(found[-1], block, name)
        codes.append(format.encode(block, found[-1]).reshape(-1, k))
    return format.store(np.concatenate(codes), {key: np.concatenate([p[key] for p in found]) for key in found[0]})


def search(format: Format, w: Array, importance: Array | None, shared: Params) -> Params:
    """The params of the groups ``w`` f32 ``[R, G, g]`` with the least error; ``importance`` is ``[G, g]``."""
    whole = format.fit(w, 1.0, importance, shared)
    if whole.keys() <= shared.keys():  # a table a row, which the importance made what it is
        return whole
    best = np.full(w.shape[:2], np.inf, np.float32)
    shrink = np.ones(w.shape[:2], np.float32)
    for width in SHRINKS:
        params = format.fit(w, float(width), importance, shared)
        error = group_errors(w, format.decode(format.encode(w, params), params), importance)
        shrink[error < best] = width
        np.fmin(error, best, out=best)
    return format.fit(w, shrink, importance, shared)


def group_errors(w: Array, decoded: Array, importance: Array | None) -> Array:
    """The weighted squared error of each group: f32 ``[R, G]``."""
    error = np.square(w - decoded)
    out: Array = error.sum(-1) if importance is None else np.einsum("rgk,gk->rg", error, importance)
    return out
