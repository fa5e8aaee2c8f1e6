"""Layouts and codes of caches in the interpreter: against loops over all tokens, and what is refused."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.ir_cases.attention import loops
from tilewright.ir import DType, InterpreterError, KVType, Module, Ring, empty_states, interpret, parse_module, verify
from tilewright.ir.kv_type import parse_kv_type
from tilewright.ir.ops.kv_codes import encode, rounded

SIZES = "heads=2, dim=8, vdim=6, length=96"
CUTS = (0, 11, 12, 13, 40, 77)


def step_module(kind: str, attributes: str = "scale=0.3") -> Module:
    """One entry that appends a chunk and attends."""
    kv = f"kv<{SIZES}, {kind}>"
    sinks = parse_kv_type(kv).sinks
    paged = "paged" in kind
    table = ", %table: tensor<BxTxi32>" if paged else ""
    module = parse_module(f"""module @m {{
      dim B : 1..4
      dim S : 1..96
      dim T : 1..9
      state @kv.0 : {kv}
      func @step(%q: tensor<BxSx4x8xf32>, %far: tensor<BxSx4x8xf32>, %k: tensor<BxSx2x8xf32>, %v: tensor<BxSx2x6xf32>,
                 %start: tensor<Bxi64>{table}) {{
        %0 = kv.append(@kv.0, %k, %v, %start{", %table" if paged else ""}) : {kv}
        %1 = kv.attend(%q, %0, %start, none, none, {"%table" if paged else "none"}, {"%far" if sinks else "none"})
          {{{attributes}}} : tensor<BxSx4x6xf32>
        return([%1])
      }}
    }}""")
    verify(module)
    return module


def tokens(batch: int = 2, count: int = CUTS[-1]) -> list[np.ndarray]:
    """q, its form for sinks, k and v."""
    rng = np.random.default_rng(1)
    shapes = ((4, 8), (4, 8), (2, 8), (2, 6))
    return [rng.standard_normal((batch, count, h, d)).astype(np.float32) for h, d in shapes]


def tables(batch: int, pages: int) -> np.ndarray:
    """Pages in any order, other ones for each sequence."""
    return np.random.default_rng(2).permutation(batch * pages).reshape(batch, pages).astype(np.int32)


def run(module: Module, inputs: list[np.ndarray], cuts: tuple[int, ...] = CUTS) -> tuple[np.ndarray, dict]:
    """Results of all tokens, fed chunk by chunk, and the states after."""
    batch = len(inputs[0])
    states, found = empty_states(module, batch), []
    pages = module.states["kv.0"].cache.pages
    more = [tables(batch, pages)] if pages else []
    for low, high in pairwise(cuts):
        start = np.full(batch, low, np.int64)
        found += interpret(module, "step", [*(x[:, low:high] for x in inputs), start, *more], states)
    return np.concatenate(found, 1), states


@pytest.mark.parametrize("page", [16, 32, 64])
@pytest.mark.parametrize("rule", [{}, {"window": 9}, {"chunk": 16}], ids=str)
def test_pages_are_as_good_as_one_piece(page: int, rule: dict[str, int]) -> None:
    attributes = " ".join(f"{k}={v}" for k, v in {"scale": 0.3, **rule}.items())
    whole, _ = run(step_module("dtype=f32, layout=contiguous", attributes), tokens())
    paged, _ = run(step_module(f"dtype=f32, layout=paged<{page}>", attributes), tokens())
    assert np.array_equal(whole, paged)


def test_a_ring_holds_its_window() -> None:
    inputs, window = tokens(count=300), 20
    module = step_module("dtype=f32, layout=ring<20, 50>", f"scale=0.3 window={window}")
    module.states["kv.0"].type = KVType(2, 8, 6, 400, DType.f32, Ring(20, 50))
    with pytest.raises(InterpreterError, match="do not fit the cache's 96 slots"):
        run(step_module("dtype=f32, layout=ring<20, 50>", "window=20"), inputs, (0, 50, 100))
    inputs = [x[:, :96] for x in inputs]
    got, states = run(module, inputs, (0, 50, 90, 91, 96))
    assert states["kv.0"][0].shape == (2, 128, 2, 8)
    q, _, k, v = map(torch.from_numpy, inputs)
    want = loops(q, k, v, [list(range(96))] * 2, scale=0.3, window=window)
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-5)


def test_sinks_stay_and_are_seen_by_their_own_queries() -> None:
    window, sinks = 7, 3
    inputs = tokens()
    got, states = run(step_module("dtype=f32, layout=ring<7, 40, 3>", "scale=0.3 window=7"), inputs)
    assert states["kv.0"][0].shape[1] == sinks + 64
    q, far, k, v = (x.astype(np.float64) for x in inputs)
    for at in (0, 2, 5, 9, 50, 76):
        for head in range(4):
            seen = [j for j in range(at + 1) if j < sinks or j > at - window]
            scores = [(far if j < sinks else q)[1, at, head] @ k[1, j, head // 2] * 0.3 for j in seen]
            weights = np.exp(scores) / np.exp(scores).sum()
            want = sum(w * v[1, j, head // 2] for w, j in zip(weights, seen))
            np.testing.assert_allclose(got[1, at, head], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "paged<32>"])
@pytest.mark.parametrize("codes", ["dtype=i8", "dtype=i4", "dtype=i2, scales=f32", "dtype=i4, keys=channel, group=16",
                                   "dtype=i2, keys=channel, recent=20", "dtype=i8, recent=40, full=f32",
                                   "dtype=i2, keys=channel, group=16, rank=2, outliers=1"])  # fmt: skip
def test_codes_decode_to_rounded_numbers(layout: str, codes: str) -> None:
    dtype, *more = codes.split(", ")
    module, inputs = step_module(", ".join([dtype, f"layout={layout}", *more])), tokens()
    kind = module.states["kv.0"].cache
    got, states = run(module, inputs)
    keys, values = held(states["kv.0"], kind, 2)
    count = CUTS[-1]
    whole = kind.coded(count)
    came = full(kind, inputs[2:])
    for mine, given, want in zip((keys, values), came, rounded(kind, *(x[:, :whole] for x in came))):
        assert np.array_equal(mine[:, :whole], want)
        assert np.array_equal(mine[:, whole:count], given[:, whole:])
    seen = inputs[0][:, -1:], keys[:, :count], values[:, :count]
    last = loops(*map(torch.from_numpy, seen), [[count - 1]] * 2, scale=0.3)
    np.testing.assert_allclose(got[:, -1:], last.numpy(), rtol=1e-5, atol=1e-5)


def full(kind: KVType, numbers: list[np.ndarray]) -> list[np.ndarray]:
    """What tokens are before they are codes."""
    return [x.astype(kind.full.np).astype(np.float32) if kind.keeps_recent else x for x in numbers]


def held(cache: tuple[np.ndarray, np.ndarray], kind: KVType, batch: int) -> list[np.ndarray]:
    """Each sequence's slots in order."""
    if not kind.page:
        return list(cache)
    table = tables(batch, kind.pages)
    return [x[table].reshape(batch, -1, *x.shape[2:]) for x in cache]


def test_codes_by_hand() -> None:
    coded = encode(np.array([[0.0, 1.0, -2.0, 0.99]]), DType.i8, -1, DType.f32)
    assert coded.codes.tolist() == [[0, 64, -127, 63]]  # 63.5 goes to even
    coded = encode(np.array([[1.0, 4.0, 2.4, 2.5]]), DType.i2, -1)
    assert (coded.codes.tolist(), coded.scale.tolist(), coded.zero.tolist()) == ([[0, 3, 1, 2]], [[1.0]], [[1.0]])
    assert coded.decode().tolist() == [[1.0, 4.0, 2.0, 3.0]]
    alike = encode(np.full((1, 4), 7.0), DType.i4, -1)
    assert alike.decode().tolist() == [[7.0] * 4]


def test_codes_of_channels_share_scales_along_tokens() -> None:
    kind = KVType(1, 2, 2, 32, DType.i2, keys="channel", group=16)
    keys = np.stack([np.arange(32.0), 100 * np.arange(32.0)], -1).reshape(32, 1, 2)
    got, _ = rounded(kind, keys, keys)
    assert got[:16, 0, 0].tolist() == pytest.approx([5.0 * round(n / 5) for n in range(16)])
    assert np.abs(got - keys).max(axis=(0, 1)).tolist() == pytest.approx([2.0, 200.0])


def leading(error: np.ndarray, rank: int) -> float:
    """How much of a matrix its greatest singular values leave, by LAPACK."""
    return float(np.sqrt((np.linalg.svd(error, compute_uv=False)[rank:] ** 2).sum()))


@pytest.mark.parametrize("keys", ["token", "channel"])
def test_factors_take_nearly_as_much_of_the_error_as_any_can(keys: str) -> None:
    rng = np.random.default_rng(0)
    axis = -2 if keys == "channel" else -1
    numbers = (rng.standard_normal((5, 32, 3)) @ rng.standard_normal((5, 3, 24)) + rng.standard_normal((5, 32, 24)) / 4)
    plain = encode(numbers, DType.i2, axis, DType.f32)
    for rank in (1, 4):
        coded = encode(numbers, DType.i2, axis, DType.f32, rank=rank)
        assert coded.factors is not None
        assert np.array_equal(coded.codes, plain.codes)
        assert np.allclose(np.swapaxes(coded.factors[0], -1, -2) @ coded.factors[0], np.eye(rank), atol=1e-5)
        for error, left in zip(numbers - plain.decode(), numbers - coded.decode()):
            assert np.linalg.norm(left) <= 1.08 * leading(error, rank)


def test_factors_of_errors_that_have_fewer_columns() -> None:
    """Further ones are zero; so are all where codes leave nothing."""
    numbers = np.tile(np.array([[0.0, 3.0, 1.25, 0.5]]), (16, 1))
    coded = encode(numbers, DType.i2, -1, DType.f32, rank=3)
    assert coded.factors is not None
    assert np.count_nonzero(np.abs(coded.factors[0]).sum(0)) == 1
    np.testing.assert_allclose(coded.decode(), numbers, atol=1e-6)
    nothing = encode(np.full((16, 4), 7.0), DType.i2, -1, rank=2).factors
    assert nothing is not None
    assert not nothing[0].any()


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("axis", [-1, -2])
def test_outliers_are_kept_and_have_no_say_in_scales(axis: int, rank: int) -> None:
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((2, 32, 16)).astype(np.float32)
    at = (0, 5, 3)
    numbers[at] = 100
    coded = encode(numbers, DType.i4, axis, DType.f32, rank=rank, outliers=2)
    found, lines = coded.decode(), np.moveaxis(numbers, axis, -1).reshape(-1, numbers.shape[axis])
    for line, scale, kept in zip(lines, np.moveaxis(coded.scale, axis, -1).ravel(),
                                 np.moveaxis(found, axis, -1).reshape(lines.shape)):
        order = np.argsort(line)
        np.testing.assert_allclose(scale, (line[order[-3]] - line[order[2]]) / 15, rtol=1e-5)
        for place in (*order[:2], *order[-2:]):
            assert kept[place] == pytest.approx(line[place], abs=1e-5)
    assert found[at] == pytest.approx(100, rel=1e-6)
    alike = encode(np.full((16, 8), 7.0), DType.i4, axis, outliers=2)
    assert alike.decode().tolist() == [[7.0] * 8] * 16


@pytest.mark.parametrize(("start", "count", "message"), [
    (90, 7, "token 90 and 7 more do not fit the cache's 96 slots"),
    (30, 4, r"page \[77\] in a table, the pool has 6"),
])  # fmt: skip
def test_pages_that_do_not_exist(start: int, count: int, message: str) -> None:
    module, inputs = step_module("dtype=f32, layout=paged<16>"), tokens(1, count)
    table = np.array([[0, 1, 77, 77, 77, 77]], np.int32)
    with pytest.raises(InterpreterError, match=message):
        interpret(module, "step", [*inputs, np.array([start]), table], empty_states(module, 1))


def test_entries_of_a_table_behind_the_tokens_are_not_looked_at() -> None:
    module, inputs = step_module("dtype=f32, layout=paged<16>"), tokens(1, 4)
    [want] = interpret(module, "step", [*inputs, np.array([0]), np.array([[3]], np.int32)], empty_states(module, 1))
    table = np.array([[3, -1, 99]], np.int32)
    [got] = interpret(module, "step", [*inputs, np.array([0]), table], empty_states(module, 1))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_a_pool_has_as_many_pages_as_asked_for() -> None:
    module = step_module("dtype=f32, layout=paged<16>")
    assert empty_states(module, 3)["kv.0"][0].shape == (18, 16, 2, 8)
    assert empty_states(module, 3, pages=5)["kv.0"][1].shape == (5, 16, 2, 6)


def test_a_call_longer_than_the_rings_chunk_fails() -> None:
    with pytest.raises(InterpreterError, match="41 tokens at once, the ring takes 40"):
        run(step_module("dtype=f32, layout=ring<7, 40>", "window=7"), tokens(), (0, 41))


@pytest.mark.parametrize(("text", "error"), [
    ("dtype=f32, layout=paged<8>", "pages have 16, 32, 64 tokens, got 8"),
    ("dtype=f32, layout=paged", "there are contiguous, paged<page>, ring<window, chunk, sinks>"),
    ("dtype=f32, layout=ring<5>", "no layout of a cache: 'ring<5>'"),
    ("dtype=f32, layout=ring<0, 4>", "window and chunk of a ring are positive"),
    ("dtype=u8, layout=contiguous", "no cache of u8; there are f32, f16, bf16, i8, i4, i2"),
    ("dtype=f32, layout=contiguous, recent=9, group=16", "group, recent: only of codes, not of f32"),
    ("dtype=i8, layout=contiguous, keys=channel", "i8 has a scale for each token"),
    ("dtype=i4, layout=contiguous, keys=row", "keys are token or channel, got row"),
    ("dtype=i4, layout=contiguous, group=24", "groups have 16, 32, 64, 128 tokens, got 24"),
    ("dtype=i4, layout=paged<16>, keys=channel", "a group of 32 tokens lies in several pages of 16; give group=16"),
    ("dtype=i4, layout=ring<9, 4>, recent=8", "a ring overwrites tokens one by one"),
    ("dtype=i4, layout=contiguous, scales=bf16", "scales are f16 or f32, got bf16"),
    ("dtype=i4, layout=contiguous, full=f16", "full is bf16 or f32, got f16"),
    ("dtype=i4, layout=contiguous, recent=8, rank=9", "rank is from 0 to 8, got 9"),
    ("dtype=i4, layout=contiguous, recent=8, outliers=5", "outliers is from 0 to 4, got 5"),
    ("dtype=f32, layout=contiguous, rank=2", "rank: only of codes, not of f32"),
    ("dtype=i8, layout=contiguous, recent=8, rank=2", "rank and outliers make up for few bits"),
    ("dtype=i4, layout=contiguous, rank=2", "rank and outliers are of whole groups of tokens"),
    ("dtype=i4, layout=ring<9, 4>, outliers=1", "rank and outliers are of whole groups of tokens"),
    ("dtype=i4, layout=contiguous, recent=8, rank=7", "rank 7 of 32 tokens of 8 and 6 components"),
    ("dtype=i4, layout=contiguous, recent=8, outliers=3", "3 outliers at either end of 6 numbers that share a scale leave"),
    ("dtype=f32, layout=contiguous, heads=3", "a cache has no 'heads' here"),
    ("dtype=f32", "layout of a cache missing"),
    ("dtype=f32, layout=contiguous, recent=+3", "not a size: '\\+3'"),
])  # fmt: skip
def test_types_that_do_not_hold_together(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        parse_kv_type(f"kv<{SIZES}, {text}>")


@pytest.mark.parametrize("text", [
    "dtype=bf16, layout=paged<64>", "dtype=i8, layout=ring<1024, 512, 4>", "dtype=i4, layout=ring<1024, 512>, scales=f32",
    "dtype=i2, layout=contiguous, keys=channel, group=64, recent=128, scales=f32, full=f32",
    "dtype=i2, layout=contiguous, recent=64, rank=2, outliers=1",
])  # fmt: skip
def test_text_of_a_type(text: str) -> None:
    assert str(parse_kv_type(f"kv<{SIZES}, {text}>")) == f"kv<{SIZES}, {text}>"


def test_bytes() -> None:
    kind = KVType(2, 64, 64, 100, DType.bf16)
    assert (kind.bytes_of(1), kind.sequence_bytes, kind.page_bytes) == (512, 51200, 0)
    assert parse_kv_type("kv<heads=2, dim=64, vdim=64, length=100, dtype=bf16, layout=paged<32>>").page_bytes == 32 * 512
    assert KVType(2, 64, 64, 100, DType.i8).bytes_of(1) == 2 * (128 + 4)
    channel = KVType(2, 64, 64, 256, DType.i2, keys="channel", recent=128)
    assert channel.bytes_of(32) == 2 * (32 * 128 // 4 + 4 * (64 + 32))
    assert channel.sequence_bytes == channel.bytes_of(256) + (128 + 31) * 2 * 128 * 2
    gear = replace(channel, rank=4, outliers=1)
    assert gear.bytes_of(64) - channel.bytes_of(64) == 2 * 2 * (4 * (32 + 64) * 2 * 2 + (64 + 32) * 2 * 3)


@pytest.mark.parametrize(("operands", "attributes", "kind", "error"), [
    ("%q, @kv.0, %start", "window=4", "paged<16>", "a table of pages is for a cache with pages, and only that"),
    ("%q, @kv.0, %start, none, none, %table", "window=4", "contiguous", "a table of pages is for a cache with pages"),
    ("%q, @kv.0, %start, none, none, %start", "window=4", "paged<16>", "table: expected rank 2"),
    ("%q, @kv.0, %start, none, none, none, %q", "window=4", "ring<8, 4>", "q_sinks is for a ring with sinks"),
    ("%q, @kv.0, %start", "window=9", "ring<8, 4>", "sees 9 tokens of a ring that holds 8"),
    ("%q, @kv.0, %start", "scale=1.0", "ring<8, 4>", "sees all tokens of a ring that holds 8"),
    ("%q, @kv.0, %start, %bias", "window=8", "ring<8, 4>", "a bias for each position"),
])  # fmt: skip
def test_operands_that_do_not_fit(operands: str, attributes: str, kind: str, error: str) -> None:
    with pytest.raises(Exception, match=error):
        parse_module(f"""module @m {{
          dim B : 1..4
          dim T : 1..9
          state @kv.0 : kv<{SIZES}, dtype=f32, layout={kind}>
          func @step(%q: tensor<Bx1x4x8xf32>, %start: tensor<Bxi64>, %table: tensor<BxTxi32>,
                     %bias: tensor<1x4x1x96xf32>) {{
            %0 = kv.attend({operands}) {{{attributes}}} : tensor<Bx1x4x6xf32>
            return([%0])
          }}
        }}""")
