"""kv-layout's kinds and codes, in the interpreter: against the model with one piece of memory, or without any."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.models import tiny_decoder as tiny
from tests.models.tiny_decoder import Decoder
from tests.unit.test_kv_layout import LENGTH, MODELS, NEW, cached, forward, prompts
from tilewright.ir import Module, ParseError, PassError, Ring, UnsupportedError, empty_states, interpret, ops
from tilewright.passes import PassContext, Pipeline
from tilewright.passes.kv_layout import KvLayout
from tilewright.passes.kv_options import ENDLESS

Array = np.ndarray[Any, Any]


class Run:
    """A cached model with its state, and a table of pages in any order."""

    def __init__(self, module: Module, batch: int) -> None:
        self.module, self.states = module, empty_states(module, batch)
        pages = next(iter(module.states.values())).cache.pages
        table = np.random.default_rng(1).permutation(batch * pages).reshape(batch, pages)
        self.more = {"table": table.astype(np.int32)} if pages else {}

    def prefill(self, ids: Array, start: Any, last: Any) -> Array:
        inputs = {"ids": ids, "start": np.asarray(start, np.int64), "last": np.asarray(last, np.int64), **self.more}
        return interpret(self.module, "prefill", inputs, self.states)[0]

    def decode(self, ids: Array, start: Any) -> Array:
        inputs = {"ids": ids[:, None], "start": np.asarray(start, np.int64), **self.more}
        return interpret(self.module, "decode", inputs, self.states)[0]

    def feed(self, ids: Array, chunk: int = 7) -> Array:
        """Logits after the last of the tokens, which come chunk by chunk and at the end one by one."""
        count, at, logits = ids.shape[1], 0, np.zeros(0)
        while at < count:
            n = chunk if at + chunk <= count - 3 else 1
            piece = ids[:, at : at + n]
            same = np.full(len(ids), at)
            logits = self.prefill(piece, same, np.full(len(ids), n - 1)) if n > 1 else self.decode(piece[:, 0], same)
            at += n
        return logits


def last_logits(stateless: Module, ids: Array) -> Array:
    return forward(stateless, ids)[:, -1]


@pytest.mark.parametrize("name", ["rope", "grouped", "learned", "window", "softcap", "alibi-key", "relative", "sinks"])
def test_pages(name: str) -> None:
    stateless, module = Decoder(**MODELS[name]).build(), cached(Decoder(**MODELS[name]).build(), kind="paged", page=16)
    ids = prompts(2, NEW + 8)
    np.testing.assert_allclose(Run(module, 2).feed(ids), last_logits(stateless, ids), rtol=1e-4, atol=1e-4)


def test_pages_are_one_table_for_all_layers() -> None:
    module = cached(Decoder(rope=True).build(), kind="paged")
    shown = {f.name: [f"{a.name}: {a.type}" for a in f.args] for f in module.functions.values()}
    assert shown["decode"] == ["ids: tensor<Bx1xi64>", "start: tensor<Bxi64>", "table: tensor<BxTxi32>"]
    assert shown["prefill"] == [shown["prefill"][0], *shown["decode"][1:], "last: tensor<Bxi64>"]
    assert module.dims["T"] == (1, 1)
    assert {str(s.cache.layout) for s in module.states.values()} == {"paged<64>"}
    assert all(op.table is not None for op in module.ops(ops.Append, ops.Attend))  # type: ignore[attr-defined]


def test_another_dim_called_T() -> None:
    model = Decoder().build()
    model.dims["T"] = (1, 9)
    assert cached(model, kind="paged", page=32).dims["T_1"] == (1, 2)


@pytest.mark.parametrize("name", ["window", "chunk", "window-mask", "chunk-mask"])
def test_rings_of_windowed_models_are_exact(name: str) -> None:
    stateless, module = Decoder(**MODELS[name]).build(), cached(Decoder(**MODELS[name]).build(), kind="ring", chunk=8)
    assert [s.cache.layout for s in module.states.values()] == [Ring(4 if "chunk" in name else 5, 8)] * 2
    assert module.dims["S"] == (1, 8)
    ids = prompts(2, LENGTH)
    np.testing.assert_allclose(Run(module, 2).feed(ids), last_logits(stateless, ids), rtol=1e-4, atol=1e-4)


def test_a_bias_by_position_keeps_a_windowed_layer_contiguous() -> None:
    with pytest.raises(PassError, match="no attention of this one has a window of its own; give window=1024"):
        cached(Decoder(**MODELS["relative-window"]).build(), kind="ring")


@pytest.mark.parametrize("positions", [None, tiny.learned])
def test_a_window_is_as_if_the_model_had_it(positions: Any) -> None:
    shape: dict[str, Any] = {"positions": positions} if positions else {"rope": True}
    stateless = Decoder(**shape, attention={"causal": True, "window": 6}).build()
    module = cached(Decoder(**shape).build(), kind="ring", window=6, chunk=8)
    ids = prompts(2, LENGTH)
    np.testing.assert_allclose(Run(module, 2).feed(ids), last_logits(stateless, ids), rtol=1e-4, atol=1e-4)


def test_sinks_and_window_are_positions_inside_the_cache() -> None:
    """Of one layer keys and values depend on their own token alone: the model over what the cache holds says the same."""
    stateless, window, sinks = Decoder(layers=1, rope=True).build(), 20, 4
    module = cached(Decoder(layers=1, rope=True).build(), kind="ring", window=window, sinks=sinks, chunk=8, length=None)
    assert module.states["kv.0"].cache.length == ENDLESS
    assert not [n for n in module.weights if n.startswith("position_table")]
    for count in (3, 10, 24, 25, 60, 300):
        ids = prompts(2, count)
        seen = ids if count <= sinks + window else np.concatenate([ids[:, :sinks], ids[:, -window:]], 1)
        np.testing.assert_allclose(Run(module, 2).feed(ids), last_logits(stateless, seen), rtol=1e-3, atol=1e-3)


def test_the_last_of_many_tokens_is_seen_alike() -> None:
    """prefill, which repeats attention for the last row alone, against decode."""
    module = cached(Decoder(rope=True).build(), kind="ring", window=9, sinks=3, chunk=8)
    ids, last = prompts(3, 31), np.array([6, 3, 0])
    runs = [Run(module, 3), Run(module, 3)]
    for run in runs:
        run.feed(ids[:, :24], 8)
    got = runs[0].prefill(ids[:, 24:], [24] * 3, last)
    for step in range(7):
        logits = runs[1].decode(ids[:, 24 + step], [24 + step] * 3)
        for row in np.flatnonzero(last == step):
            np.testing.assert_allclose(got[row], logits[row], rtol=1e-4, atol=1e-4)


CODES: dict[str, tuple[dict[str, Any], float]] = {
    "i8": ({"dtype": "i8"}, 0.1),
    "i4": ({"dtype": "i4"}, 0.4),
    "i4 in pages": ({"dtype": "i4", "kind": "paged", "page": 16}, 0.4),
    "i8 in a ring": ({"dtype": "i8", "kind": "ring", "window": 48}, 0.1),
    "i4 by channel": ({"dtype": "i4", "keys": "channel", "group": 16, "recent": 8}, 0.4),
    "i2 by channel, factors": ({"dtype": "i2", "keys": "channel", "group": 16, "recent": 8, "rank": 4, "outliers": 1}, 0.7),
    "i2 by channel, recent": ({"dtype": "i2", "keys": "channel"}, 1e-4),  # all tokens are recent
}


@pytest.mark.parametrize("name", CODES)
def test_codes(name: str) -> None:
    options, limit = CODES[name]
    stateless, module = Decoder(rope=True).build(), cached(Decoder(rope=True).build(), **options)
    ids = prompts(2, 40)
    got, want = Run(module, 2).feed(ids), last_logits(stateless, ids)
    assert np.abs(got - want).max() <= limit * np.abs(want).max()


def test_the_report_says_what_caches_take() -> None:
    ctx = PassContext()
    KvLayout(kind="paged", page=16, length=40, dtype="i4").run(Decoder().build(), ctx)
    size = 2 * 2 * (2 * 8 // 2 + 8)  # layers, heads, codes, scales and zeros of f16
    pages = f"{16 * size} a page of 16 tokens, {48 * size} a sequence of 40 tokens"
    assert ctx.notes[-1][1] == f"all caches: {size} bytes a token, {pages}"


@pytest.mark.parametrize(("options", "error"), [
    ("page=16", "page: only of kind=paged and kind=ring, not of kind=contiguous"),
    ("kind=ring window=9 page=16", "with a window every cache is a ring, none has pages: leave out page or window"),
    ("kind=paged window=4", "window: only of kind=ring, not of kind=paged"),
    ("kind=ring sinks=4", "sinks stay where a window moves on: give window"),
    ("kind=paged page=8", "pages have 16, 32, 64 tokens, got 8"),
    ("recent=4", "recent: only of codes; give dtype=i8, i4 or i2"),
    ("dtype=i8 keys=channel", "i8 has a scale for each token"),
    ("dtype=i4 group=16", "group and full are for keys=channel, or for recent tokens: give recent"),
    ("dtype=i4 keys=channel group=24", "groups have 16, 32, 64, 128 tokens"),
    ("dtype=i4 keys=channel kind=paged page=32 group=64", "a group of 64 tokens lies in several pages of 32"),
    ("dtype=i2 keys=channel kind=ring window=64", "a ring overwrites tokens one by one"),
    ("dtype=bf16 rank=2", "rank: only of codes; give dtype=i8, i4 or i2"),
    ("dtype=i4 rank=2", "rank and outliers are of whole groups of tokens"),
    ("dtype=i8 recent=32 outliers=1", "rank and outliers make up for few bits"),
    ("kind=kept budget=9 rank=2", "rank: only of codes"),
    ("kind=ring window=0", "window must be positive, got 0"),
    ("kind=ring window=9 length=16777217", "more than the 16777216 positions that models tell apart"),
])  # fmt: skip
def test_options_that_do_not_fit_one_another(options: str, error: str) -> None:
    with pytest.raises(ParseError, match=error):
        Pipeline.parse(f"kv-layout{{{options}}}")


@pytest.mark.parametrize(("model", "options", "error"), [
    ("learned", {"sinks": 2}, "has queries that no nn.rope turns by their position"),
    ("alibi-key", {}, "adds a bias by position, which a ring does not keep apart"),
    ("relative", {"sinks": 2}, "adds a bias by position, which a ring does not keep apart"),
    ("learned", {"length": None}, "knows 64 positions of 16777216; give kv-layout a smaller length"),
])  # fmt: skip
def test_models_that_have_no_place_for_sinks_or_a_window(model: str, options: dict[str, Any], error: str) -> None:
    with pytest.raises(UnsupportedError, match=error):
        cached(Decoder(**MODELS[model]).build(), kind="ring", window=8, **options)
