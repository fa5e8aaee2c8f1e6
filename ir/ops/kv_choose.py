"""``kv.choose``: which blocks of keys queries will attend to, found cheaply, so that ``kv.attend`` skips the others.

Patterns of MInference (arXiv:2407.02490) and the choice by sums of FlexPrefill (arXiv:2502.20766), in whole blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright.ir.core import Env, Op, Value
from tilewright.ir.kv_kept import Kept
from tilewright.ir.kv_layouts import Ring
from tilewright.ir.ops import numerics as num
from tilewright.ir.ops.attention import expect_groups
from tilewright.ir.ops.kv import expect_table, gathered
from tilewright.ir.ops.shapes import expect_dim, expect_rank
from tilewright.ir.types import Dim, DType, TensorType, Type, as_dim, product

Array = np.ndarray[Any, Any]
PATTERNS = ("a-shape", "vertical-slash", "block-sparse", "flex")
BLOCKS = (32, 64, 128, 256)
"""Keys of a block."""


SIZES = ("block", "queries", "sinks", "local", "dense", "tokens", "columns", "slashes", "share", "gamma", "tau", "sample")
"""Attributes that say how much is chosen."""


def unfit(
    block: int, queries: int, sinks: int, local: int, dense: int, tokens: int, columns: int, slashes: int, share: float,
    gamma: float, tau: float, sample: int,
) -> str | None:  # fmt: skip
    """Why nothing can be chosen so, or None."""
    if block not in BLOCKS:
        return f"block is one of {', '.join(map(str, BLOCKS))}, got {block}"
    if queries < 1 or queries & (queries - 1):
        return f"queries is a power of two, got {queries}"
    if not (0 < share <= 1 and 0 < gamma <= 1 and tau >= 0):
        return f"share and gamma are above 0 and at most 1, tau is at least 0: {share}, {gamma}, {tau}"
    if min(local, dense, tokens, columns, slashes, sinks - 1, sample - 1) < 0:
        return "sinks and sample are at least 1; local, dense, tokens, columns and slashes are not negative"
    return None


class Choose(Op):
    """Blocks of ``block`` keys for each block of ``queries`` of the S, and each key head.

    q ``[B, S, Hq, D]`` at positions from ``start[b]`` on, over a cache that has their keys already -> i32
    ``[B, H, ceil(S / queries), 1 + ceil(length / block)]``: how many, and which, in order; zeros behind them.
    ``patterns`` has one for each key head, or one for all.

    Always there are the blocks of the first ``sinks`` positions (of one at least), of the last ``local`` before a block of
    queries, and all from its first query's on; all blocks, where its last query stands before position ``dense``. That is
    ``a-shape``. ``vertical-slash`` adds the blocks of ``columns`` tokens that have most of the attention of the last
    ``sample`` queries, and the diagonals (blocks equally far behind the query's) that have most of it, as many as blocks
    that hold ``slashes`` tokens. ``block-sparse`` takes the best, ``share`` of those up to the query, by the softmax of the
    mean query's products with mean keys. ``flex`` takes the best until their sum is ``gamma``: of those products if they
    tell the sample's attention (Jensen-Shannon distance below ``tau``), else of columns, and of diagonals. What a key head
    chooses is for all its query heads: weights are the means of theirs.

    With ``tokens`` the lists of all but ``flex`` are of one length, as many blocks as hold so many tokens: of
    ``block-sparse`` whatever ``share`` says, and where others have chosen fewer the nearest are added.
    """

    name = "kv.choose"
    q: Value
    cache: Value
    start: Value
    table: Value | None = None
    patterns: tuple[str, ...] = ("flex",)
    block: int = 64
    queries: int = 64
    sinks: int = 1
    local: int = 0
    dense: int = 0
    tokens: int = 0
    columns: int = 1024
    slashes: int = 1024
    share: float = 0.25
    gamma: float = 0.9
    tau: float = 0.1
    sample: int = 64
    scale: float = 1.0

    def infer(self) -> tuple[Type, ...]:
        kv = self.cache.cache
        expect_rank(self, "q", self.q.shape, 4)
        expect_dim(self, "q, size of a head", self.q.shape[3], kv.dim)
        expect_groups(self, self.q.shape[2], kv.heads)
        expect_table(self, self.table, self.q)
        self.expect(not isinstance(kv.layout, (Ring, Kept)), f"blocks are chosen of all keys, which {kv.layout} has not")
        self._check_patterns(kv.heads)
        b, s = self.q.shape[:2]
        shape = (b, kv.heads, as_dim(-(-s // self.queries)), 1 + -(-kv.length // self.block))
        return (TensorType(shape, DType.i32),)

    def _check_patterns(self, heads: int) -> None:
        known = all(p in PATTERNS for p in self.patterns)
        self.expect(known, f"a pattern of {', '.join(self.patterns)} is none of {', '.join(PATTERNS)}")
        self.expect(len(self.patterns) in (1, heads), f"{len(self.patterns)} patterns for {heads} key heads")
        if reason := unfit(**{f.name: getattr(self, f.name) for f in self.fields if f.name in SIZES}):
            self.fail(reason)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The pattern of each key head."""
        heads = self.cache.cache.heads
        return self.patterns * heads if len(self.patterns) == 1 else self.patterns

    def evaluate(self, env: Env, q: Any, cache: Any, start: Any, table: Any) -> Any:
        kv = self.cache.cache
        if kv.page:
            cache = gathered(self, cache, table, start[:, None] + np.arange(q.shape[1]))
        out = np.zeros(env.shape(self.result.shape), np.int32)
        for b, first in enumerate(start):
            for head, kind in enumerate(self.kinds):
                group = q[b].reshape(q.shape[1], kv.heads, -1, q.shape[3])[:, head].transpose(1, 0, 2)
                for i, found in enumerate(Chooser(self, group, cache[0][b, :, head], int(first)).lists(kind)):
                    out[b, head, i, : 1 + len(found)] = [len(found), *found]
        return out

    def flops(self) -> Dim:
        b, s, h, d = self.q.shape
        return as_dim(2 * product((b, h, d)) * (self.sample + s // self.queries) * self.cache.cache.length)


class Chooser:
    """What one key head chooses for queries ``[group, S, D]`` from position ``start`` on, over keys ``[T, D]``."""

    def __init__(self, op: Choose, q: Array, keys: Array, start: int) -> None:
        self.op, self.q, self.start, self.end = op, q, start, start + q.shape[1]
        self.blocks = -(-self.end // op.block)
        self.keys = num.wide(keys[: self.end])

    def lists(self, kind: str) -> list[list[int]]:
        """The blocks of each block of queries."""
        op = self.op
        spans = [(i, min(i + op.queries, self.q.shape[1])) for i in range(0, self.q.shape[1], op.queries)]
        if self.end <= op.dense or kind == "a-shape":
            return [self._listed(self._filled(self._always(span), kind)) for span in spans]
        gamma = kind == "flex"
        if kind == "block-sparse" or (gamma and self.distance() < op.tau):
            return [self._best_of_products(span, gamma) for span in spans]
        columns, slashes = self.lines(gamma)
        return [self._listed(self._filled(self._on_lines(span, columns, slashes), kind)) for span in spans]

    def _rows(self, span: tuple[int, int]) -> range:
        """The blocks in which some queries stand."""
        return range((self.start + span[0]) // self.op.block, (self.start + span[1] - 1) // self.op.block + 1)

    def _always(self, span: tuple[int, int]) -> Array:
        """Which blocks are there in any case."""
        op, own = self.op, self._rows(span)
        keep = np.zeros(own.stop, bool)
        keep[: -(-op.sinks // op.block)] = True
        keep[max(self.start + span[0] - op.local, 0) // op.block :] = True
        return np.ones_like(keep) if self.start + span[1] <= op.dense else keep

    @staticmethod
    def _listed(keep: Array) -> list[int]:
        return [int(i) for i in np.flatnonzero(keep)]

    def attention(self) -> tuple[Array, Array]:
        """What the last queries give each block, f32 ``[group, sample, blocks]``, and the block that each stands in."""
        op = self.op
        last = self.q[:, -op.sample :]
        where = np.arange(self.end - last.shape[1], self.end)
        scores = num.wide(last) @ self.keys.T * np.float32(op.scale)
        weights = num.softmax(np.where(np.arange(self.end) <= where[:, None], scores, -np.inf))
        starts = np.arange(0, self.end, op.block)
        return np.add.reduceat(weights, starts, -1), where // op.block

    def products(self, span: tuple[int, int]) -> Array:
        """How the mean of some queries spreads over the mean keys of blocks up to the last of them, f32 ``[blocks]``."""
        op, end = self.op, self.start + span[1]
        mean = num.wide(num.wide(self.q[:, span[0] : span[1]]).mean(1).astype(self.q.dtype))
        scores = mean @ self.keys[:end].T
        starts = np.arange(0, end, op.block)
        counts = np.minimum(op.block, end - starts).astype(np.float32)
        weights: Array = num.softmax(np.add.reduceat(scores, starts, -1) / counts * np.float32(op.scale)).mean(0)
        return weights

    def distance(self) -> float:
        """Jensen-Shannon distance between the attention of the last queries and what products take it to be."""
        size = self.q.shape[1]
        true = self.attention()[0].mean((0, 1))
        guess = self.products((max(size - self.op.sample, 0), size))
        middle = (true + guess) / 2
        return float(np.sqrt(max((_divergence(true, middle) + _divergence(guess, middle)) / 2, 0.0)))

    def lines(self, gamma: bool) -> tuple[Array, Array]:
        """Which columns, and which diagonals by how many blocks they are behind, are taken."""
        op = self.op
        weights, where = self.attention()
        columns, slashes = weights.mean((0, 1)), np.zeros(self.blocks, np.float32)
        for row, at in zip(weights.mean(0), where):
            slashes[: at + 1] += row[at::-1] / np.float32(len(where))
        if gamma:
            return best(columns, gamma=op.gamma), best(slashes, gamma=op.gamma)
        return best(columns, -(-op.columns // op.block)), best(slashes, -(-op.slashes // op.block))

    def _filled(self, keep: Array, kind: str) -> Array:
        """With the nearest of the others, as many as ``tokens`` has room for."""
        room = -(-self.op.tokens // self.op.block) - int(keep.sum())
        if room > 0 and kind != "flex":
            keep[np.flatnonzero(~keep)[-room:]] = True
        return keep

    def _on_lines(self, span: tuple[int, int], columns: Array, slashes: Array) -> Array:
        keep = self._always(span)
        keep |= columns[: len(keep)]
        for row in self._rows(span):
            keep[: row + 1] |= slashes[row::-1]
        return keep

    def _best_of_products(self, span: tuple[int, int], gamma: bool) -> list[int]:
        op, keep = self.op, self._always(span)
        if keep.all():
            return self._listed(keep)
        weights = self.products(span)
        if gamma:
            return self._listed(best(weights, gamma=op.gamma, keep=keep))
        share = int(np.ceil(np.float32(op.share) * np.float32(len(keep))))
        return self._listed(best(weights, -(-op.tokens // op.block) or share, keep=keep))


def best(weights: Array, count: int | None = None, gamma: float = 2.0, keep: Array | None = None) -> Array:
    """The ``keep`` ones and the greatest others, ties to the first, until there are ``count`` or their sum is ``gamma``."""
    taken = np.zeros(len(weights), bool) if keep is None else keep.copy()
    total, number = np.float32(weights[taken].sum()), int(taken.sum())
    for i in np.argsort(-weights, kind="stable"):
        if number >= (len(weights) if count is None else count) or total >= np.float32(gamma):
            break
        if not taken[i]:
            taken[i], total, number = True, total + weights[i], number + 1
    return taken


def _divergence(p: Array, q: Array) -> float:
    """Kullback-Leibler, nats."""
    some = p > 0
    return float((p[some] * np.log(p[some] / q[some])).sum())
