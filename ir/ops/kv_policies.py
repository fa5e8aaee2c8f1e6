"""What a token of a cache is worth, and which ones stay: the rules of policies, in NumPy.

Every policy adds up, over queries, what it gains from the weights that attention gave a token, summed over the query heads
of a key head. A policy is what it gains of one query, and its defaults; the sums, what always stays, and what becomes of
the others are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Policy:
    """``gain(weights, mean)`` is what tokens gain of each query, by its weights at ``temperature``.

    ``weights`` f32 ``[..., S, T]``, ``mean`` ``[S, 1]``: what the tokens that a query saw would get if all got the same.
    Of the last ``observe`` queries (0: of all, for good) gains count; with many tokens to choose from, each is worth the
    most of the ``pool`` slots around it.
    """

    gain: Callable[[Array, Array], Array]
    observe: int = 0
    pool: int = 1
    temperature: float = 1.0


def _weight(weights: Array, mean: Array) -> Array:
    return weights


def _above_mean(weights: Array, mean: Array) -> Array:
    return (weights > mean).astype(np.float32)


POLICIES: dict[str, Policy] = {
    "h2o": Policy(_weight),  # heavy hitters: all that a token ever got (arXiv:2306.14048)
    "snapkv": Policy(_weight, observe=32, pool=7),  # what the last queries looked at (arXiv:2404.14469)
    "scissorhands": Policy(_above_mean, observe=400),  # how often it got more than the mean (arXiv:2305.17118)
    "keyformer": Policy(_weight, temperature=2.0),  # flatter weights; the paper adds noise too (arXiv:2403.09054)
}


@dataclass(frozen=True)
class Rule:
    """How worths grow, and which tokens stay: the first ``first`` positions, the last ``recent``, then the worthiest.

    With ``merge`` others go on in those that stay, see `kv_merge`.
    """

    policy: str
    recent: int
    first: int
    observe: int
    pool: int
    merge: bool = False

    def worth(self, old: Array, weights: Array, live: int) -> Array:
        """The worths ``[H, T]`` after a call of queries that gave ``weights [H, G, n, T]``, the first seeing live + 1."""
        group, count = weights.shape[1:3]
        mean = np.float32(group) / (live + 1 + np.arange(count, dtype=np.float32))[:, None]
        gains = POLICIES[self.policy].gain(weights.sum(1), mean)
        left = max(0.0, 1 - count / self.observe) if self.observe else 1
        out: Array = old * np.float32(left) + gains[:, -self.observe :].sum(1)
        return out

    def leaves(self, worth: Array, position: Array, end: int, count: int) -> Array:
        """Which ``count`` slots of ``worth [T]`` are given up when the text has ``end`` tokens; of equals the oldest."""
        worth = pooled(worth, self.pool) if count > 1 else worth
        stays = (position >= end - self.recent) | (position < self.first)
        order = np.lexsort((position, np.where(stays, np.inf, worth)))
        out: Array = np.sort(order[:count])
        return out


def pooled(worth: Array, pool: int) -> Array:
    """The most of the ``pool`` slots around each of ``[T]``."""
    wide = np.pad(worth, pool // 2, constant_values=-np.inf)
    out: Array = np.lib.stride_tricks.sliding_window_view(wide, pool).max(-1)
    return out


def moves(leaving: Array, live: int) -> tuple[Array, Array]:
    """Where slots go to (first) and come from so that those that stay are in front.

    The last takes the place of one that leaves; of several, those behind them move up in order.
    """
    if len(leaving) == 1:
        return leaving, np.array([live - 1])
    stay = np.setdiff1d(np.arange(live), leaving)
    return np.arange(len(stay)), stay
