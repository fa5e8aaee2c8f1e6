"""Kept tokens in the interpreter, against plain loops, and in models that are fed chunk by chunk."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.models.tiny_decoder import Decoder
from tests.unit.test_kv_layout import MODELS, cached, prompts
from tests.unit.test_kv_layout_kinds import Run, last_logits
from tilewright.ir import (
    DType,
    Function,
    Kept,
    KVType,
    Module,
    ParseError,
    PassError,
    Return,
    Ring,
    TensorType,
    UnsupportedError,
    VerifyError,
    empty_states,
    interpret,
    ops,
)
from tilewright.passes import Pipeline
from tilewright.passes.kv_options import ENDLESS

Array = np.ndarray[Any, Any]
BUDGET, CHUNK = 9, 6
RULES: dict[str, dict[str, Any]] = {
    "h2o": {"recent": 3, "first": 1},
    "snapkv": {"recent": 4, "observe": 4, "pool": 3},
    "scissorhands": {"recent": 2, "observe": 12},
    "keyformer": {"recent": 4, "temperature": 2.0},
    "h2o merged": {"recent": 3, "merge": True},
    "snapkv merged": {"recent": 4, "observe": 4, "pool": 3, "merge": True},
}


class Text:
    """One head of keys, two of queries: the tokens that stay, by loops over lists."""

    def __init__(self, policy: str, recent: int, first: int = 0, observe: int = 0, pool: int = 1,
                 temperature: float = 1.0, merge: bool = False) -> None:  # fmt: skip
        self.policy, self.recent, self.first, self.observe = policy, recent, first, observe
        self.pool, self.temperature = pool, temperature
        self.merge, self.level = merge, None
        self.tokens: list[dict[str, Any]] = []
        self.length = 0

    def feed(self, queries: Array, keys: Array, values: Array) -> list[list[Array]]:
        """What each query ``[2, D]`` of a call finds."""
        count, out = len(keys), []
        gains: list[list[float]] = []
        for i, (key, value) in enumerate(zip(keys, values)):
            self.tokens.append({"key": key, "value": value, "position": self.length + i, "worth": 0.0})
            shares = [self.shares(q, self.temperature) for q in queries[i]]
            out.append([sum(w * t["value"] for w, t in zip(self.shares(q, 1.0), self.tokens)) for q in queries[i]])
            mass = [sum(w) for w in zip(*shares)]
            mean = 2 / len(self.tokens)
            gains.append([float(m > mean) for m in mass] if self.policy == "scissorhands" else mass)
        self.length += count
        for at, token in enumerate(self.tokens):
            token["worth"] *= max(0.0, 1 - count / self.observe) if self.observe else 1.0
            heard = gains[-self.observe :] if self.observe else gains
            token["worth"] += sum(g[at] for g in heard if at < len(g))
        self.leave(len(self.tokens) - BUDGET)
        return out

    def shares(self, query: Array, temperature: float) -> list[float]:
        scores = [float(query @ t["key"]) / 2 / temperature for t in self.tokens]
        total = sum(math.exp(s - max(scores)) for s in scores)
        return [math.exp(s - max(scores)) / total for s in scores]

    def leave(self, count: int) -> None:
        reach = self.pool // 2 if count > 1 else 0
        plain = [t["worth"] for t in self.tokens]
        worths = [max(plain[max(at - reach, 0) : at + reach + 1]) for at in range(len(plain))]
        before, gone = list(self.tokens), []
        for _ in range(count):
            may = [at for at, t in enumerate(self.tokens) if self.first <= t["position"] < self.length - self.recent]
            worst = min(may, key=lambda at: (worths[at], self.tokens[at]["position"]))
            gone.append(self.tokens[worst])
            if count == 1:  # the newest takes its place
                self.tokens[worst] = self.tokens[-1]
                worst = len(self.tokens) - 1
            del self.tokens[worst], worths[worst]
        if self.merge and gone:
            kept = [t for t in before if all(t is not g for g in gone)]
            self.go_on([t for t in before if any(t is g for g in gone)], kept)

    def go_on(self, gone: list[dict[str, Any]], kept: list[dict[str, Any]]) -> None:
        """Sums over all that meet in a token, where the operation goes from one to the next."""
        likes = [[float(a["key"] @ b["key"]) / math.hypot(*a["key"]) / math.hypot(*b["key"]) for b in kept] for a in gone]
        mean = sum(map(max, likes)) / len(gone)
        self.level = mean if self.level is None else 0.3 * self.level + 0.7 * mean
        parts = {id(b): [(math.e, b["key"], b["value"])] for b in kept}
        for token, row in zip(gone, likes):
            if max(row) >= self.level - 1e-6:
                parts[id(kept[row.index(max(row))])].append((math.exp(max(row)), token["key"], token["value"]))
        for token in kept:
            every = parts[id(token)]
            total = sum(w for w, _, _ in every)
            token["key"], token["value"] = (sum(part[0] * part[at] for part in every) / total for at in (1, 2))


def retaining(**rule: Any) -> Module:
    """Append and retain, as a layer of two query heads and one key head of four numbers."""
    module = Module("m", dims={"B": (1, 8), "S": (1, CHUNK)})
    function, f32, i64 = Function("step"), DType.f32, DType.i64
    q, k, v = (function.arg(n, TensorType(("B", "S", h, 4), f32)) for n, h in (("q", 2), ("k", 1), ("v", 1)))
    start, count = (function.arg(n, TensorType(("B",), i64)) for n in ("start", "count"))
    state = module.state("kv.0", KVType(1, 4, 4, ENDLESS, f32, Kept(BUDGET, CHUNK)))
    cache = function.append(ops.Append(state, k, v, start)).results[0]
    op = function.append(ops.Retain(q, cache, start, count=count, scale=0.5, **rule))
    function.append(Return(op.results[:1]))
    module.add(function)
    return module


@pytest.mark.parametrize("policy", RULES)
def test_what_stays_is_what_plain_loops_keep(policy: str) -> None:
    """Calls of any sizes, with padding; a second sequence goes along and is left alone."""
    rule = {"policy": policy.split()[0], **RULES[policy]}
    module, text, rng = retaining(**rule), Text(**rule), np.random.default_rng(1)
    states = empty_states(module, 2)
    for count in (6, 2, 1, 1, 4, 6, 1, 1, 1, 5, 3, 1, 1, 2):
        q, k, v = (rng.standard_normal((2, CHUNK, heads, 4)).astype(np.float32) * 1.5 for heads in (2, 1, 1))
        start = np.array([text.length, 4])
        inputs = {"q": q, "k": k, "v": v, "start": start, "count": np.array([count, 0])}
        (got,) = interpret(module, "step", inputs, states)
        want = text.feed(q[0, :count], k[0, :count, 0], v[0, :count, 0])
        np.testing.assert_allclose(got[0, :count], want, rtol=1e-4, atol=1e-5)
        keys, _, notes = states["kv.0"]
        live = len(text.tokens)
        assert notes[0, 0, 1, :live].tolist() == [t["position"] for t in text.tokens]
        np.testing.assert_allclose(notes[0, 0, 0, :live], [t["worth"] for t in text.tokens], rtol=1e-4, atol=1e-5)
        near = 1e-5 * text.merge
        np.testing.assert_allclose(keys[0, :live, 0], [t["key"] for t in text.tokens], near, near)
        assert text.level is None or abs(notes[0, 0, 0, BUDGET] - text.level) < 1e-5
        assert not notes[1].any()
    assert live == BUDGET


class KeptRun(Run):
    """A cached model all of whose tokens are of the text."""

    def prefill(self, ids: Array, start: Any, last: Any) -> Array:
        self.more["count"] = np.asarray(last, np.int64) + 1
        return super().prefill(ids, start, last)

    def decode(self, ids: Array, start: Any) -> Array:
        self.more["count"] = np.ones(len(ids), np.int64)
        return super().decode(ids, start)


@pytest.mark.parametrize("policy", RULES)
def test_a_budget_of_the_whole_text_changes_nothing(policy: str) -> None:
    given = {"policy": policy.split()[0], "merge": "merge" in policy}
    module = cached(Decoder(rope=True).build(), kind="kept", budget=40, chunk=8, length=None, **given)
    assert [s.cache.layout for s in module.states.values()] == [Kept(40, 8)] * 2
    assert module.dims["S"] == (1, 8)
    ids = prompts(2, 40)
    np.testing.assert_allclose(KeptRun(module, 2).feed(ids), last_logits(Decoder(rope=True).build(), ids), 1e-4, 1e-4)


def test_layers_with_a_window_get_a_ring() -> None:
    with pytest.raises(PassError, match="every one of this model has a window of its own; give kind=ring"):
        cached(Decoder(**MODELS["window"]).build(), kind="kept", budget=8, chunk=8, length=None)


def test_kept_types() -> None:
    kind = KVType(2, 8, 8, ENDLESS, DType.bf16, Kept(100, 20))
    assert (kind.slots, kind.budget) == (128, 100)
    assert kind.sequence_bytes == 128 * 2 * (16 * 2 + 2 * 4)
    for given, error in (({"dtype": DType.i8}, "kept tokens are floats, not i8"), ({"length": 64}, "120 slots for 64 pos")):
        sizes = {"heads": 2, "dim": 8, "vdim": 8, "length": ENDLESS, "dtype": DType.f32} | given
        with pytest.raises(ValueError, match=error):
            KVType(**sizes, layout=Kept(100, 20))
    assert Ring(8, 8) != Kept(8, 8)


@pytest.mark.parametrize(("options", "error"), [
    ("kind=kept", "give budget, how many of a sequence stay"),
    ("kind=kept budget=0", "budget must be positive, got 0"),
    ("budget=9", "budget: only of kind=kept, not of kind=contiguous"),
    ("kind=paged merge=true", "merge: only of kind=kept, not of kind=paged"),
    ("kind=paged policy=h2o", "policy: only of kind=kept, not of kind=paged"),
    ("kind=kept budget=9 page=16", "page: only of kind=paged and kind=ring, not of kind=kept"),
    ("kind=kept budget=9 window=16", "window: only of kind=ring, not of kind=kept"),
    ("kind=kept budget=9 dtype=i8", "kept tokens are floats, not i8"),
    ("kind=kept budget=9 keys=channel", "keys: only of codes"),
    ("kind=kept budget=9 recent=8 sinks=2", "10 tokens always stay"),
    ("kind=kept budget=9 length=64", "521 slots for 64 positions leave no choice: give contiguous"),
])  # fmt: skip
def test_options_that_do_not_fit_one_another(options: str, error: str) -> None:
    with pytest.raises(ParseError, match=error):
        Pipeline.parse(f"kv-layout{{{options}}}")


def test_a_bias_by_position_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="a cache of kept tokens does not keep apart; give another kind"):
        cached(Decoder(**MODELS["alibi-key"]).build(), kind="kept", budget=8, chunk=8, length=None)


@pytest.mark.parametrize(("rule", "error"), [
    ({"policy": "lru"}, "no policy 'lru'; there are h2o, snapkv, scissorhands, keyformer"),
    ({"recent": 9, "first": 1}, "10 tokens always stay, the budget is 9"),
    ({"observe": -1}, "are not negative"),
    ({"pool": 2}, "pool is odd and positive, got 2"),
    ({"temperature": 0.0}, "a temperature is positive"),
    ({"window": 4}, "a window or chunk of positions, which kept tokens have in no order"),
])  # fmt: skip
def test_rules_that_cannot_be(rule: dict[str, Any], error: str) -> None:
    with pytest.raises(VerifyError, match=error):
        retaining(**rule)
