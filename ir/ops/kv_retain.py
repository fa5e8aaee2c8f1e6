"""``kv.retain``: attention over kept tokens, after which only the budget's worth of them stays."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright.ir.core import Env, Value
from tilewright.ir.ops.attention import mixed, weigh
from tilewright.ir.ops.kv import Attend
from tilewright.ir.ops.kv_merge import merged
from tilewright.ir.ops.kv_policies import POLICIES, Rule, moves
from tilewright.ir.ops.shapes import expect_dim, expect_rank
from tilewright.ir.types import DType, KVType, Type

Array = np.ndarray[Any, Any]


class Retain(Attend):
    """``kv.attend`` over a cache of kept tokens, and the cache with no more than its budget of them.

    ``count`` (i64 ``[B]``) of the call's tokens are of the text, the others padding; a sequence with none stays as it is.
    What a token is worth grows as ``policy`` says (h2o, snapkv, scissorhands, keyformer) with the weights that queries gave
    it, summed over the query heads that share its key; gains of the last ``observe`` queries count (0: of all). The first
    ``first`` positions and the last ``recent`` always stay. ``pool``: when several tokens leave, each is worth the most of
    so many slots around it. ``temperature`` divides the scores behind the weights that count. With ``merge`` a
    token that leaves is merged into the one that it is most like, if it is like enough (`kv_merge`); how much is enough is
    kept as the worth of the first slot behind the budget.
    """

    name = "kv.retain"
    has_effect = True
    count: Value | None = None
    policy: str = "h2o"
    recent: int = 0
    first: int = 0
    observe: int = 0
    pool: int = 1
    temperature: float = 1.0
    merge: bool = False

    def infer(self) -> tuple[Type, ...]:
        (out,) = super().infer()
        kv: KVType = self.cache.cache
        self.expect(kv.budget > 0, f"keeps tokens in a cache with a budget, and only that: {kv}")
        self.expect(self.policy in POLICIES, f"no policy {self.policy!r}; there are {', '.join(POLICIES)}")
        sizes = self.recent, self.first, self.observe
        self.expect(min(sizes) >= 0, f"recent, first and observe are not negative, got {sizes}")
        always = self.recent + self.first
        self.expect(always <= kv.budget, f"{always} tokens always stay, the budget is {kv.budget}")
        self.expect(self.pool >= 1 and self.pool % 2 == 1, f"pool is odd and positive, got {self.pool}")
        self.expect(self.temperature > 0, f"a temperature is positive, got {self.temperature}")
        if self.count is None:
            self.fail("needs count, how many tokens of each sequence are of the text")
        expect_rank(self, "count", self.count.shape, 1)
        self.expect(self.count.dtype is DType.i64, f"count is {self.count.dtype.value}, not i64")
        expect_dim(self, "count, sequences", self.count.shape[0], self.q.shape[0])
        return out, kv

    @property
    def rule(self) -> Rule:
        """Which tokens stay."""
        return Rule(self.policy, self.recent, self.first, self.observe, self.pool, self.merge)

    def evaluate(self, env: Env, *args: Any) -> Any:
        q, cache, start, bias, sinks, table, q_sinks, pages, blocks, count = args
        scores, keep, values, bias = self.scored(q, cache, start, bias, table, q_sinks, pages, blocks)
        how = keep, bias, sinks, self.scale, self.softcap
        weights = weigh(scores, *how)
        out = mixed(weights, values).astype(q.dtype)
        if self.temperature != 1:
            weights = weigh(scores, *how, self.temperature)
        after = tuple(x.copy() for x in cache)
        groups = weights.reshape(len(q), self.cache.cache.heads, -1, *weights.shape[2:])
        for b, n in enumerate(count):
            self.expect(0 <= n <= q.shape[1], f"{n} tokens of the text in a call of {q.shape[1]}")
            if n > 0:
                self.retain(tuple(x[b] for x in after), groups[b, :, :, :n], int(start[b]))
        return out, after

    def retain(self, cache: tuple[Array, ...], weights: Array, start: int) -> None:
        """Choose among the slots of one sequence, by weights ``[H, G, n, T]``, and close the ranks."""
        keys, values, notes = cache
        budget, count = self.cache.cache.budget, weights.shape[2]
        live, end = min(start, budget), min(start, budget) + count
        thresholds = notes[:, 0, budget].tolist() if start > budget else [None] * len(notes)
        notes[:, :, live:] = 0
        notes[:, 1, live:end] = start + np.arange(count)
        notes[:, 0] = self.rule.worth(notes[:, 0], weights, live)
        if end <= budget:
            return
        for head, (worth, position) in enumerate(notes):
            leaving = self.rule.leaves(worth[:end], position[:end], start + count, end - budget)
            level = merged(keys[:end, head], values[:end, head], leaving, thresholds[head]) if self.merge else 0
            to, source = moves(leaving, end)
            keys[to, head], values[to, head] = keys[source, head], values[source, head]
            notes[head][:, to] = notes[head][:, source]
            notes[head, 0, budget] = level
