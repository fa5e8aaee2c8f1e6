"""``kv.append`` and ``kv.attend``: with ``kv.retain`` the only operations that look into a cache.

In the interpreter a cache is two arrays of what its slots decode to: K ``[B, slots, H, D]`` and V ``[B, slots, H, Dv]``, or
``[pages, page, H, ...]`` for all sequences; Dv is 0 where values are among the keys. Kept tokens have a third one, notes
f32 ``[B, H, 2, slots]``: what each is worth, and its position.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tilewright.ir.core import Env, Op, Value
from tilewright.ir.kv_kept import Kept
from tilewright.ir.kv_layouts import Ring
from tilewright.ir.ops.attention import average, expect_groups, products, visible
from tilewright.ir.ops.kv_codes import appended, rounded
from tilewright.ir.ops.shapes import expect_dim, expect_rank
from tilewright.ir.types import Dim, DType, KVType, Type, as_dim, product

Array = np.ndarray[Any, Any]


class Append(Op):
    """The cache with k ``[B, S, H, D]``, v ``[B, S, H, Dv]`` at positions ``start[b] .. start[b] + S``.

    Which slots these have is up to the cache's layout. That of pages takes a ``table`` (i32 ``[B, T]``) of the pages of
    each sequence, in order; only those that hold its tokens are looked at. Where values are the first components of keys
    there is no v.
    """

    name = "kv.append"
    has_effect = True
    cache: Value
    k: Value
    v: Value | None
    start: Value
    table: Value | None = None

    def infer(self) -> tuple[Type, ...]:
        kv = self.cache.cache
        self.expect((self.v is not None) == (kv.own_vdim > 0), f"takes values if they are not among the keys: {kv}")
        for what, x, size in (("k", self.k, kv.dim), ("v", self.v, kv.own_vdim)):
            if x is None:
                continue
            expect_rank(self, what, x.shape, 4)
            expect_dim(self, f"{what}, heads", x.shape[2], kv.heads)
            expect_dim(self, f"{what}, size of a head", x.shape[3], size)
        expect_rank(self, "start", self.start.shape, 1)
        expect_table(self, self.table, self.k)
        return (kv,)

    def evaluate(self, env: Env, cache: Any, k: Any, v: Any, start: Any, table: Any) -> Any:
        out = (cache[0].copy(), cache[1].copy())
        v = k[..., :0] if v is None else v
        for b, at in enumerate(start):
            end = int(at) + k.shape[1]
            slots = self.slots(b, np.arange(at, end), table, out[0])
            for store, new in zip(out, appended(self.cache.cache, k[b], v[b])):
                store[slots] = new
            self.encode(b, int(at), end, table, out)
        return (*out, *cache[2:])

    def slots(self, b: int, positions: Array, table: Any, memory: Array) -> tuple[Any, Any]:
        """The places of some positions in K and V; fails for those that the cache has no room for."""
        kv, at, count = self.cache.cache, int(positions[0]), len(positions)
        fits = 0 <= at <= kv.length - count
        self.expect(fits, f"token {at} and {count} more do not fit the cache's {kv.length} slots")
        if isinstance(kv.layout, Ring):
            most = kv.layout.chunk
            self.expect(count <= most, f"{count} tokens at once, the ring takes {most}")
            return b, np.where(positions < kv.sinks, positions, kv.sinks + positions % kv.layout.size)
        if isinstance(kv.layout, Kept):
            most = kv.layout.chunk
            self.expect(count <= most, f"{count} tokens at once, there is room for {most} behind those kept")
            return b, min(at, kv.budget) + np.arange(count)
        if not kv.page:
            return b, positions
        entries = positions // kv.page
        known = table.shape[1]
        self.expect(entries[-1] < known, f"token {at} and {count} more do not fit {known} pages of {kv.page}")
        return expect_pages(self, table[b, entries], memory), positions % kv.page

    def encode(self, b: int, start: int, end: int, table: Any, out: tuple[Array, Array]) -> None:
        """Round the groups that became old enough to be codes."""
        kv = self.cache.cache
        first, last = kv.coded(start), kv.coded(end)
        if not kv.keeps_recent or first >= last:
            return
        slots = self.slots(b, np.arange(first, last), table, out[0])
        for store, numbers in zip(out, rounded(kv, *(x[slots] for x in out))):
            store[slots] = numbers


class Attend(Op):
    """Causal attention of q ``[B, S, Hq, D]`` over a cache: query s of sequence b stands at ``start[b] + s``.

    It sees the positions up to its own; ``bias`` broadcasts to ``[B, Hq, S, length]``; the rest is as in nn.attention.
    ``table`` is that of the cache's pages. A ring is seen through a window (or chunk) that it holds, and its first
    positions, the sinks, always: by ``q_sinks``, if given, the queries as they would be at the end of sinks and window.

    With ``pages`` (i32 ``[B, H, N]``, of ``kv.select``) the one query of each sequence sees, by head of keys, only these of
    the sequence's pages. They are in order, the last is the query's own; numbers below 0, at the end, are none. With
    ``blocks``, of ``kv.choose``, queries see only those of their list: ``block`` keys each, a list for ``queries`` each.
    """

    name = "kv.attend"
    q: Value
    cache: Value
    start: Value
    bias: Value | None = None
    sinks: Value | None = None
    scale: float = 1.0
    window: int = -1
    chunk: int = 0
    softcap: float = 0.0
    table: Value | None = None
    q_sinks: Value | None = None
    pages: Value | None = None
    blocks: Value | None = None
    block: int = 64
    queries: int = 64

    def infer(self) -> tuple[Type, ...]:
        kv: KVType = self.cache.cache
        expect_rank(self, "q", self.q.shape, 4)
        expect_dim(self, "q, size of a head", self.q.shape[3], kv.dim)
        expect_groups(self, self.q.shape[2], kv.heads)
        expect_table(self, self.table, self.q)
        self.check_ring(kv)
        self.check_pages(kv)
        self.check_blocks(kv)
        return (self.q.tensor.with_shape((*self.q.shape[:3], kv.vdim)),)

    def check_pages(self, kv: KVType) -> None:
        if self.pages is None:
            return
        expect_rank(self, "pages", self.pages.shape, 3)
        expect_dim(self, "pages, sequences", self.pages.shape[0], self.q.shape[0])
        expect_dim(self, "pages, heads", self.pages.shape[1], kv.heads)
        self.expect(self.pages.dtype is DType.i32, f"pages is {self.pages.dtype.value}, not i32")
        single = kv.page > 0 and self.q.shape[1] == 1
        self.expect(single, "pages are chosen for one query of each sequence, of a cache of pages")
        self.expect(self.window <= 0 and self.chunk <= 0, "pages are chosen where a query sees all of them, not a window")

    def check_ring(self, kv: KVType) -> None:
        limited = kv.budget > 0 and (self.window > 0 or self.chunk > 0)
        self.expect(not limited, "a window or chunk of positions, which kept tokens have in no order")
        self.expect(self.q_sinks is None or kv.sinks > 0, f"q_sinks is for a ring with sinks, and only that: {kv}")
        if self.q_sinks is not None:
            self.expect(self.q_sinks.type == self.q.type, f"q_sinks is {self.q_sinks.type}, q {self.q.type}")
        by_key = self.bias is not None and self.bias.shape[-1:] not in ((), (1,))
        mixed = isinstance(kv.layout, (Ring, Kept))
        self.expect(not (by_key and mixed), f"a bias for each position, which {kv.layout} does not keep apart")
        if not isinstance(kv.layout, Ring):
            return
        sight = min((n for n in (self.window, self.chunk) if n > 0), default=0)
        self.expect(0 < sight <= kv.layout.window, f"sees {sight or 'all'} tokens of a ring that holds {kv.layout.window}")

    def check_blocks(self, kv: KVType) -> None:
        if self.blocks is None:
            return
        self.expect(self.block > 0 and self.queries > 0, f"block and queries are positive: {self.block}, {self.queries}")
        expect_rank(self, "blocks", self.blocks.shape, 4)
        b, s = self.q.shape[:2]
        wanted = (b, kv.heads, as_dim(-(-s // self.queries)), 1 + -(-kv.length // self.block))
        for axis, (found, size) in enumerate(zip(self.blocks.shape, wanted)):
            expect_dim(self, f"blocks, axis {axis}", found, size)
        whole = not isinstance(kv.layout, (Ring, Kept)) and self.window <= 0 and self.chunk <= 0
        self.expect(whole, f"blocks are chosen of all keys, not of a window, a chunk, a ring or kept tokens: {kv}")

    def evaluate(
        self, env: Env, q: Any, cache: Any, start: Any, bias: Any, sinks: Any, table: Any, q_sinks: Any, pages: Any,
        blocks: Any
    ) -> Any:
        scores, keep, values, bias = self.scored(q, cache, start, bias, table, q_sinks, pages, blocks)
        return average(scores, values, keep, bias, sinks, self.scale, self.softcap).astype(q.dtype)

    def scored(
        self, q: Any, cache: Any, start: Any, bias: Any, table: Any, q_sinks: Any, pages: Any, blocks: Any
    ) -> tuple[Array, Array, Array, Any]:
        """Products of queries and keys ``[B, Hq, S, T]``, which are seen ``[B, Hq|1, S, T]``, the values, and the bias."""
        kv = self.cache.cache
        first = np.minimum(start, kv.budget) if kv.budget else start
        where = first[:, None] + np.arange(q.shape[1])
        if kv.page:
            cache = gathered(self, cache, table, where)
        if bias is not None and bias.shape[-1:] not in ((), (1,)):
            bias = bias[..., : cache[0].shape[1]]
        keys = ring_positions(kv.layout, where) if isinstance(kv.layout, Ring) else np.arange(cache[0].shape[1])
        keep = visible(where, keys, True, self.window, -1, self.chunk)
        if isinstance(kv.layout, Ring):
            keep = keep & (keys >= kv.sinks)
            keep[..., : kv.sinks] = np.arange(kv.sinks) <= where[..., None]
        keep = keep[:, None]
        if pages is not None:
            chosen = (keys // kv.page == pages[..., None]).any(2)
            keep = keep & np.repeat(chosen, q.shape[2] // kv.heads, 1)[:, :, None]
        if blocks is not None:
            keep = keep & np.repeat(self.chosen(where, keys, blocks), q.shape[2] // kv.heads, axis=1)
        scores = products(q, cache[0])
        if q_sinks is not None:
            scores[..., : kv.sinks] = products(q_sinks, cache[0][:, : kv.sinks])
        values = cache[1] if kv.own_vdim else cache[0][..., : kv.vdim]
        return scores, keep, values, bias

    def chosen(self, where: Array, keys: Array, blocks: Array) -> Array:
        """Which keys are in the blocks of a query: bool ``[B, H, S, T]``; fails if a query's own is not among them."""
        there = np.zeros((*blocks.shape[:3], blocks.shape[3] - 1), bool)
        for place in np.ndindex(*blocks.shape[:3]):
            there[place][blocks[place][1 : 1 + blocks[place][0]]] = True
        by_query = there[:, :, np.arange(where.shape[1]) // self.queries]
        own = np.take_along_axis(by_query, (where // self.block)[:, None, :, None], -1)
        self.expect(bool(own.all()), "the block of a query's own key is not among those chosen for it")
        return by_query[..., keys // self.block]

    def flops(self) -> Dim:
        b, s, h, d = self.q.shape
        kv = self.cache.cache
        return as_dim(product((b, s, h)) * min(kv.length, kv.slots) * (d + kv.vdim))


def ring_positions(ring: Ring, where: Array) -> Array:
    """The position that each slot of a ring holds for queries at ``where [B, S]``: i64 ``[B, S, slots]``, below 0 for none.

    It is the last one up to the query's own: later ones of the same call are not the query's to see.
    """
    last = where[..., None]
    turning = last - (last - np.arange(ring.size)) % ring.size
    first = np.broadcast_to(np.arange(ring.sinks), (*where.shape, ring.sinks))
    return np.concatenate([first, turning], -1)


def gathered(op: Op, cache: Any, table: Any, where: Array) -> tuple[Array, Array]:
    """The pages of each sequence in order, those behind its last query as zeros; queries stand at ``where [B, S]``."""
    kv = op.cache.cache  # type: ignore[attr-defined]
    positions = np.arange(min(table.shape[1] * kv.page, kv.length))
    last = where[:, -1:]
    held = len(positions)
    op.expect(bool((last < held).all()), f"a query at {last.max()}, the tables hold {held} tokens")
    seen = positions <= last
    entries = np.where(seen, table[:, positions // kv.page], 0)
    pages = expect_pages(op, entries, cache[0])
    rows = (x[pages, positions % kv.page] for x in cache)
    return tuple(np.where(seen[..., None, None], x, np.zeros((), x.dtype)) for x in rows)  # type: ignore[return-value]


def expect_table(op: Op, table: Value | None, tokens: Value) -> None:
    """Fail unless there is a table of pages, i32 ``[B, T]``, exactly where the cache has pages."""
    kv = op.cache.cache  # type: ignore[attr-defined]
    op.expect((table is not None) == (kv.page > 0), f"a table of pages is for a cache with pages, and only that: {kv}")
    if table is None:
        return
    expect_rank(op, "table", table.shape, 2)
    op.expect(table.dtype is DType.i32, f"table is {table.dtype.value}, not i32")
    expect_dim(op, "table, sequences", table.shape[0], tokens.shape[0])


def expect_pages(op: Op, pages: Array, memory: Array) -> Array:
    """``pages`` if the pool has them all."""
    bad = pages[(pages < 0) | (pages >= len(memory))]
    op.expect(not bad.size, f"page {bad[:1].tolist()} in a table, the pool has {len(memory)}")
    return pages
