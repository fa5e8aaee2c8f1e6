"""split-heads against masks that are spelled out, and its profile against plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.models.tiny_decoder import LONGEST, Decoder, S
from tests.unit.test_kv_layout import LENGTH, forward, prompts
from tests.unit.test_kv_layout_kinds import Run, last_logits
from tilewright.ir import DType, Function, Module, PassError, Return, Ring, TensorType, UnsupportedError, Value, ops
from tilewright.passes import PassContext, Pipeline
from tilewright.passes.calibration.stream import Stream
from tilewright.passes.head_profile import errors
from tilewright.passes.split_heads import SplitHeads

Array = np.ndarray[Any, Any]
WINDOW, SINKS = 5, 2
PLAIN: dict[str, Any] = {"rope": True, "heads": 4, "kv_heads": 2}
OPTIONS = {"window": WINDOW, "sinks": SINKS}


def seen(n: int, streams: bool) -> Array:
    """Query i sees key j, in plain loops."""
    out = np.zeros((n, n), np.bool_)
    for i in range(n):
        for j in range(i + 1):
            out[i, j] = not streams or i - j < WINDOW or j < SINKS
    return out


def masked(streams: tuple[bool, ...], sinks: bool = False) -> Module:
    """The model with a mask for each of its query heads."""

    def mask(m: Decoder) -> Value:
        rows = np.stack([seen(LONGEST, s) for s in streams])[None]
        table = m.module.constant(rows, m.module.name + f".mask.{len(m.module.weights)}")
        return m.b(ops.Slice, table, (0, 0, 0, 0), (1, len(streams), S, S), (1, 1, 1, 1))

    return Decoder(**PLAIN, mask=mask, attention={}, sinks=sinks).build()


def split(full: tuple[str, ...], sinks: bool = False, **options: Any) -> Module:
    module = Decoder(**PLAIN, sinks=sinks).build()
    Pipeline((SplitHeads(**OPTIONS, full=full, **options),)).run(module)
    return module


@pytest.mark.parametrize(("full", "streams"), [
    (("0.1", "1.1"), (True, True, False, False)), (("0.0", "1.0"), (False, False, True, True)),
    (("0.0", "0.1", "1.0", "1.1"), (False,) * 4),
])  # fmt: skip
@pytest.mark.parametrize("sinks", [False, True])
def test_heads_see_what_they_should(full: tuple[str, ...], streams: tuple[bool, ...], sinks: bool) -> None:
    ids = prompts(2, 40)
    want = forward(masked(streams, sinks), ids)
    np.testing.assert_allclose(forward(split(full, sinks), ids), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("options", "kinds"), [
    ("kind=ring chunk=8", ["contiguous", "ring<5, 8, 2>"]),
    ("kind=ring chunk=8 page=16", ["paged<16>", "ring<5, 8, 2>"]),
])  # fmt: skip
def test_each_part_has_its_cache(options: str, kinds: list[str]) -> None:
    """Chunks, then token by token, past several rounds of the ring; not a head more is stored than sees all."""
    module, ids = split(("0.1", "1.1")), prompts(2, LENGTH - 2)
    want = last_logits(masked((True, True, False, False)), ids)
    Pipeline.parse(f"canonicalize,cse,dce,kv-layout{{{options} length={LENGTH}}},canonicalize,cse,dce").run(module)
    caches = [s.cache for s in module.states.values()]
    assert [str(c.layout) for c in caches] == kinds * 2
    assert {c.heads for c in caches} == {1}
    np.testing.assert_allclose(Run(module, 2).feed(ids), want, rtol=1e-4, atol=1e-4)


def test_all_heads_stream() -> None:
    module = Decoder(**PLAIN).build()
    ctx = PassContext(options={"calibration": [{"input_ids": prompts(4, 40)}]})
    Pipeline.parse("split-heads{window=5 sinks=2 share=0},kv-layout{kind=ring chunk=8}").run(module, ctx=ctx)
    assert [s.cache.layout for s in module.states.values()] == [Ring(5, 8, 2)] * 2
    ids = prompts(2, 40)
    np.testing.assert_allclose(Run(module, 2).feed(ids), last_logits(masked((True,) * 4), ids), rtol=1e-4, atol=1e-4)


def test_no_gather_and_no_slice_of_rows() -> None:
    """Each part reads columns that the projection left side by side."""
    module = split(("0.1", "1.1"))
    Pipeline.parse("canonicalize,fuse-qkv,canonicalize,cse,dce").run(module)
    assert not list(module.ops(ops.Gather, ops.TakeAlong))
    slices = [op for op in module.ops(ops.Slice) if op.x.tensor.rank == 3]  # type: ignore[attr-defined]
    assert all(isinstance(op.x.owner, ops.Linear) for op in slices)  # type: ignore[attr-defined]


def test_errors_against_plain_loops() -> None:
    function, kind = Function("f"), DType.f32
    shapes = {"q": (2, 12, 4, 3), "k": (2, 12, 2, 3), "v": (2, 12, 2, 5)}
    args = [function.arg(n, TensorType(s, kind)) for n, s in shapes.items()]
    op = ops.Attention(*args, scale=0.5, causal=True)
    function.append(op)
    module, rng = Module("m"), np.random.default_rng(0)
    matrix = rng.standard_normal((7, 20)).astype(np.float32)
    flat = function.append(ops.Reshape(op.result, (2, 12, 20))).results[0]
    function.append(Return(function.append(ops.Linear(flat, module.constant(matrix, "o"))).results))
    batches = [{n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()} for _ in range(2)]
    found = errors(Stream(function, batches, [op]), [op], SplitHeads(**OPTIONS)._streamed)

    def head(batch: dict[str, Array], b: int, h: int, streams: bool) -> Array:
        scores = 0.5 * batch["q"][b, :, h] @ batch["k"][b, :, h // 2].T
        weights = np.exp(np.where(seen(12, streams), scores, -np.inf))
        return weights / weights.sum(1, keepdims=True) @ batch["v"][b, :, h // 2]

    lost, whole = np.zeros(2), 0.0
    for batch in batches:
        for b in range(2):
            full = [head(batch, b, h, False) for h in range(4)]
            whole += np.square(np.concatenate(full, 1) @ matrix.T).sum()
            for g in range(2):
                part = [full[h] - head(batch, b, h, True) if h // 2 == g else 0 * full[h] for h in range(4)]
                lost[g] += np.square(np.concatenate(part, 1) @ matrix.T).sum()
    np.testing.assert_allclose(found[op], [lost / whole], rtol=1e-4)


@pytest.mark.parametrize("text", ["calibration", "repeated"])
def test_the_profile_says_what_it_chose(text: str) -> None:
    """The heads it names, given back as ``full``, make the same model."""
    module = Decoder(**PLAIN).build()
    ctx = PassContext(options={"calibration": [{"input_ids": prompts(4, 40)}]})
    Pipeline.parse(f"split-heads{{window=5 sinks=2 text={text}}}").run(module, ctx=ctx)
    [line] = [line for _, line in ctx.notes if line.startswith("full=")]
    again = Decoder(**PLAIN).build()
    Pipeline.parse(f"split-heads{{window=5 sinks=2 {line}}}").run(again)
    assert len(line.split(",")) == 2
    np.testing.assert_array_equal(forward(module, prompts(2, 30)), forward(again, prompts(2, 30)))


@pytest.mark.parametrize(("options", "message"), [
    ("sinks=4", "needs to know what streaming heads see: window=1024"),
    ("window=0", "a window of 1 token or more, got 0"),
    ("window=4 share=1.5", "a share from 0 to 1"),
    ("window=4 full=[0]", "full names heads as attention.head, such as 0.1, got 0"),
    ("window=4 full=[0.1,2.0,0.5]", r"no head 0.5, 2.0 that can stream or stay; attentions that can: \[0, 1\]"),
    ("window=4", "split-heads with text=calibration needs calibration data"),
    ("window=40 text=repeated", "a window of 40 tokens leaves nothing out of the 64 that the model was traced for"),
])  # fmt: skip
def test_refusals(options: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        Pipeline.parse(f"split-heads{{{options}}}").run(Decoder(**PLAIN).build())


def test_texts_that_are_too_short() -> None:
    ctx = PassContext(options={"calibration": [{"input_ids": prompts(8, 16)}]})
    with pytest.raises(PassError, match="no text is longer than sinks and window, 24 tokens"):
        Pipeline.parse("split-heads{window=20}").run(Decoder(**PLAIN).build(), ctx=ctx)


@pytest.mark.parametrize(("given", "reason"), [
    ({"attention": {"causal": True, "window": 9}}, "it has a window of its own"),
    ({"attention": {"causal": True, "chunk": 8}}, "it has a window of its own"),
    ({"mask": lambda m: m.b(ops.Ge, m.distance(), m.scalar(0)), "attention": {}}, "not plainly causal"),
])  # fmt: skip
def test_what_stays(given: dict[str, Any], reason: str) -> None:
    module, ctx = Decoder(**PLAIN, **given).build(), PassContext()
    before = forward(module, prompts(1, 20))
    Pipeline.parse("split-heads{window=4 text=repeated}").run(module, ctx=ctx)
    assert all(reason in skip.reason for skip in ctx.skips)
    assert len(ctx.skips) == 2
    np.testing.assert_array_equal(forward(module, prompts(1, 20)), before)


@pytest.mark.parametrize("kind", ["", "kind=paged"])
def test_streaming_heads_need_a_ring(kind: str) -> None:
    with pytest.raises(UnsupportedError, match="sees the first 2 tokens beside a window, as a ring does: give kind=ring"):
        Pipeline.parse(f"kv-layout{{{kind}}}").run(split(("0.0",)))


def test_pages_that_nothing_would_use() -> None:
    module = Decoder(**PLAIN).build()
    ctx = PassContext(options={"calibration": [{"input_ids": prompts(4, 40)}]})
    with pytest.raises(PassError, match="page is for attention without a window, and all of this model's have one"):
        Pipeline.parse("split-heads{window=5 share=0},kv-layout{kind=ring page=16}").run(module, ctx=ctx)
