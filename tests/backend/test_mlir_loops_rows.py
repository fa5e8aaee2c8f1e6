"""Loop kernels with reductions and normalisations, alone, in chains and with several results."""

from __future__ import annotations

import numpy as np
import pytest

from tests.backend.loops_harness import CPUS, EMITTER, TARGETS, Native, check, kernel_of, random_array
from tilewright.codegen.mlir.loops import LoopsSchedule
from tilewright.ir import DType, ops, sym

B, S, N = sym("B"), sym("S"), sym("N")
SIZES = (1, 2, 15, 16, 17, 127, 300)
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.arch)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def run(target, build, types, shapes, rng, tolerance=None, schedule=None):
    native = Native(kernel_of(build, *types), target, schedule)
    for group in shapes:
        check(native, [random_array(rng, shape, kind) for shape, (_, kind) in zip(group, types)], tolerance)
    return native


ALL = ("sum", "mean", "max", "min", "prod", "any", "all")


@each_target
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64", "i64", "i32", "i8", "u8", "bool"])
def test_reduce_rows(target, dtype, rng):
    fns = [fn for fn in ALL if not (fn == "prod" and dtype in ("f32", "bf16", "f64"))]

    def build(b, x):
        return [b(ops.Reduce, x, fn, (1,), keep) for fn in fns for keep in (True, False)]

    run(target, build, [((B, N), dtype)], [[(3, n)] for n in SIZES], rng)


@each_target
@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)])
def test_reduce_axes(target, axes, rng):
    shapes = [[(1, 1, 21)], [(2, 5, 21)], [(3, 33, 21)]]
    run(target, lambda b, x: b(ops.Reduce, x, "sum", axes), [((B, S, 21), "f32")], shapes, rng)
    shapes = [[(2, 5, 3)], [(4, 5, 40)]]
    run(target, lambda b, x: b(ops.Reduce, x, "max", axes, True), [((B, 5, N), "i32")], shapes, rng)


@each_target
def test_reduce_keeps_nan(target):
    kernel = kernel_of(lambda b, x: [b(ops.Reduce, x, f, (1,)) for f in ("max", "min")], ((B, N), "f32"))
    native = Native(kernel, target)
    for n in (3, 17, 70):
        x = np.zeros((2, n), np.float32)
        x[1, n // 2] = np.nan
        check(native, [x])


@each_target
@pytest.mark.parametrize("dtype", ["f32", "bf16", "i64", "u8"])
def test_argmax(target, dtype, rng):
    native = Native(kernel_of(lambda b, x: b(ops.ArgMax, x, 1), ((B, N), dtype)), target)
    for n in SIZES:
        x = random_array(rng, (4, n), dtype)
        x[1] = x[1, 0]  # all equal: the first
        if dtype == "f32":
            x[2, n // 2:] = np.nan
            x[3] = -np.inf
        check(native, [x])


@each_target
def test_argmax_of_a_leading_axis(target, rng):
    run(target, lambda b, x: b(ops.ArgMax, x, 0, True), [((S, N), "f32")], [[(1, 1)], [(5, 17)], [(9, 40)]], rng)


@each_target
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64"])
@pytest.mark.parametrize("width", [64, 127, None])
def test_norms(target, dtype, width, rng):
    n = width or N

    def build(b, x, w, v):
        return [
            b(ops.RmsNorm, x, w, 1e-6), b(ops.RmsNorm, x, w, 1e-5, 1.0), b(ops.RmsNorm, x, None, 1e-5),
            b(ops.LayerNorm, x, w, v, 1e-5), b(ops.LayerNorm, x, None, None, 1e-5), b(ops.LayerNorm, x, None, v),
        ]  # fmt: skip

    sizes = (width,) if width else (2, 17, 200)
    shapes = [[(b, s, k), (k,), (k,)] for k in sizes for b, s in ((1, 1), (2, 5))]
    run(target, build, [((B, S, n), dtype), ((n,), dtype), ((n,), dtype)], shapes, rng, {"f32": 2e-5}.get(dtype))


@each_target
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("width", [1, 3, 64, 127, 20000, None])
@pytest.mark.parametrize("build", [
    lambda b, x: b(ops.Softmax, x, 1),
    lambda b, x: b(ops.Mul, b(ops.Softmax, x, 1), x),
    lambda b, x: [b(ops.Softmax, x, 1)] * 2,
], ids=["alone", "read", "twice"])
def test_softmax(target, dtype, width, build, rng):
    n = width or N
    native = Native(kernel_of(build, ((B, n), dtype)), target)
    for k in (width,) if width else SIZES:
        x = random_array(rng, (3, k), dtype)
        x[0, ::2] = -np.inf
        x[1] = -np.inf
        check(native, [x])


@each_target
def test_softmax_of_a_middle_axis(target, rng):
    shapes = [[(1, 1, 5)], [(2, 3, 17)], [(2, 20, 40)]]
    native = run(target, lambda b, x: b(ops.Softmax, x, 1), [((B, S, N), "f32")], shapes, rng)
    assert native.code.dims == ("B", "N", "S")


@each_target
def test_group_norm(target, rng):
    def build(b, x, w, v):
        return b(ops.GroupNorm, x, w, v, 4)

    types = [((B, 8, S, N), "f32"), ((8,), "f32"), ((8,), "f32")]
    run(target, build, types, [[(b, 8, s, n), (8,), (8,)] for b, s, n in ((1, 1, 1), (2, 3, 17))], rng, 2e-5)
    run(target, build, [((B, 8), "f32"), *types[1:]], [[(3, 8), (8,), (8,)]], rng, 2e-5)


# --- chains -----------------------------------------------------------------------------------------------------------


@each_target
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_add_and_norm(target, dtype, rng):
    """Residual and normalised, from one pass over the row."""
    def build(b, x, y, w):
        total = b(ops.Add, x, y)
        return total, b(ops.RmsNorm, total, w, 1e-6)

    shapes = [[(b, s, 200), (b, s, 200), (200,)] for b, s in ((1, 1), (2, 7))]
    types = [((B, S, 200), dtype), ((B, S, 200), dtype), ((200,), dtype)]
    run(target, build, types, shapes, rng, {"f32": 1e-5}.get(dtype))


@each_target
def test_results_that_differ_in_shape(target, rng):
    """Rope of queries and keys and the values as they are, out of one projection; and a norm of another width."""
    def build(b, qkv, cos, sin, w):
        def part(start, heads):
            flat = b(ops.Slice, qkv, (0, 0, start), (B, S, start + heads * 32), (1, 1, 1))
            return b(ops.Reshape, flat, (B, S, heads, 32))

        key = b(ops.RmsNorm, part(128, 2), w)
        return b(ops.Rope, part(0, 4), cos, sin), b(ops.Rope, key, cos, sin), part(192, 2)

    types = [((B, S, 256), "f32"), ((1, S, 32), "f32"), ((1, S, 32), "f32"), ((32,), "f32")]
    run(target, build, types, [[(b, s, 256), (1, s, 32), (1, s, 32), (32,)] for b, s in ((1, 1), (2, 7))], rng, 1e-5)


@each_target
def test_masked_scaled_softmax(target, rng):
    def build(b, scores, keep):
        low = b(ops.Full, (), float("-inf"), DType.f32)
        scaled = b(ops.Mul, scores, b(ops.Full, (), 0.125, DType.f32))
        return b(ops.Softmax, b(ops.Where, keep, scaled, low), 3)

    types = [((B, 2, S, N), "f32"), ((B, 1, S, N), "bool")]
    run(target, build, types, [[(b, 2, s, n), (b, 1, s, n)] for b, s, n in ((1, 1, 1), (2, 5, 40))], rng)


@each_target
def test_dear_rows_are_kept(target, rng):
    def build(b, x, w):
        return b(ops.LayerNorm, b(ops.Gelu, b(ops.Tanh, x)), w)

    native = run(target, build, [((B, 150), "f32"), ((150,), "f32")], [[(4, 150), (150,)]], rng, 1e-5)
    assert native.device or native.code.tasks == B


def test_dear_long_rows_are_refused():
    kernel = kernel_of(lambda b, x: b(ops.LayerNorm, b(ops.Gelu, x)), ((B, N), "f32"))
    assert "does not fit the stack" in EMITTER.match(kernel, TARGETS[0])


@each_target
def test_cosine_similarity_head(target, rng):
    """Masked mean over tokens, then unit length: reductions of reductions."""
    def build(b, x, mask):
        keep = b(ops.Reshape, b(ops.Cast, mask, DType.f32), (B, S, 1))
        total = b(ops.Reduce, b(ops.Mul, x, keep), "sum", (1,))
        mean = b(ops.Div, total, b(ops.Reduce, keep, "sum", (1,)))
        length = b(ops.Sqrt, b(ops.Reduce, b(ops.Mul, mean, mean), "sum", (1,), True))
        return b(ops.Div, mean, length)

    kernel = kernel_of(build, ((B, S, 48), "f32"), ((B, S), "bool"))
    native = Native(kernel, target)
    for b, s in ((1, 1), (3, 17)):
        mask = np.ones((b, s), bool)
        mask[:, s - s // 3:] = False
        check(native, [random_array(rng, (b, s, 48), "f32"), mask], 1e-5)


@pytest.mark.parametrize("schedule", list(LoopsSchedule.space(CPUS[-1]))[::5], ids=str)
def test_schedules(schedule, rng):
    def build(b, x, w):
        y = b(ops.Silu, x)
        return b(ops.Softmax, y, 1), b(ops.RmsNorm, x, w), b(ops.Concat, (y, x), 1)

    types = [((B, 130), "bf16"), ((130,), "bf16")]
    run(CPUS[-1], build, types, [[(5, 130), (130,)]], rng, schedule=schedule)
    flat = [((N,), "f32")]
    run(CPUS[-1], lambda b, x: b(ops.Exp, x), flat, [[(n,)] for n in (1, 1023, 1024, 1025, 40000)], rng,
        schedule=schedule)  # fmt: skip


@pytest.mark.parametrize(
    ("build", "types", "reason"),
    [
        (lambda b, x: b(ops.CumSum, x, 0), [((N,), "f32")], "core.cumsum has no loop form"),
        (lambda b, x: b(ops.Exp, x), [((N,), "i32")], "core.exp of i32"),
        (lambda b, x: b(ops.Erf, x), [((N,), "f64")], "core.erf of f64"),
        (lambda b, x, y: [b(ops.Neg, x), b(ops.Neg, y)], [((N,), "f32"), ((S,), "f32")], "share no leading axis"),
    ],
)
def test_refusals(build, types, reason):
    assert reason in EMITTER.match(kernel_of(build, *types), TARGETS[0])
