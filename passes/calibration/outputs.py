"""How far the results of a function move when some of its weights change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tilewright.ir import Function, Module
from tilewright.ir.ops import numerics
from tilewright.passes.calibration.data import Array, Batch, rows
from tilewright.passes.calibration.stream import Stream


@dataclass(frozen=True)
class Outputs:
    """The results of a function as it is, which others are compared with.

    A language model's are its logits: log-probabilities f32 are kept, ``tokens * vocabulary * 4`` bytes.
    """

    kept: Sequence[Array]
    index: int
    is_distribution: bool

    @property
    def unit(self) -> str:
        return "KL divergence" if self.is_distribution else "squared error"

    @classmethod
    def of(cls, module: Module, function: Function, batches: Sequence[Batch]) -> Outputs:
        """Run ``function`` as it is."""
        names = json.loads(module.meta.get("outputs", "[]"))
        index = names.index(module.meta["logits"]) if module.meta.get("logits") in names else 0
        is_distribution = module.meta.get("task") == "causal-lm"
        found = Stream(function, batches).results()[index]
        return cls([log_softmax(x) if is_distribution else numerics.wide(x) for x in found], index, is_distribution)

    def distance(self, run: Stream) -> float:
        """Run to the end: the mean KL divergence a token from what is kept, or the squared error relative to it."""
        found, kept = run.results()[self.index], self.kept
        if not self.is_distribution:
            errors = [float(np.square(numerics.wide(b) - a, dtype=np.float64).sum()) for a, b in zip(kept, found)]
            return sum(errors) / max(sum(float(np.square(a, dtype=np.float64).sum()) for a in kept), 1e-300)
        total = sum(float((np.exp(a) * (a - log_softmax(b))).sum(dtype=np.float64)) for a, b in zip(kept, found))
        return total / float(sum(a.size // a.shape[-1] for a in kept))


def log_softmax(logits: Array) -> Array:
    """f32, along the last axis."""
    x = numerics.wide(logits).astype(np.float32)
    x = x - x.max(-1, keepdims=True)
    out: Array = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return out


def first(function: Function, batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """Micro-batches of about ``tokens`` tokens from the front; one is cut along axis 0 where all inputs share it."""
    found: list[Batch] = []
    left = tokens
    for batch in batches:
        if left <= 0:
            break
        whole = rows(batch)
        found.append(batch if whole <= left else _cut(function, batch, left / whole))
        left -= whole
    return found


def _cut(function: Function, batch: Batch, share: float) -> Batch:
    """The first ``share`` of the rows of all inputs, at least one; all of them when they have no axis in common."""
    leads = {str(a.shape[0]) for a in function.args if a.shape and not isinstance(a.shape[0], int)}
    if len(leads) != 1 or any(not a.shape or isinstance(a.shape[0], int) for a in function.args):
        return batch
    size = len(next(iter(batch.values())))
    return {name: array[: max(1, round(share * size))] for name, array in batch.items()}
