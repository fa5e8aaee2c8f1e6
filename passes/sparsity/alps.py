"""``method=alps`` (Meng et al., arXiv:2406.07831): which weights go, and what the others become, as one problem.

``|x W'^T - x W^T|^2`` is to be least over all W' with the zeros that the pattern asks for. The alternating direction method
of multipliers splits it: one copy of the weight makes up for what is lost, another one has the zeros, and a penalty ``rho``
that grows step by step makes them equal. Then the numbers that stay are solved for by conjugate gradients. Columns are
scaled so that all inputs are of one size. Of the Hessian its eigenvectors are kept: f32 ``[K, K]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tilewright.passes.calibration.data import Array
from tilewright.passes.sparsity.patterns import Pattern

_STEPS, _CHECK = 150, 3
_RHO = 0.1
_SOLVES = 30


@dataclass(frozen=True)
class Spectrum:
    """A Hessian with a diagonal of 1, ``scale`` being what its rows and columns were multiplied by; ``used``: by inputs."""

    hessian: Array
    values: Array
    vectors: Array
    scale: Array
    used: Array

    @classmethod
    def of(cls, hessian: Array, damping: float) -> Spectrum:
        """Of ``hessian`` f64 ``[K, K]``; ``damping`` is added to the diagonal as a fraction of its mean."""
        diagonal = np.diag(hessian)
        mean = diagonal.mean() or 1.0
        h = hessian + np.diag(np.where(diagonal == 0, mean, damping * mean))
        scale = 1 / np.sqrt(np.diag(h))
        h *= scale[:, None] * scale
        values, vectors = np.linalg.eigh(h)
        return cls(_narrow(h), _narrow(np.maximum(values, 0)), _narrow(vectors), _narrow(scale), diagonal > 0)


def _narrow(array: Array) -> Array:
    return array.astype(np.float32)


def prune(rows: Array, spectrum: Spectrum, pattern: Pattern, sparsity: float) -> Array:
    """``rows`` f32 ``[R, K]`` with zeros, the others changed. What is exactly 0 stays so, and counts."""
    fixed = (rows == 0) | ~spectrum.used
    weight = rows / spectrum.scale
    wanted = weight @ spectrum.hessian
    start = np.where(fixed, 0, weight)
    keep = split(start, wanted, fixed, spectrum, pattern, sparsity)
    return solved(np.where(keep, start, 0), wanted, keep, spectrum.hessian) * spectrum.scale


def split(start: Array, wanted: Array, fixed: Array, spectrum: Spectrum, pattern: Pattern, sparsity: float) -> Array:
    """Which weights stay. ``wanted`` is the weight times the Hessian."""
    zeroed, dual, rho = start, np.zeros_like(start), _RHO
    keep = np.ones(start.shape, bool)
    values, vectors = spectrum.values, spectrum.vectors
    before = keep
    for step in range(_STEPS):
        whole = ((wanted - dual + rho * zeroed) @ vectors / (values + rho)) @ vectors.T
        moved = np.where(fixed, 0, whole + dual / rho)
        keep = pattern.keeps(np.square(moved), sparsity)
        zeroed = np.where(keep, moved, 0)
        dual += rho * (whole - zeroed)
        if step % _CHECK == _CHECK - 1:
            changed = np.count_nonzero(keep != before) / keep.size
            if not changed:
                break
            before, rho = keep, rho * (1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1)
    return keep & ~fixed


def solved(start: Array, wanted: Array, keep: Array, hessian: Array) -> Array:
    """Least squares in the weights that stay, for all rows at once, by conjugate gradients from ``start``."""
    out = start
    left = np.where(keep, wanted - out @ hessian, 0)
    way, size = left, np.square(left).sum(1, keepdims=True)
    for _ in range(_SOLVES):
        bent = np.where(keep, way @ hessian, 0)
        step = size / np.maximum((way * bent).sum(1, keepdims=True), 1e-30)
        out = out + step * way
        left = left - step * bent
        new = np.square(left).sum(1, keepdims=True)
        way, size = left + new / np.maximum(size, 1e-30) * way, new
    return out
