"""``method=sparsegpt`` (Frantar and Alistarh, arXiv:2301.00774): what stays makes up for what is lost.

As in GPTQ (``calibration/gptq.py``) columns are settled from first to last, the error of each goes into the later ones in
proportion to its row of the upper Cholesky factor U of the inverse Hessian. Which weights go is decided when the first
column of a block comes, by what the loss of each would cost by then: ``w^2 / U[j, j]^2``, and of a group g
``|inv(U[g, g])^T w_g|^2``, which is what settling its columns one after the other adds up to. Blocks have 128 columns, or
those that the pattern decides together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tilewright.passes.calibration.data import Array
from tilewright.passes.calibration.gptq import BLOCK, Prepared, compensate, inverse_lower
from tilewright.passes.sparsity.patterns import Pattern, lowest


@dataclass(frozen=True)
class SparseGpt:
    """The method for weights of one ``pattern`` and share of zeros."""

    pattern: Pattern
    sparsity: float

    def prune(self, rows: Array, prepared: Prepared) -> Array:
        """``rows`` f32 ``[R, K]`` with zeros, the others changed. What is exactly 0 stays so, and counts."""
        work = _Rows(self, rows, prepared)
        step = max(1, BLOCK // work.span) * work.span
        compensate(work.left, prepared.factor, [*range(0, len(work.left), step), len(work.left)], work.column)
        return np.ascontiguousarray(work.left.T)


class _Rows:
    """Some rows of a weight in work, transposed: ``[K, R]``."""

    def __init__(self, method: SparseGpt, rows: Array, prepared: Prepared) -> None:
        self.pattern, self.sparsity, self.prepared = method.pattern, method.sparsity, prepared
        self.left = np.ascontiguousarray(rows.T)
        self.zeros = self.left == 0
        self.keep = np.empty(self.left.shape, bool)
        group = self.pattern.group
        self.span = self.pattern.span or max(1, BLOCK // group) * group

    def column(self, i: int) -> Array:
        """Settle the ``i``-th column; gives what it lost ``[R]``."""
        if i % self.span == 0:
            self.keep[i : i + self.span] = self.chosen(i, min(i + self.span, len(self.left)))
        lost: Array = np.where(self.keep[i], 0, self.left[i])
        self.left[i] = np.where(self.keep[i], self.left[i], 0)
        return lost

    def chosen(self, start: int, stop: int) -> Array:
        """Which of some columns stay, ``[stop - start, R]``; without a pattern those that matter most in all rows."""
        cost = self.costs(start, stop)
        if self.pattern.of:
            keep = ~lowest(np.ascontiguousarray(cost.T), self.pattern.of - self.pattern.kept).T
        else:
            done, size = start // self.pattern.group, len(cost)
            count = round((done + size) * len(cost.T) * self.sparsity) - round(done * len(cost.T) * self.sparsity)
            keep = ~lowest(cost.reshape(1, -1), count).reshape(cost.shape)
        wide: Array = np.repeat(keep, self.pattern.group, axis=0) & ~self.zeros[start:stop]
        return wide

    def costs(self, start: int, stop: int) -> Array:
        """What the loss of each unit adds to the error, ``[units, R]``; nothing where no input was."""
        used = self.prepared.importance[start:stop] > 0
        left = np.where(self.zeros[start:stop] | ~used[:, None], 0, self.left[start:stop])
        group, factor = self.pattern.group, self.prepared.factor
        if group == 1:
            alone: Array = np.square(left / np.diag(factor)[start:stop, None])
            return alone
        parts = []
        for i in range(0, stop - start, group):
            here = slice(start + i, start + i + group)
            errors = inverse_lower(factor[here, here].T).astype(np.float32) @ left[i : i + group]
            parts.append(np.square(errors).sum(0))
        return np.stack(parts)
