"""What a threshold takes from the input of layers goes through a product of low rank (R-Sparse, arXiv:2504.19449).

    linear(threshold(x), @w)  ->  linear(threshold(x), @w) + linear(linear(where(|x| < limits, x, 0), @w.low), @w.lift)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tilewright.ir import Builder, DType, PassError, Rewriter, TensorType, Value, Weight, ops
from tilewright.passes.calibration.data import Array
from tilewright.passes.calibration.spill import Spill
from tilewright.passes.weights import as_weight, free_name


@dataclass(frozen=True)
class LowRank:
    """``lifts[i] @ low`` stands for ``weights[i]``: low ``[rank, K]``, a lift ``[N, rank]`` for each weight ``[N, K]``."""

    low: Weight
    lifts: tuple[Weight, ...]
    weights: tuple[Weight, ...]
    spill: Spill

    @property
    def bytes(self) -> int:
        return sum(int(w.tensor.bytes) for w in (self.low, *self.lifts))

    def fill(self, second: Array) -> None:
        """Numbers for inputs of the second moments ``second`` f64 ``[K, K]``."""
        whole = np.concatenate([w.load().astype(np.float32) for w in self.weights])
        lift, low = factored(whole, second, int(self.low.shape[0]))
        ends = np.cumsum([int(w.shape[0]) for w in self.weights])[:-1]
        for weight, array in zip((self.low, *self.lifts), [low, *np.split(lift, ends)], strict=True):
            weight.source = self.spill.put(np.ascontiguousarray(array.astype(weight.dtype.np)), weight.tensor)
        for weight in self.weights:
            weight.release()


def add_low_rank(rw: Rewriter, threshold: ops.Threshold, layers: Sequence[ops.Linear], rank: int, spill: Spill) -> LowRank:
    """Let what ``threshold`` takes from ``layers``, all that read it, go the other way.

    Raises PassError for a rank that is too large.
    """
    weights = tuple(w for op in layers if (w := as_weight(op.weight, 2)) is not None)
    k, kind = int(weights[0].shape[1]), weights[0].dtype
    most = min(k, sum(int(w.shape[0]) for w in weights))
    if rank >= most:
        raise PassError(f"rank {rank}: @{weights[0].name} has rank {most} itself; take a smaller one, or name it in skip")
    module, first = rw.module, layers[0]
    low = module.weight(free_name(module, f"{weights[0].name}.low"), TensorType((rank, k), kind))
    b = rw.before(first)
    small = b.add(ops.Linear(below(b, threshold), low))
    lifts = []
    for op, weight in zip(layers, weights, strict=True):
        lift = module.weight(free_name(module, f"{weight.name}.lift"), TensorType((int(weight.shape[0]), rank), kind))
        rest = ops.Add(rw.before(op).add(op.clone({})), rw.before(op).add(ops.Linear(small, lift)))
        rw.replace(op, rest)
        lifts.append(lift)
    return LowRank(low, tuple(lifts), weights, spill)


def below(b: Builder, threshold: ops.Threshold) -> Value:
    """What ``threshold`` takes away; not from its result, so that layers alone read that and leave out its zeros."""
    x = threshold.x
    size = b.add(ops.Abs(x))
    wide = size if x.dtype is DType.f32 else b.add(ops.Cast(size, DType.f32))
    return b.add(ops.Where(b.add(ops.Lt(wide, threshold.limits)), x, b.full(0.0, x)))


def factored(weight: Array, second: Array, rank: int) -> tuple[Array, Array]:
    """``lift [N, rank] @ low [rank, K]`` nearest to ``weight`` f32 ``[N, K]`` for inputs of these second moments.

    Of all products of this rank it has the least ``E |(weight - lift low) x|^2``: ``lift`` are the leading left vectors of
    ``weight second^(1/2)``, ``low`` is ``lift^T weight``. The paper has the singular vectors of the weight itself, which is
    this for inputs that are white.
    """
    n, k = weight.shape
    if n <= k:
        lift = np.linalg.eigh((weight @ second.astype(np.float32) @ weight.T).astype(np.float64))[1][:, : -rank - 1 : -1]
    else:
        sizes, basis = np.linalg.eigh(second)
        half = (basis * np.sqrt(np.maximum(sizes, 0))).astype(np.float32)
        scaled = weight @ half
        right = np.linalg.eigh((scaled.T @ scaled).astype(np.float64))[1][:, : -rank - 1 : -1]
        lift = np.linalg.qr(scaled @ right.astype(np.float32))[0]
    lift = np.ascontiguousarray(lift, np.float32)
    return lift, lift.T @ weight
