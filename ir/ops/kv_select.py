"""``kv.select``: the pages of a cache that are worth reading for one query (Quest, arXiv:2406.10774)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright.ir.core import Env, Op, Value
from tilewright.ir.ops import numerics as num
from tilewright.ir.ops.attention import expect_groups
from tilewright.ir.ops.kv import expect_pages, expect_table
from tilewright.ir.ops.shapes import expect_dim, expect_rank
from tilewright.ir.types import Dim, DType, KVType, TensorType, Type, as_dim, product

Array = np.ndarray[Any, Any]
FORCED = 2
"""Pages that are always chosen: the first, on which models park attention, and the last, which is not full yet."""


def count(used: Any, share: float, least: int) -> Any:
    """How many of ``used`` pages are chosen: ``share`` of them, in f32 rounded up, and at least ``least``, if there are."""
    wanted = np.ceil(np.float32(share) * np.asarray(used, np.float32)).astype(np.int64)
    return np.minimum(used, np.maximum(wanted, max(least, FORCED)))


def summary(keys: Array, dtype: DType) -> tuple[Array, Array]:
    """The least and the greatest of each component of keys ``[.., page, H, D]``, as ``dtype``: two ``[.., H, D]``."""
    return keys.min(-3).astype(dtype.np), keys.max(-3).astype(dtype.np)


def worth(q: Array, low: Array, high: Array, spread: float) -> Array:
    """What is expected of the products of queries ``[Hq, D]`` with keys between ``low`` and ``high`` ``[P, H, D]``.

    Summed over the queries of each head of keys: f32 ``[H, P]``.
    """
    groups = num.wide(q).reshape(low.shape[1], -1, low.shape[2])
    some = np.float32(spread) * np.abs(groups)
    up, down = ((groups + some) / 2).sum(1), ((groups - some) / 2).sum(1)
    return np.asarray(np.einsum("hd,phd->hp", up, num.wide(high)) + np.einsum("hd,phd->hp", down, num.wide(low)))


class Select(Op):
    """The pages that q ``[B, 1, Hq, D]``, at ``start[b]``, is to see by each head of keys: i32 ``[B, H, N]``.

    Of the pages of a sequence, ``ceil(share * pages)`` but at least ``least``: the first, the last, and those whose summary
    promises the most (of two alike, the earlier). They are numbered in the sequence and come in order; behind them is -1.

    A page promises sum_d (q_d * (max_d + min_d) + spread * |q_d| * (max_d - min_d)) / 2, added up over the query heads that
    share a key head. With ``spread=1`` that is what no product with its keys exceeds, sum_d max(q_d * min_d, q_d * max_d);
    none comes near it in all components at once, so less tells pages apart better.
    """

    name = "kv.select"
    q: Value
    cache: Value
    start: Value
    table: Value
    share: float = 0.25
    least: int = 4
    spread: float = 0.5

    def infer(self) -> tuple[Type, ...]:
        kv: KVType = self.cache.cache
        expect_rank(self, "q", self.q.shape, 4)
        expect_dim(self, "q, queries", self.q.shape[1], 1)
        expect_dim(self, "q, size of a head", self.q.shape[3], kv.dim)
        expect_groups(self, self.q.shape[2], kv.heads)
        expect_rank(self, "start", self.start.shape, 1)
        expect_table(self, self.table, self.q)
        self.expect(kv.has_summary, f"pages are chosen by their summaries; give the cache summary=minmax: {kv}")
        self.expect(0 < self.share <= 1, f"share is above 0 and at most 1, got {self.share}")
        self.expect(self.least >= 1, f"least is at least 1, got {self.least}")
        self.expect(0 <= self.spread <= 1, f"spread is between 0 and 1, got {self.spread}")
        return (TensorType((self.q.shape[0], kv.heads, self.most), DType.i32),)

    @property
    def most(self) -> int:
        """The most pages that are chosen."""
        return int(count(self.cache.cache.pages, self.share, self.least))

    def evaluate(self, env: Env, q: Any, cache: Any, start: Any, table: Any) -> Any:
        kv: KVType = self.cache.cache
        out = np.full((len(start), kv.heads, self.most), -1, np.int32)
        for b, at in enumerate(start):
            used = int(at) // kv.page + 1
            self.expect(used <= table.shape[1], f"a query at {at}, the tables hold {table.shape[1]} pages")
            wanted = int(count(used, self.share, self.least))
            full = cache[0][expect_pages(self, table[b, : used - 1], cache[0])]
            scores = worth(q[b, 0], *summary(full, kv.summaries), self.spread)
            scores[:, :1] = np.inf
            best = np.argsort(-scores, axis=1, kind="stable")[:, : wanted - 1]
            out[b, :, : wanted - 1] = np.sort(best, axis=1)
            out[b, :, wanted - 1] = used - 1
        return out

    def flops(self) -> Dim:
        kv: KVType = self.cache.cache
        return as_dim(product((self.q.shape[0], kv.heads)) * 4 * kv.dim * kv.pages)
