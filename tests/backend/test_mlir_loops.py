"""Loop kernels against the interpreter: every operation, every element type, ragged sizes, both vector widths."""

from __future__ import annotations

import numpy as np
import pytest

from tests.backend.loops_harness import TARGETS, Native, check, kernel_of, random_array
from tilewright.ir import DType, ops, sym

B, S, N = sym("B"), sym("S"), sym("N")
SIZES = (1, 2, 15, 16, 17, 127, 300)
FLOATS = ("f32", "bf16", "f16", "f64")
INTS = ("i64", "i32", "i16", "i8", "u8")
LIBM = (ops.Erf, ops.Gelu, ops.GeluTanh)

each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.arch)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def run_all(kernel, arrays, target, tolerance=None, schedule=None):
    """Compile once, check each list of inputs."""
    native = Native(kernel, target, schedule)
    for inputs in arrays:
        check(native, inputs, tolerance)
    return native


# --- elementwise ------------------------------------------------------------------------------------------------------

UNARY_FLOAT = [
    ops.Neg, ops.Abs, ops.Sign, ops.Exp, ops.Sqrt, ops.Rsqrt, ops.Reciprocal, ops.Log, ops.Log1p, ops.Sin, ops.Cos,
    ops.Tanh, ops.Sigmoid, ops.Erf, ops.Floor, ops.Ceil, ops.Round, ops.Relu, ops.Silu, ops.Gelu, ops.GeluTanh,
    ops.Softplus,
]  # fmt: skip
POSITIVE = (ops.Sqrt, ops.Rsqrt, ops.Log, ops.Log1p, ops.Reciprocal)


@each_target
@pytest.mark.parametrize("dtype", FLOATS)
def test_unary_floats(target, dtype, rng):
    """All of them as results of one kernel."""
    kinds = [kind for kind in UNARY_FLOAT if dtype != "f64" or kind not in LIBM]

    def build(b, x, positive):
        return [b(kind, positive if kind in POSITIVE else x) for kind in kinds]

    arrays = [[random_array(rng, (n,), dtype), random_array(rng, (n,), dtype, 0.1, 3)] for n in SIZES]
    run_all(kernel_of(build, ((N,), dtype), ((N,), dtype)), arrays, target, {"f64": 1e-12}.get(dtype))


@each_target
def test_unary_integers(target, rng):
    kinds = [ops.Neg, ops.Abs, ops.Sign, ops.Not, ops.Relu, ops.Floor]

    def build(b, *xs):
        return [b(kind, x) for x in xs for kind in kinds if x.dtype is not DType.u8 or kind is not ops.Neg]

    kernel = kernel_of(build, *(((N,), dtype) for dtype in INTS))
    run_all(kernel, [[random_array(rng, (n,), dtype) for dtype in INTS] for n in SIZES], target)


BINARY = [ops.Add, ops.Sub, ops.Mul, ops.Div, ops.FloorDiv, ops.Mod, ops.Maximum, ops.Minimum]
COMPARE = [ops.Eq, ops.Ne, ops.Lt, ops.Le, ops.Gt, ops.Ge]


@each_target
@pytest.mark.parametrize("dtype", [*FLOATS, *INTS])
def test_binary(target, dtype, rng):
    kinds = BINARY + COMPARE + ([ops.And, ops.Or, ops.Xor] if dtype in INTS else [])
    kernel = kernel_of(lambda b, x, y: [b(kind, x, y) for kind in kinds], ((N,), dtype), ((N,), dtype))
    arrays = [[random_array(rng, (n,), dtype), random_array(rng, (n,), dtype)] for n in SIZES]
    for x, y in arrays:
        y[::3] = x[::3]
        if dtype in FLOATS:
            y[y == 0] = 1
            y[np.abs(y) < 0.25] = 0.5  # quotients that narrow floats can tell apart
        else:
            y[y == 0] = 1
    run_all(kernel, arrays, target)


@each_target
def test_integer_division_never_traps(target):
    lowest = np.iinfo(np.int32).min
    a = np.array([5, -5, 0, lowest, lowest, 7], np.int32)
    b = np.array([0, 0, 0, -1, 1, -1], np.int32)
    kernel = kernel_of(lambda b, x, y: [b(ops.FloorDiv, x, y), b(ops.Mod, x, y)], ((N,), "i32"), ((N,), "i32"))
    run_all(kernel, [[a, b]], target)


@each_target
def test_bool_and_where(target, rng):
    def build(b, p, q, x, y):
        both = b(ops.And, p, b(ops.Not, q))
        return [
            both, b(ops.Or, p, q), b(ops.Xor, p, q), b(ops.Eq, p, q), b(ops.Where, both, x, y),
            b(ops.Where, p, p, q), b(ops.Cast, p, DType.i32), b(ops.Cast, x, DType.bool), b(ops.Lt, p, q),
        ]  # fmt: skip

    kernel = kernel_of(build, ((N,), "bool"), ((N,), "bool"), ((N,), "f32"), ((N,), "f32"))
    dtypes = ("bool", "bool", "f32", "f32")
    run_all(kernel, [[random_array(rng, (n,), d) for d in dtypes] for n in SIZES], target)


@each_target
@pytest.mark.parametrize("dtype", FLOATS)
def test_threshold(target, dtype, rng):
    """Small elements become zero; a NaN and a limit that is none keep what there is."""

    def build(b, x, limits, one, by):
        return [b(ops.Threshold, x, limits), b(ops.Threshold, x, one), b(ops.Threshold, x, limits, by)]

    def inputs(n):
        x, by = (random_array(rng, (3, n), dtype) for _ in range(2))
        x[0, 0], by[1, 0] = np.nan, np.inf
        limits = random_array(rng, (n,), "f32", 0, 2)
        limits[-1] = np.nan
        return [x, limits, np.full(1, 0.5, np.float32), by]

    types = ((3, N), dtype), ((N,), "f32"), ((1,), "f32"), ((3, N), dtype)
    run_all(kernel_of(build, *types), [inputs(n) for n in SIZES], target)


@each_target
@pytest.mark.parametrize("source", [*FLOATS, *INTS, "bool"])
def test_casts(target, source, rng):
    kinds = [DType(d) for d in (*FLOATS, *INTS, "bool") if not (d == "u8" and source in FLOATS)]
    kernel = kernel_of(lambda b, x: [b(ops.Cast, x, kind) for kind in kinds], ((N,), source))
    run_all(kernel, [[random_array(rng, (n,), source)] for n in SIZES], target)


@each_target
def test_powers(target, rng):
    def build(b, x, y):
        constants = [b(ops.Full, (), c, DType.f32) for c in (2.0, 3.0, 0.5, -0.5, -1.0, 1.7)]
        return [b(ops.Pow, x, c) for c in constants] + [b(ops.Pow, x, y)]

    kernel = kernel_of(build, ((N,), "f32"), ((N,), "f32"))
    run_all(kernel, [[random_array(rng, (n,), "f32", 0.1, 3), random_array(rng, (n,), "f32")] for n in SIZES], target)


@each_target
def test_broadcasting(target, rng):
    """A full tensor, a row, a column, a scalar and a middle axis."""
    def build(b, x, row, column, scalar, middle):
        return b(ops.Mul, b(ops.Add, b(ops.Sub, x, row), column), b(ops.Add, scalar, middle))

    kernel = kernel_of(build, ((B, S, N), "f32"), ((N,), "f32"), ((B, S, 1), "f32"), ((), "f32"), ((S, 1), "f32"))
    shapes = [(1, 1, 1), (2, 3, 17), (3, 2, 64), (1, 5, 127)]
    arrays = [[(z, y, n), (n,), (z, y, 1), (), (y, 1)] for z, y, n in shapes]
    run_all(kernel, [[random_array(rng, shape, "f32") for shape in group] for group in arrays], target)


def test_narrow_target_has_no_wide_registers():
    from tests.backend.loops_harness import EMITTER
    from tilewright.codegen.mlir.loops_emit import build
    from tilewright.codegen.mlir.loops_plan import planner
    from tilewright.codegen.mlir.lower import assembly

    kernel = kernel_of(lambda b, x: b(ops.Softmax, b(ops.Gelu, x), 1), ((B, 96), "bf16"))
    schedule = EMITTER.default_schedule(kernel, TARGETS[0])
    text = assembly(build(kernel, planner(kernel)(4096), schedule, TARGETS[0], "k"))
    assert "ymm" in text
    assert "zmm" not in text
