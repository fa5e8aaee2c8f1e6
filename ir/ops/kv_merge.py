"""A token that leaves a cache goes on in the kept one that it is most like (D2O, arXiv:2406.13035), in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

PACE = 0.7
"""How far a call moves the threshold towards its own mean."""
TINY = 1e-30
"""The least product of two squared lengths: a key of zeros is like none."""


def merged(keys: Array, values: Array, leaving: Array, threshold: float | None) -> np.float32:
    """Merge the slots ``leaving`` of ``keys [T, D]`` and ``values [T, E]`` into others, in place: the new threshold.

    Each meets the slot that stays whose key is nearest by cosine (of equals the first). The threshold is the mean of these
    similarities, and from then on (when one is given) moves towards the mean of each call. Those at least as similar as it
    are merged, one after the other: a slot is the mean of all in it, each weighing exp(its similarity), the first exp(1).
    """
    staying = np.setdiff1d(np.arange(len(keys)), leaving)
    plain = keys.astype(np.float32)
    lengths = (plain * plain).sum(-1)
    products = plain[leaving] @ plain[staying].T
    likeness = products / np.sqrt(np.maximum(lengths[leaving, None] * lengths[staying], np.float32(TINY)))
    nearest, most = staying[likeness.argmax(-1)], likeness.max(-1)
    mean = most.mean(dtype=np.float32)
    level = mean if threshold is None else np.float32(threshold + PACE * (mean - threshold))
    total = np.ones(len(keys), np.float32)
    for slot, to, like in zip(leaving, nearest, most):
        if like < level:
            continue
        weight = np.exp(like - 1)
        total[to] += weight
        for of in (keys, values):
            old, new = (of[at].astype(np.float32) for at in (to, slot))
            of[to] = (old + (new - old) * (weight / total[to])).astype(of.dtype)
    return np.float32(level)
