"""sparse-prefill{pattern=auto}: heads of known habits get the pattern that suits them, as trying each by itself says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tilewright.ir import (
    CONTIGUOUS,
    DType,
    Function,
    KVType,
    Layout,
    Module,
    Paged,
    ParseError,
    PassError,
    Return,
    TensorType,
    Value,
    empty_states,
    interpret,
    ops,
)
from tilewright.passes import PassContext, Pipeline, head_patterns

Array = np.ndarray[Any, Any]
LENGTH, BLOCK, GROUP, DIM = 256, 32, 2, 8
HABITS = ("a-shape", "vertical-slash", "block-sparse")
HEADS = len(HABITS)
TOPICS = (0, 1, 2, 3, 1, 0, 2, 3)
OPTIONS = f"block={BLOCK} queries={BLOCK} tokens={4 * BLOCK}"


def habits(kinds: Sequence[str]) -> tuple[Array, Array]:
    """Queries and keys [position, head, DIM] that look at what is near, at token 40, or at blocks of their topic."""
    rng, turn = np.random.default_rng(0), np.arange(LENGTH) * np.pi / LENGTH
    q, k = rng.standard_normal((2, LENGTH, len(kinds), DIM)).astype(np.float32) * 0.1
    for head, kind in enumerate(kinds):
        for x in (q, k):
            if kind == "a-shape":
                x[:, head, :2] = np.stack([np.cos(turn), np.sin(turn)], 1) * 20
            if kind == "block-sparse":
                x[np.arange(LENGTH), head, 1 + np.repeat(TOPICS, BLOCK)] = 4
        if kind == "vertical-slash":
            q[:, head, 0], k[40, head, 0], k[41, head, 0] = 4, 4, -8  # which the block's mean does not show
    return q, k


def module(layout: Layout = CONTIGUOUS, kinds: Sequence[str] = HABITS) -> Module:
    """The tokens are positions: what each is asked and answers stands in tables."""
    made, f = Module("m", dims={"B": (1, 2), "S": (1, LENGTH), "T": (1, 99)}), Function("prefill")
    ids = f.arg("ids", TensorType(("B", "S"), DType.i64))
    start, _ = (f.arg(name, TensorType(("B",), DType.i64)) for name in ("start", "last"))
    table = f.arg("table", TensorType(("B", "T"), DType.i32)) if layout != CONTIGUOUS else None
    q, k = habits(kinds)
    v = np.random.default_rng(1).standard_normal(k.shape).astype(np.float32)

    def heads(numbers: Array, name: str) -> Value:
        weight = made.constant(numbers.reshape(LENGTH, -1), name)
        flat = f.append(ops.Embedding(ids, weight)).result
        return f.append(ops.Reshape(flat, ("B", "S", *numbers.shape[1:]))).result

    query, key, value = heads(np.repeat(q, GROUP, 1), "q"), heads(k, "k"), heads(v, "v")
    state = made.state("kv", KVType(HEADS, DIM, DIM, LENGTH, DType.f32, layout))
    cache = f.append(ops.Append(state, key, value, start, table)).result
    f.append(Return(f.append(ops.Attend(query, cache, start, table=table)).results))
    made.add(f)
    return made


def run(made: Module, chunk: int) -> Array:
    """What all positions get, fed in chunks."""
    states, parts = empty_states(made, 1), []
    for at in range(0, LENGTH, chunk):
        given = [np.arange(at, at + chunk)[None], np.array([at]), np.array([chunk - 1])]
        parts += interpret(made, "prefill", given, states)
    return np.concatenate(parts, 1)


def chosen(made: Module, options: str = OPTIONS, **given: Any) -> tuple[tuple[str, ...], PassContext]:
    ctx = PassContext({"calibration": [{"input_ids": np.arange(LENGTH)[None]}]} | given)
    Pipeline.parse(f"sparse-prefill{{pattern=auto {options}}}").run(made, ctx=ctx)
    return next(made.ops(ops.Choose)).patterns, ctx  # type: ignore[attr-defined]


@pytest.mark.parametrize("chunk", [LENGTH, 64])
def test_each_head_gets_what_changes_it_least(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_patterns, "CHUNK", chunk)
    full, lost = run(module(), chunk), []
    for kind in HABITS:
        made = module()
        Pipeline.parse(f"sparse-prefill{{pattern={kind} {OPTIONS} dense=0}}").run(made)
        change = (run(made, chunk) - full).reshape(LENGTH, HEADS, -1)
        lost.append([np.square(change[:, head]).sum() for head in range(HEADS)])
    best = tuple(HABITS[i] for i in np.argmin(lost, 0))
    patterns, ctx = chosen(module())
    assert patterns == best
    if chunk == LENGTH:
        assert patterns == HABITS
        assert ctx.notes[-1][1] == "all heads of keys: 1 a-shape, 1 vertical-slash, 1 block-sparse"


def test_pages_change_nothing() -> None:
    found = [chosen(module(layout)) for layout in (CONTIGUOUS, Paged(16))]
    assert found[0][0] == found[1][0] == HABITS
    assert found[0][1].notes == found[1][1].notes


@pytest.mark.parametrize("kind", HABITS)
def test_one_pattern_for_all_is_said_once(kind: str) -> None:
    assert chosen(module(kinds=(kind,) * HEADS))[0] == (kind,)


def test_tokens_that_come_twice() -> None:
    assert chosen(module(), f"block={BLOCK} queries={BLOCK} tokens=64 text=repeated", calibration=None)[0]


@pytest.mark.parametrize(("options", "given", "message"), [
    (OPTIONS, {"calibration": None}, "with pattern=auto and text=calibration needs calibration data"),
    ("tokens=256", {}, "no text is longer than what lists hold, 256 tokens"),
    ("text=repeated", {}, "a window of 2048 tokens leaves nothing out of the 256"),
])  # fmt: skip
def test_nothing_to_measure_on(options: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        chosen(module(), options, **given)


def test_options_that_do_not_go_together() -> None:
    for options in ("pattern=flex tokens=64", "pattern=auto tokens=0"):
        with pytest.raises(ParseError, match="tokens"):
            Pipeline.parse(f"sparse-prefill{{{options}}}")
