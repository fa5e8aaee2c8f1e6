"""``refine=dsnot`` (Zhang et al., arXiv:2310.08915): weights that go and weights that stay change places.

The mean of a row's output is off by the sum of ``w * mean(x)`` over its zeros. Step by step a row takes back the weight
that brings this nearest to 0, less eagerly where its input varies much, and gives for it the one that matters least (as
Wanda counts) among those whose loss does so too. It ends where a step no longer helps. Nothing is trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tilewright.passes.calibration.data import Array
from tilewright.passes.sparsity.patterns import Pattern

if TYPE_CHECKING:
    from tilewright.passes.sparsity.inputs import Inputs

_STEPS = 50


def swapped(rows: Array, keep: Array, inputs: Inputs, pattern: Pattern) -> Array:
    """Which weights of ``rows`` f32 ``[R, K]`` stay, given which are to, as many in each row (or each N:M)."""
    mean, variance = inputs.mean, inputs.square - np.square(inputs.mean)
    share = pattern.units(rows * mean)
    varies = pattern.units(np.broadcast_to(np.maximum(variance, 1e-12), rows.shape)) / pattern.group
    matters = pattern.units(np.square(rows) * inputs.square)
    kept = keep[:, :: pattern.group].copy()
    off = np.where(kept, 0, share).sum(1)
    moving = np.arange(len(rows))
    for _ in range(_STEPS):
        moving = _step(moving, share, share / varies, matters, kept, off, pattern)
        if not len(moving):
            break
    return pattern.spread(kept)


def _step(moving: Array, share: Array, eager: Array, matters: Array, kept: Array, off: Array, pattern: Pattern) -> Array:
    """One exchange in each of the rows ``moving``; gives those that it helped."""
    sign = np.sign(off[moving])[:, None]
    here, mine = kept[moving], share[moving]
    back = np.where(~here, sign * eager[moving], -np.inf).argmax(1)
    allowed = here & (sign * mine < 0)
    if pattern.of:
        allowed &= np.arange(here.shape[1]) // pattern.of == (back // pattern.of)[:, None]
    cost = np.where(allowed, matters[moving], np.inf)
    gone = cost.argmin(1)
    line = np.arange(len(moving))
    new = off[moving] - mine[line, back] + mine[line, gone]
    helps = np.isfinite(cost[line, gone]) & ~here[line, back] & (np.abs(new) < np.abs(off[moving]))
    rows: Array = moving[helps]
    back, gone = back[helps], gone[helps]
    kept[rows, back], kept[rows, gone], off[rows] = True, False, new[helps]
    return rows
