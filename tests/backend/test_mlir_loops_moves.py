"""Loop kernels that move elements: reshapes, slices, concatenation, gathers, rope, creation."""

from __future__ import annotations

import numpy as np
import pytest

from tests.backend.loops_harness import EMITTER, TARGETS, Native, check, kernel_of, random_array
from tilewright.ir import DType, ops, sym

B, S, T, N = sym("B"), sym("S"), sym("T"), sym("N")
PAIRS = ((1, 1), (2, 3), (3, 17), (1, 40))
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.arch)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def run(target, build, types, shapes, rng, **kwargs):
    native = Native(kernel_of(build, *types), target)
    for group in shapes:
        check(native, [random_array(rng, shape, kind) for shape, (_, kind) in zip(group, types)], **kwargs)
    return native


@each_target
@pytest.mark.parametrize("dtype", ["f32", "bf16", "i64", "bool"])
def test_reshape_split_merge(target, dtype, rng):
    def build(b, x):
        heads = b(ops.Reshape, x, (B, S, 6, 16))
        return b(ops.Reshape, b(ops.Transpose, heads, (0, 2, 1, 3)), (B * 6, S, 16))

    run(target, build, [((B, S, 96), dtype)], [[(b, s, 96)] for b, s in PAIRS], rng)


@each_target
def test_reshape_that_does_not_align(target, rng):
    """12 x 10 as 8 x 15: real divisions in the index."""
    def build(b, x, y):
        return b(ops.Add, b(ops.Reshape, b(ops.Relu, x), (B, 8, 15)), y)

    run(target, build, [((B, 12, 10), "f32"), ((15,), "f32")], [[(b, 12, 10), (15,)] for b in (1, 3)], rng)


@each_target
def test_reshape_of_symbols(target, rng):
    """[B*S, 24] <-> [B, S, 24] with an operand a batch, so that the flat row must be taken apart."""
    def build(b, x, y):
        rows = b(ops.Reshape, x, (B, S, 24))
        return b(ops.Reshape, b(ops.Mul, rows, y), (B * S, 24))

    shapes = [[(b * s, 24), (b, 1, 24)] for b, s in PAIRS]
    kernel = kernel_of(build, ((B * S, 24), "f32"), ((B, 1, 24), "f32"))
    assert EMITTER.match(kernel, target) is None
    kernel = kernel_of(lambda b, x, y, z: b(ops.Add, build(b, x, y), b(ops.Reshape, z, (B * S, 24))),
                       ((B * S, 24), "f32"), ((B, 1, 24), "f32"), ((B, S, 24), "f32"))
    native = Native(kernel, target)
    for (x, y), (b, s) in zip(shapes, PAIRS):
        check(native, [random_array(rng, shape, "f32") for shape in (x, y, (b, s, 24))])


@each_target
def test_transposes(target, rng):
    def build(b, x):
        return b(ops.Exp, b(ops.Transpose, x, (0, 2, 1)))

    run(target, build, [((B, S, 20), "f32")], [[(b, s, 20)] for b, s in PAIRS], rng)


@each_target
@pytest.mark.parametrize("dtype", ["f32", "bf16", "bool"])
def test_tiled_transposes(target, dtype, rng):
    """Read along one axis, written along another: 16 rows at a time."""
    shapes = [[(n, s)] for n, s in ((1, 1), (15, 17), (16, 32), (40, 70))]
    run(target, lambda b, x: b(ops.Transpose, x, (1, 0)), [((N, S), dtype)], shapes, rng)

    def keys(b, x, y):
        return b(ops.Add, b(ops.Transpose, x, (0, 2, 3, 1)), y)

    if dtype == "f32":
        types = [((B, S, 2, 24), dtype), ((24, S), dtype)]
        run(target, keys, types, [[(b, s, 2, 24), (24, s)] for b, s in PAIRS], rng)


@each_target
@pytest.mark.parametrize("dtype", ["f16", "bf16", "f64", "bool", "i8"])
def test_moves_keep_the_bits(target, dtype, rng):
    def build(b, x, ids):
        rows = b(ops.Gather, b(ops.Concat, (x, x), 1), ids, 1)
        return b(ops.Pad, rows, (0, 1, 2), (0, 0, 3), 1)

    native = Native(kernel_of(build, ((B, S, 20), dtype), ((4,), "i64")), target)
    for b, s in PAIRS:
        check(native, [random_array(rng, (b, s, 20), dtype), rng.integers(0, 2 * s, (4,))], 1e-300)


@each_target
def test_slices(target, rng):
    def build(b, x):
        tail = b(ops.Slice, x, (0, S - 1, 3), (B, S, 40), (1, 1, 1))
        even = b(ops.Slice, tail, (0, 0, 1), (B, 1, 37), (1, 1, 2))
        return b(ops.Broadcast, even, (B, 5, 18))

    run(target, build, [((B, S, 48), "bf16")], [[(b, s, 48)] for b, s in PAIRS], rng)


@each_target
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_concat(target, axis, rng):
    widths = (5, 32, 7)
    dims = [[4, 6, 9] for _ in widths]
    for shape, width in zip(dims, widths):
        shape[axis] = width

    def build(b, *xs):
        return b(ops.Neg, b(ops.Concat, [b(ops.Exp, xs[0]), *xs[1:]], axis))

    run(target, build, [(shape, "f32") for shape in dims], [dims], rng)


@each_target
def test_concat_of_symbols(target, rng):
    """Past and new tokens, then along the innermost axis, where the border falls inside of a vector."""
    types = [((B, S, 8), "f32"), ((B, T, 8), "f32")]
    shapes = [[(2, s, 8), (2, t, 8)] for s, t in ((1, 1), (3, 20), (17, 2))]
    run(target, lambda b, x, y: b(ops.Concat, (x, y), 1), types, shapes, rng)
    types = [((B, S), "f32"), ((B, T), "f32")]
    shapes = [[(2, s), (2, t)] for s, t in ((1, 1), (3, 20), (17, 2), (33, 40))]
    run(target, lambda b, x, y: b(ops.Relu, b(ops.Concat, (x, y), 1)), types, shapes, rng)


@each_target
def test_pad(target, rng):
    def build(b, x):
        return b(ops.Exp, b(ops.Pad, x, (0, 2, 3), (0, 1, 4), -1.5))

    run(target, build, [((B, S, 21), "f32")], [[(b, s, 21)] for b, s in PAIRS], rng)
    run(target, lambda b, x: b(ops.Pad, x, (1,), (S,), 2), [((S,), "i32")], [[(s,)] for s in (1, 5, 40)], rng)


@each_target
def test_creation(target, rng):
    def build(b, x):
        places = b(ops.Iota, S, DType.i64, 3, 2)
        count = b(ops.Cast, b(ops.SizeOf, S * 2), DType.f32)
        late = b(ops.Gt, places, b(ops.Full, (), 20, DType.i64))
        return b(ops.Where, late, b(ops.Div, x, count), b(ops.Cast, places, DType.f32))

    run(target, build, [((B, S), "f32")], [[(b, s)] for b, s in PAIRS], rng)


def test_empty_results(rng):
    """A slice of nothing has no tasks; an empty piece of a concatenation is skipped."""
    nothing = lambda b, x: b(ops.Slice, x, (0, 3), (B, 3), (1, 1))  # noqa: E731
    assert run(TARGETS[0], nothing, [((B, 8), "f32")], [[(3, 8)]], rng).code.tasks == 0
    run(TARGETS[0], lambda b, x: b(ops.Concat, (nothing(b, x), x), 1), [((B, 8), "f32")], [[(3, 8)]], rng)
    run(TARGETS[0], lambda b, x: b(ops.Reduce, nothing(b, x), "sum", (1,)), [((B, 8), "f32")], [[(3, 8)]], rng)


@each_target
def test_causal_mask(target, rng):
    """i64 index ranges compared along both axes: no memory is read at all, except for the lengths."""
    def build(b, lengths):
        query = b(ops.Reshape, b(ops.Iota, S, DType.i64), (S, 1))
        key = b(ops.Iota, T, DType.i64)
        causal = b(ops.Le, b(ops.Sub, key, b(ops.SizeOf, T - S)), query)
        inside = b(ops.Lt, key, b(ops.Reshape, lengths, (B, 1, 1)))
        return b(ops.And, inside, causal)

    types = [((B,), "i64"), ((S, T), "bool")]
    native = Native(kernel_of(lambda b, lengths, keep: b(ops.And, build(b, lengths), keep), *types), target)
    for b, (s, t) in ((1, (1, 1)), (2, (3, 20)), (3, (17, 40))):
        check(native, [rng.integers(1, t + 1, (b,)), random_array(rng, (s, t), "bool")])


# --- data as an index -------------------------------------------------------------------------------------------------


@each_target
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_embedding(target, dtype, rng):
    def build(b, ids, table, scale):
        return b(ops.Mul, b(ops.Embedding, ids, table), scale)

    native = Native(kernel_of(build, ((B, S), "i64"), ((50, 72), dtype), ((72,), dtype)), target)
    for b, s in PAIRS:
        ids = rng.integers(0, 50, (b, s))
        check(native, [ids, random_array(rng, (50, 72), dtype), random_array(rng, (72,), dtype)])


def test_embedding_stays_inside_of_the_table(rng):
    native = Native(kernel_of(lambda b, ids, table: b(ops.Embedding, ids, table), ((B,), "i64"), ((9, 16), "f32")))
    table = random_array(rng, (9, 16), "f32")
    (out,) = native([np.array([1 << 40, -(1 << 40), 3]), table])
    np.testing.assert_array_equal(out, table[[8, 0, 3]])


@each_target
def test_gathers(target, rng):
    kernels = [
        (lambda b, x, i: b(ops.Gather, x, i, 0), ((B, 6, 20), "f32"), ((S, 2), "i64")),
        (lambda b, x, i: b(ops.Exp, b(ops.Gather, x, i, 1)), ((B, 6, 20), "f32"), ((S,), "i32")),
        (lambda b, x, i: b(ops.Gather, x, i, 2), ((B, 6, 20), "f32"), ((S,), "i64")),
        (lambda b, x, i: b(ops.TakeAlong, x, i, 2), ((B, 6, 20), "f32"), ((B, 6, S), "i64")),
        (lambda b, x, i: b(ops.TakeAlong, x, i, 1), ((B, 6, 20), "f32"), ((B, S, 20), "i64")),
    ]  # fmt: skip
    for build, *types in kernels:
        native = Native(kernel_of(build, *types), target)
        for b, s in ((1, 1), (6, 5), (7, 33)):
            sizes = {B: b, S: s}
            shapes = [tuple(sizes.get(d, d) for d in shape) for shape, _ in types]
            index = rng.integers(0, min(b, 6), shapes[1]).astype(DType(types[1][1]).np)
            check(native, [random_array(rng, shapes[0], "f32"), index])


@each_target
def test_gather_nd(target, rng):
    def build(b, x, last):
        rows = b(ops.Iota, B, DType.i64)
        return b(ops.GatherND, x, (rows, last))

    native = Native(kernel_of(build, ((B, S, 40), "f32"), ((B,), "i64")), target)
    for b, s in PAIRS:
        check(native, [random_array(rng, (b, s, 40), "f32"), rng.integers(0, s, (b,))])


# --- rope -------------------------------------------------------------------------------------------------------------


@each_target
@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("rotated", [64, 48, 16, 6])
@pytest.mark.parametrize("batched", [True, False])
def test_rope(target, style, rotated, batched, rng):
    """Of a slice of a fused projection, as in a decoder."""
    def build(b, qkv, cos, sin):
        q = b(ops.Slice, qkv, (0, 0, 64), (B, S, 256), (1, 1, 1))
        return b(ops.Rope, b(ops.Reshape, q, (B, S, 3, 64)), cos, sin, style)

    lead = B if batched else 1
    dtype = "bf16" if batched else "f32"
    types = [((B, S, 320), dtype), ((lead, S, rotated), dtype), ((lead, S, rotated), dtype)]
    shapes = [[(b, s, 320), *[(b if batched else 1, s, rotated)] * 2] for b, s in PAIRS]
    run(target, build, types, shapes, rng)


@each_target
def test_rope_then_heads_first(target, rng):
    def build(b, x, cos, sin):
        return b(ops.Transpose, b(ops.Rope, x, cos, sin), (0, 2, 1, 3))

    types = [((B, S, 3, 32), "f32"), ((1, S, 32), "f32"), ((1, S, 32), "f32")]
    run(target, build, types, [[(b, s, 3, 32), (1, s, 32), (1, s, 32)] for b, s in PAIRS], rng)
