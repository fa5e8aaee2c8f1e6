"""kv-layout against the stateless model that it starts from, both in the interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.models import tiny_decoder as tiny
from tests.models.tiny_decoder import Decoder
from tilewright.ir import Module, empty_states, interpret, ops, parse_module, print_module, verify
from tilewright.passes import PassContext, Pipeline
from tilewright.passes.kv_layout import KvLayout

Array = np.ndarray[Any, Any]
NEW = 32
LENGTH = 48
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rope": {"rope": True},
    "grouped": {"rope": True, "kv_heads": 1},
    "learned": {"positions": tiny.learned},
    "learned-slice": {"positions": tiny.learned_slice},
    "learned-from-two": {"positions": tiny.learned_from_two},
    "window": {"rope": True, "attention": {"causal": True, "window": 5}},
    "chunk": {"rope": True, "attention": {"causal": True, "chunk": 4}},
    "softcap": {"rope": True, "attention": {"causal": True, "softcap": 3.0}},
    "sinks": {"rope": True, "sinks": True},
    "tril": {"rope": True, "mask": tiny.tril, "attention": {}},
    "window-mask": {"rope": True, "mask": tiny.window_mask, "attention": {}},
    "chunk-mask": {"rope": True, "mask": tiny.chunk_mask, "attention": {}},
    "float-mask": {"rope": True, "bias": tiny.float_mask, "attention": {}},
    "float-mask-sinks": {"rope": True, "bias": tiny.float_mask, "attention": {}, "sinks": True},
    "alibi-key": {"bias": tiny.alibi_key},
    "alibi-distance": {"bias": tiny.alibi_distance},
    "alibi-distance-sinks": {"bias": tiny.alibi_distance, "sinks": True},
    "relative": {"bias": tiny.relative},
    "relative-window": {"bias": tiny.relative, "attention": {"causal": True, "window": 5}},
    "uneven": {"bias": tiny.uneven},
    "merged": {"rope": True, "merged": True},
    "no attention": {"layers": 0},
}


def cached(module: Module, **options: Any) -> Module:
    KvLayout(**({"length": LENGTH} | options)).run(module, PassContext())
    verify(module)
    assert parse_module(print_module(module)) == module
    return module


def prompts(batch: int = 2, length: int = 11) -> Array:
    return np.random.default_rng(3).integers(0, tiny.V, (batch, length))


def forward(module: Module, ids: Array) -> Array:
    return interpret(module, "forward", [ids])[0]


class Run:
    """The cached model with its state."""

    def __init__(self, module: Module, batch: int) -> None:
        self.module, self.states = module, empty_states(module, batch)

    def prefill(self, ids: Array, start: Any, last: Any) -> Array:
        args = [ids, np.asarray(start, np.int64), np.asarray(last, np.int64)]
        return interpret(self.module, "prefill", args, self.states)[0]

    def decode(self, ids: Array, start: Any) -> Array:
        return interpret(self.module, "decode", [ids[:, None], np.asarray(start, np.int64)], self.states)[0]


def check_greedy(stateless: Module, module: Module, cuts: tuple[int, ...] = (7, 4)) -> None:
    """Prefill in chunks, decode greedily; each row of logits equals that of the growing prompt."""
    ids, at = prompts(length=sum(cuts)), 0
    run = Run(module, len(ids))
    for n in cuts:
        logits = run.prefill(ids[:, at : at + n], [at] * 2, [n - 1] * 2)
        at += n
        np.testing.assert_allclose(logits, forward(stateless, ids[:, :at])[:, -1], rtol=1e-4, atol=1e-4)
    for _ in range(NEW - 1):
        token = logits.argmax(-1)
        ids = np.concatenate([ids, token[:, None]], 1)
        logits = run.decode(token, [at] * 2)
        at += 1
        np.testing.assert_allclose(logits, forward(stateless, ids)[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_greedy(name: str) -> None:
    check_greedy(Decoder(**MODELS[name]).build(), cached(Decoder(**MODELS[name]).build()))


@pytest.mark.parametrize("name", ["rope", "learned", "alibi-key", "relative", "window", "uneven", "merged"])
def test_ragged_batch_equals_one_by_one(name: str) -> None:
    stateless, module = Decoder(**MODELS[name]).build(), cached(Decoder(**MODELS[name]).build())
    ids, lengths = prompts(3, 9), np.array([9, 4, 6])
    run = Run(module, 3)
    logits = run.prefill(ids, [0, 0, 0], lengths - 1)
    rows = [list(row[:n]) for row, n in zip(ids, lengths)]
    for step in range(6):
        for i, row in enumerate(rows):
            np.testing.assert_allclose(logits[i], forward(stateless, np.array([row]))[0, -1], rtol=1e-4, atol=1e-4)
        for row, token in zip(rows, logits.argmax(-1)):
            row.append(int(token))
        logits = run.decode(logits.argmax(-1), lengths + step)


def test_dropping_the_window_is_seen() -> None:
    """The comparison can fail: without its window the model gives other logits."""
    stateless, module = Decoder(**MODELS["window"]).build(), cached(Decoder(**MODELS["window"]).build())
    for op in module.ops(ops.Attend):
        op.window = -1  # type: ignore[attr-defined]
    with pytest.raises(AssertionError):
        check_greedy(stateless, module)


def test_prefill_computes_one_row_after_the_last_cache() -> None:
    module = cached(Decoder(rope=True, merged=True).build())
    prefill = module.functions["prefill"]
    append = [i for i, op in enumerate(prefill.body) if isinstance(op, ops.Append)][-1]
    later = [op for op in prefill.body[append + 1 :] if isinstance(op, (ops.Linear, ops.Attend))]
    assert len(later) == 6  # q, attend, o, up, down, head
    assert not any("S" in str(op.result.type) for op in later)


def test_tables_and_gathers_are_shared() -> None:
    module = cached(Decoder(rope=True, layers=4).build())
    assert [n for n in module.weights if n.startswith("position_table")] == ["position_table", "position_table.1"]
    assert len(list(module.functions["decode"].walk(ops.Gather))) == 2


def test_learned_positions_are_gathered_from_their_weight() -> None:
    for name in ("learned", "learned-slice", "learned-from-two"):
        module = cached(Decoder(**MODELS[name]).build())
        assert not [n for n in module.weights if n.startswith("position_table")]


@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 1e-5), ("bf16", 5e-2)])
def test_element_type_of_the_cache(dtype: str, tolerance: float) -> None:
    stateless, module = Decoder(rope=True).build(), cached(Decoder(rope=True).build(), dtype=dtype)
    assert {s.cache.dtype.value for s in module.states.values()} == {dtype}
    ids = prompts()
    got = Run(module, 2).prefill(ids, [0, 0], [10, 10])
    want = forward(stateless, ids)[:, -1]
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def test_signature_and_states() -> None:
    module = cached(Decoder(kv_heads=1).build(), keep_forward=True)
    shown = {f.name: [f"{a.name}: {a.type}" for a in f.args] for f in module.functions.values()}
    assert shown["prefill"] == ["ids: tensor<BxSxi64>", "start: tensor<Bxi64>", "last: tensor<Bxi64>"]
    assert shown["decode"] == ["ids: tensor<Bx1xi64>", "start: tensor<Bxi64>"]
    assert [str(f.returns[0].type) for f in module.functions.values()][1:] == ["tensor<Bx40xf32>"] * 2
    assert list(module.states) == ["kv.0", "kv.1"]
    assert str(module.states["kv.0"].type).startswith("kv<heads=1, dim=8, vdim=8, length=48, dtype=f32")


def test_other_tasks_are_left_alone() -> None:
    module = Decoder().build()
    module.meta["task"] = "feature-extraction"
    report = Pipeline.parse("kv-layout{length=16}").run(module)
    assert list(module.functions) == ["forward"]
    assert "feature-extraction" in (report.rows[0].skipped or "")


def test_length_follows_the_traced_range() -> None:
    assert cached(Decoder().build(), length=None).states["kv.0"].cache.length == tiny.LONGEST
