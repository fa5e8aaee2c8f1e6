"""Which weights of a row may be zero: any, or so many of neighbours; alone, or in groups of neighbours along K."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from tilewright.ir import PassError
from tilewright.passes.calibration.data import Array

_N_OF_M = re.compile(r"(\d+):(\d+)\Z")


@dataclass(frozen=True)
class Pattern:
    """Units of ``group`` neighbours along K are zero together, or not at all (``group`` 1: single weights).

    With ``kept`` and ``of`` so many units of each ``of`` neighbours stay (2 of 4, arXiv:2104.08378); without, any of a row.
    Groups are those of GQSA (arXiv:2412.17560).
    """

    group: int = 1
    kept: int = 0
    of: int = 0

    @property
    def span(self) -> int:
        """Neighbours along K that are decided together; 0: all of a row."""
        return self.of * self.group

    @property
    def sparsity(self) -> float | None:
        """The share of zeros, where the pattern says it."""
        return 1 - self.kept / self.of if self.of else None

    def unfit(self, k: int) -> str | None:
        """Why rows of ``k`` weights cannot have this pattern."""
        size = self.span or self.group
        return f"the pattern takes {size} neighbours together, which do not divide rows of {k}" if k % size else None

    def units(self, values: Array) -> Array:
        """Sums of ``values`` ``[R, K]`` over units: ``[R, U]``."""
        return values if self.group == 1 else values.reshape(len(values), -1, self.group).sum(-1)

    def keeps(self, saliency: Array, sparsity: float) -> Array:
        """Which weights stay, ``[R, K]``, by what the loss of each costs; ``sparsity`` is the share of zeros."""
        return self.spread(self.keeps_units(self.units(saliency), sparsity))

    def keeps_units(self, saliency: Array, sparsity: float) -> Array:
        """The same of units, ``[R, U]``."""
        if self.of:
            cut = saliency.reshape(len(saliency), -1, self.of)
            return ~lowest(cut.reshape(-1, self.of), self.of - self.kept).reshape(saliency.shape)
        rows, units = saliency.shape
        return ~lowest(saliency, np.diff(np.rint(np.arange(rows + 1) * (sparsity * units)).astype(np.int64)))

    def spread(self, units: Array) -> Array:
        """``[R, U]`` of units as ``[R, K]`` of weights."""
        return np.repeat(units, self.group, axis=1)


def lowest(values: Array, count: int | Array) -> Array:
    """The ``count`` lowest (a number, or one a row) of each row of ``values`` ``[R, U]``; of equal ones the first."""
    counts = np.broadcast_to(np.asarray(count, np.int64), len(values))[:, None]
    ends = np.unique(counts)
    ends = ends[(ends > 0) & (ends < values.shape[1])]
    if not len(ends):
        return np.broadcast_to(counts > 0, values.shape)
    ordered = np.partition(values, ends - 1, axis=1)
    limit = np.take_along_axis(ordered, np.clip(counts - 1, 0, None), 1)
    below, equal = values < limit, values == limit
    found: Array = below | (equal & (np.cumsum(equal, 1) <= counts - below.sum(1, keepdims=True)))
    return np.where(counts == values.shape[1], True, found & (counts > 0))


def find_pattern(text: str, group: int) -> Pattern:
    """``unstructured`` or ``N:M``, of units of ``group``; raises PassError for what makes no sense."""
    if group < 1:
        raise PassError(f"a group of weights has 1 or more; got {group}")
    if text == "unstructured":
        return Pattern(group)
    found = _N_OF_M.match(text)
    if found is None or not 0 < int(found[1]) < int(found[2]):
        raise PassError(f"there is no pattern {text!r}; there are unstructured and N:M: N of M neighbours stay, as in 2:4")
    return Pattern(group, int(found[1]), int(found[2]))
