"""``kv.select`` and ``kv.attend`` over what it chose, in the interpreter: against loops over all tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ir_cases.attention import loops
from tests.unit.test_ir_kv_layouts import tables, tokens
from tilewright.ir import DType, InterpreterError, KVType, Paged, ParseError, empty_states, interpret, parse_module, verify
from tilewright.ir.kv_type import parse_kv_type

KV = "kv<heads=2, dim=8, vdim=6, length=96, dtype=f32, layout=paged<16>, summary=minmax>"


def step_module(most: int, select: str, kv: str = KV):
    """One entry that appends a token and attends to some pages."""
    module = parse_module(f"""module @m {{
      dim B : 1..4
      dim T : 1..9
      state @kv.0 : {kv}
      func @step(%q: tensor<Bx1x4x8xf32>, %k: tensor<Bx1x2x8xf32>, %v: tensor<Bx1x2x6xf32>, %start: tensor<Bxi64>,
                 %table: tensor<BxTxi32>) {{
        %0 = kv.append(@kv.0, %k, %v, %start, %table) : {kv}
        %1 = kv.select(%q, %0, %start, %table) {{{select}}} : tensor<Bx2x{most}xi32>
        %2 = kv.attend(%q, %0, %start, none, none, %table, none, %1) {{scale=0.3}} : tensor<Bx1x4x6xf32>
        return([%1, %2])
      }}
    }}""")
    verify(module)
    return module


def worth(queries: np.ndarray, keys: np.ndarray, spread: float) -> float:
    """What one page promises two query heads, by loops: between the middle and the bound of their products."""
    total = 0.0
    for query in queries:
        for d, x in enumerate(query):
            products = [float(x) * float(key[d]) for key in keys]
            middle = (max(products) + min(products)) / 2
            total += middle + spread * (max(products) - middle)
    return total


@pytest.mark.parametrize(("share", "least", "most"), [(0.5, 1, 3), (0.2, 4, 4), (1.0, 1, 6)])
def test_steps(share: float, least: int, most: int) -> None:
    """The first page, the last and the best of the others; attention as if there were no other tokens."""
    module, (q, _, k, v) = step_module(most, f"share={share} least={least} spread={share}"), tokens(2, 90)
    states, table = empty_states(module, 2), tables(2, 6)
    for at in range(90):
        inputs = [x[:, at : at + 1] for x in (q, k, v)]
        pages, out = interpret(module, "step", [*inputs, np.full(2, at), table], states)
        last = at // 16
        if at % 16 not in (0, 7, 15):
            continue
        for b, head in np.ndindex(2, 2):
            chosen = [page for page in pages[b, head] if page >= 0]
            mine = q[b, at, 2 * head : 2 * head + 2]
            bounds = {p: worth(mine, k[b, 16 * p : 16 * p + 16, head], share) for p in range(1, last)}
            count = min(last + 1, max(int(np.ceil(share * (last + 1))), least, 2))
            best = sorted(bounds, key=lambda p: -bounds[p])[: count - 2]
            assert chosen == sorted({0, last, *best})
            seen = [t for p in chosen for t in range(16 * p, min(16 * p + 16, at + 1))]
            rows = (torch.from_numpy(x[b : b + 1, seen][:, :, head : head + 1]) for x in (k, v))
            mine = torch.from_numpy(q[b : b + 1, at : at + 1, 2 * head : 2 * head + 2])
            want = loops(mine, *rows, [[at]], scale=0.3)
            np.testing.assert_allclose(out[b : b + 1, :, 2 * head : 2 * head + 2], want, rtol=1e-4, atol=1e-5)


def test_pages_that_promise_the_same() -> None:
    """The earlier ones are taken; a table that is too short is refused."""
    module, states = step_module(3, "share=0.5 least=1"), empty_states(step_module(3, "share=0.5 least=1"), 1)
    zeros = [np.zeros((1, 1, h, d), np.float32) for h, d in ((4, 8), (2, 8), (2, 6))]
    pages, _ = interpret(module, "step", [*zeros, np.array([95]), tables(1, 6)], states)
    assert pages.tolist() == [[[0, 1, 5]] * 2]
    with pytest.raises(InterpreterError, match="5 pages of 16"):
        interpret(module, "step", [*zeros, np.array([95]), tables(1, 5)], states)


def test_bytes() -> None:
    """A page's summary is two keys for each head: of the cache's floats, or of those given for codes."""
    plain, codes = KVType(4, 64, 32, 256, DType.bf16, Paged(16)), KVType(4, 64, 32, 256, DType.i4, Paged(16))
    assert parse_kv_type(KV).page_bytes == 16 * 2 * (8 + 6) * 4 + 2 * 2 * 8 * 4
    for kind, full in ((plain, {}), (codes, {}), (codes, {"full": "f32"})):
        said = parse_kv_type(str(kind)[:-1] + ", summary=minmax" + "".join(f", {k}={v}" for k, v in full.items()) + ">")
        assert said.page_bytes == kind.page_bytes + 4 * 2 * 64 * (4 if full else 2)
        assert said.sequence_bytes == kind.sequence_bytes + 16 * 4 * 2 * 64 * (4 if full else 2)
        assert parse_kv_type(str(said)) == said


@pytest.mark.parametrize(
    ("kv", "select", "message"),
    [
        (KV.replace(", summary=minmax", ""), "share=0.5", "give the cache summary=minmax"),
        (KV, "share=1.5", "share is above 0 and at most 1"),
        (KV, "share=0.5 least=0", "least is at least 1"),
        (KV, "share=0.5 spread=2.0", "spread is between 0 and 1"),
    ],
)
def test_refused(kv: str, select: str, message: str) -> None:
    with pytest.raises(ParseError, match=message):
        step_module(3, select, kv)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("dtype=f32, layout=contiguous, summary=minmax", "a summary is of pages, contiguous has none"),
        ("dtype=i4, layout=paged<16>, group=16, recent=4, summary=minmax", "give keys=token and no recent tokens"),
        ("dtype=f32, layout=paged<16>, summary=mean", "summary is none or minmax"),
    ],
)
def test_summaries_that_do_not_go_together(more: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_kv_type(f"kv<heads=2, dim=8, vdim=6, length=96, {more}>")
