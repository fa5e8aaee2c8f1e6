"""Removing columns of a layer so that the others make up for them (ZipLM, arXiv:2302.04089; OBS, Hassibi and Stork 1993).

With C the covariance of the layer's inputs and W its weight, taking the columns R away costs
``tr(W_R inv(inv(C)_RR) W_R^T)`` when the others become ``W - W_R inv(inv(C)_RR) inv(C)_R``. Means of what goes are for the
bias, as in FLAP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tilewright.ir import PassError
from tilewright.passes.calibration.data import Array
from tilewright.passes.calibration.gptq import added

_ROUNDS = 256
"""In about so many rounds a group is taken apart: units of one round do not know of each other when they are chosen."""


def damped(covariance: Array, damping: float) -> Array:
    """``covariance`` f64 ``[K, K]`` that can be inverted. Raises PassError for numbers that are not finite."""
    if not np.isfinite(covariance).all():
        raise PassError("the inputs of a layer became NaN or infinite during calibration")
    out = covariance.copy()
    diagonal = np.diag(covariance).copy()
    out[np.diag_indices_from(out)] += added(diagonal, damping)
    return out


@dataclass
class Removal:
    """A layer in work: ``weight`` f64 ``[N, K]`` (of several layers the rows together), ``inverse`` f64 ``[K, K]``.

    ``unit`` ``[K]`` is the unit of each column, -1 for columns that stay; ``parties`` ``[U]`` the party of each unit: each
    round takes as many of every party.
    """

    weight: Array
    inverse: Array
    unit: Array
    parties: Array

    def __post_init__(self) -> None:
        self.left = np.ones(len(self.parties), bool)
        self.place()

    def place(self) -> None:
        """Find the columns of the units."""
        self.columns = [np.nonzero(self.unit == u)[0] for u in range(len(self.parties))]
        self.gone = 0

    def saliencies(self) -> Array:
        """What taking each unit alone costs, ``[U]``; infinite for one that is gone."""
        out = np.full(len(self.parties), np.inf)
        units = [self.columns[u] for u in np.nonzero(self.left)[0]]
        if all(len(columns) == 1 for columns in units):
            place = np.concatenate(units)
            part = self.weight[:, place]
            out[self.left] = np.einsum("nk,nk->k", part, part) / np.diag(self.inverse)[place]
            return out
        for u in np.nonzero(self.left)[0]:
            out[u] = self.cost(self.columns[u])
        return out

    def cost(self, columns: Array) -> float:
        part = self.weight[:, columns]
        return float(np.sum(np.linalg.solve(self.inverse[np.ix_(columns, columns)], part.T) * part.T))

    def remove(self, units: Array) -> float:
        """Take units away, correct the rest; gives what that costs."""
        columns = np.concatenate([self.columns[u] for u in units])
        harm = self.cost(columns)
        rows = self.inverse[columns]
        share = np.linalg.solve(rows[:, columns], rows)
        self.weight -= self.weight[:, columns] @ share
        self.inverse -= rows.T @ share
        self.left[units] = False
        self.gone += len(columns)
        if 8 * self.gone > len(self.unit):
            self.compact()
        return harm

    def compact(self) -> None:
        """Leave out the columns that are gone: what is left is corrected faster."""
        stay = np.ones(len(self.unit), bool)
        stay[self.unit >= 0] = self.left[self.unit[self.unit >= 0]]
        self.weight, self.inverse = self.weight[:, stay], self.inverse[np.ix_(stay, stay)]
        self.unit = self.unit[stay]
        self.place()

    def order(self, multiple: int) -> Iterator[tuple[Array, float]]:
        """The units of each step and what it costs, until all are gone: a step takes ``multiple`` of each party."""
        members = [np.nonzero(self.parties == p)[0] for p in np.unique(self.parties)]
        size = len(members[0])
        most = max(1, min(multiple, size // _ROUNDS))
        step = (size - 1) % multiple + 1
        while size:
            taken: list[Array] = []
            harm, wanted = 0.0, step
            while wanted:
                count = min(most, wanted)
                cost = self.saliencies()
                units = np.concatenate([m[np.argsort(cost[m], kind="stable")[:count]] for m in members])
                harm += self.remove(units) if size > count else self.rest(units)
                taken.append(units)
                size, wanted = size - count, wanted - count
            yield np.concatenate(taken), harm
            step = min(multiple, size)

    def rest(self, units: Array) -> float:
        """What the last units cost; nothing is left to correct."""
        harm = self.cost(np.concatenate([self.columns[u] for u in units]))
        self.left[units] = False
        return harm


def corrected(weight: Array, covariance: Array, gone: Array) -> tuple[Array, Array]:
    """``weight`` f64 ``[N, K]`` without the columns that ``gone`` ``[K]`` names, the others corrected; and the shares.

    Shares f64 ``[gone, stay]`` say what of the others stands for each that is gone. ``covariance`` is damped.
    """
    stay = ~gone
    shares = np.linalg.solve(covariance[np.ix_(stay, stay)], covariance[np.ix_(stay, gone)]).T
    out = np.zeros_like(weight)
    out[:, stay] = weight[:, stay] + weight[:, gone] @ shares
    return out, shares
