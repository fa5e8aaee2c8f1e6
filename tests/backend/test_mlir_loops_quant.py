"""Quantizing rows and reading quantized tables in loop kernels, against the interpreter.

The kernel multiplies by 127 / max where the interpreter divides by max / 127. The quotients differ by a few parts in ten
million, so a code may differ, by one, only where the quotient is that close to a half.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.backend.loops_harness import EMITTER, TARGETS, Native, check, expected, kernel_of, random_array
from tilewright.ir import DType, ops, sym

B, S, N = sym("B"), sym("S"), sym("N")
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.arch)
WIDTHS = [(1, 0), (3, 0), (16, 0), (70, 0), (576, 0), (64, 8), (80, 40), (96, 32), (256, 128), (48, 1)]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def check_codes(native: Native, inputs, quotient, slack: float = 1e-4) -> None:
    """``quotient`` are the numbers that are rounded, in f64; ``slack`` how far from a half rounding must be right."""
    codes, scale = native(inputs)
    want_codes, want_scale = expected(native.kernel, inputs)
    np.testing.assert_allclose(scale, want_scale, rtol=max(slack / 100, 3e-7))
    from_half = np.abs(quotient - np.floor(quotient) - 0.5)
    sure = from_half > slack
    assert sure.mean() > 0.9 or sure.size < 32
    np.testing.assert_array_equal(codes[sure], want_codes[sure])
    assert np.abs(codes.astype(int) - want_codes).max() <= 1


def quotients(x: np.ndarray, group: int) -> np.ndarray:
    rows = x.astype(np.float64).reshape(*x.shape[:-1], -1, group or x.shape[-1])
    top = np.abs(rows).max(-1, keepdims=True)
    return (rows / np.where(top > 0, top / 127, 1)).reshape(x.shape)


@each_target
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize(("k", "group"), WIDTHS)
def test_quantize(target, dtype, k, group, rng):
    native = Native(kernel_of(lambda b, x: b.add_all(ops.Quantize(x, group)), ((B, S, k), dtype)), target)
    for b, s in ((1, 1), (2, 5)):
        x = random_array(rng, (b, s, k), dtype)
        x[0, 0, : group or k] = 0
        check_codes(native, [x], quotients(x, group), 1e-3 if dtype == "f16" else 1e-4)


@each_target
def test_quantize_a_symbolic_row_and_a_single_one(target, rng):
    native = Native(kernel_of(lambda b, x: b.add_all(ops.Quantize(x)), ((B, N), "f32")), target)
    for n in (1, 15, 16, 17, 300):
        x = random_array(rng, (3, n), "f32")
        check_codes(native, [x], quotients(x, 0))
    single = Native(kernel_of(lambda b, x: b.add_all(ops.Quantize(x, 32)), ((1, 96), "f32")), target)
    x = random_array(rng, (1, 96), "f32")
    check_codes(single, [x], quotients(x, 32))


@each_target
def test_ties_go_to_even_and_extremes_reach_127(target):
    x = np.array([[127, -127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 0, -0.0, 63.5, 64.5, 1, -1, 3]], np.float32)
    native = Native(kernel_of(lambda b, x: b.add_all(ops.Quantize(x)), ((B, 16), "f32")), target)
    codes, scale = native([x])
    assert scale[0, 0] == 1
    np.testing.assert_array_equal(codes, np.rint(x).astype(np.int8))
    for tiny in (1e-30, 1e-37):
        codes, _ = native([x * np.float32(tiny)])
        assert np.abs(codes - np.rint(x)).max() <= 1


@each_target
@pytest.mark.parametrize(("k", "group"), [(70, 0), (96, 32), (576, 0)])
def test_norms_in_front(target, k, group, rng):
    """The same kernel normalises; the interpreter's sums are in another order, so halves are further apart."""
    for norm in (
        lambda b, x, w, v: b(ops.RmsNorm, x, w, 1e-5),
        lambda b, x, w, v: b(ops.LayerNorm, x, w, v, 1e-5),
        lambda b, x, w, v: b(ops.Mul, b(ops.Silu, x), b(ops.Add, w, v)),
    ):
        def build(b, x, w, v, norm=norm):
            return b.add_all(ops.Quantize(norm(b, x, w, v), group))

        native = Native(kernel_of(build, ((B, S, k), "f32"), ((k,), "f32"), ((k,), "f32")), target)
        plain = kernel_of(norm, ((B, S, k), "f32"), ((k,), "f32"), ((k,), "f32"))
        for b, s in ((1, 1), (2, 3)):
            inputs = [random_array(rng, shape, "f32") for shape in ((b, s, k), (k,), (k,))]
            check_codes(native, inputs, quotients(expected(plain, inputs)[0], group), 1e-2)


@each_target
def test_the_normalised_row_may_leave_too(target, rng):
    def build(b, x, w):
        y = b(ops.RmsNorm, x, w, 1e-5)
        return (y, *b.add_all(ops.Quantize(y)))

    native = Native(kernel_of(build, ((B, 96), "f32"), ((96,), "f32")), target)
    inputs = [random_array(rng, (4, 96), "f32"), random_array(rng, (96,), "f32")]
    got, want = native(inputs), expected(native.kernel, inputs)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert (got[1] != want[1]).mean() < 0.02
    np.testing.assert_allclose(got[2], want[2], rtol=1e-6)


def test_one_task_a_row():
    build = lambda b, x, w: b.add_all(ops.Quantize(b(ops.RmsNorm, x, w, 1e-5)))  # noqa: E731
    native = Native(kernel_of(build, ((B, 1, 64), "bf16"), ((64,), "bf16")))
    assert native.device or native.code.tasks == B


# --- and back ---------------------------------------------------------------------------------------------------------


def codes_of(kind: str, n, k: int, group: int, scale: str) -> list[tuple]:
    groups = k // group if group else 1
    zero = [((n, groups), "u8")] if kind.startswith("u") else []
    return [((n, k), kind), ((n, groups), scale), *zero]


KINDS = ["i8", "u8", "i4", "u4", "i3", "u3", "i2", "u2", "f8e4m3", "f8e5m2", "f4e2m1"]


@each_target
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "group"), [(64, 0), (96, 32), (71, 0), (10, 2), (256, 128)])
def test_dequantize(target, kind, k, group, rng):
    for scale, out in (("f32", "f32"), ("f16", "bf16")):
        types = codes_of(kind, B, k, group, scale)
        native = Native(kernel_of(lambda b, *args, out=out: b(ops.Dequantize, *args, dtype=DType(out)), *types), target)
        for rows in (1, 5):
            shapes = [tuple(rows if d == B else d for d in shape) for shape, _ in types]
            check(native, [random_array(rng, s, d) for s, (_, d) in zip(shapes, types)])


@each_target
@pytest.mark.parametrize("kind", ["u8", "u4"])
def test_dequantize_with_offsets(target, kind, rng):
    types = [((B, 96), kind), ((B, 3), "f32"), ((B, 3), "f32")]
    native = Native(kernel_of(lambda b, c, s, o: b(ops.Dequantize, c, s, offset=o), *types), target)
    check(native, [random_array(rng, (5, *shape[1:]), d) for shape, d in types])


@each_target
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "group"), [(64, 0), (96, 32), (35, 0)])
def test_embedding_of_a_quantized_table(target, kind, k, group, rng):
    def build(b, ids, codes, *rest):
        return b(ops.Embedding, ids, b(ops.Dequantize, codes, *rest, dtype=DType.bf16))

    types = [((B, S), "i64"), *codes_of(kind, 50, k, group, "f16")]
    native = Native(kernel_of(build, *types), target)
    assert native.device or native.code.tasks.free_symbols == {B, S}
    tables = [random_array(rng, shape, dtype) for shape, dtype in types[1:]]
    for b, s in ((1, 1), (2, 7)):
        check(native, [rng.integers(0, 50, (b, s)), *tables])


@each_target
def test_a_slice_of_nibbles_that_starts_in_a_byte(target, rng):
    def build(b, codes, scale):
        return b(ops.Slice, b(ops.Dequantize, codes, scale), (0, 3), (B, 40), (1, 1))

    native = Native(kernel_of(build, ((B, 64), "i4"), ((B, 1), "f32")), target)
    check(native, [random_array(rng, (3, 64), "i4"), random_array(rng, (3, 1), "f32")])


@each_target
@pytest.mark.parametrize("kind", ["f8e4m3", "f8e5m2", "f4e2m1", "f8e8m0"])
def test_every_narrow_float(target, kind):
    count = 1 << DType(kind).bits
    numbers = np.arange(count, dtype=np.uint8).view(DType(kind).np)
    if kind == "f8e8m0":
        types = [((count, 1), "i8"), ((count, 1), kind)]
        native = Native(kernel_of(lambda b, *args: b(ops.Dequantize, *args), *types), target)
        inputs = [np.ones((count, 1), np.int8), numbers[:, None]]
    else:
        native = Native(kernel_of(lambda b, *args: b(ops.Dequantize, *args), ((2, count), kind), ((2, 1), "f32")), target)
        inputs = [np.stack([numbers, numbers[::-1]]), np.ones((2, 1), np.float32)]
    np.testing.assert_array_equal(native(inputs)[0], expected(native.kernel, inputs)[0])


@each_target
@pytest.mark.parametrize(("kind", "rows", "group"), [("u4", 1, 32), ("u3", 50, 0), ("u2", 1, 0)])
def test_embedding_of_a_table_that_is_looked_up(target, kind, rows, group, rng):
    def build(b, ids, codes, *rest):
        return b(ops.Embedding, ids, b(ops.Lookup, codes, *rest, dtype=DType.bf16))

    types = [((B, S), "i64"), ((50, 96), kind), ((rows, 1 << DType(kind).bits), "f16")]
    types += [((50, 96 // group), "f32")] if group else []
    native = Native(kernel_of(build, *types), target)
    tables = [random_array(rng, shape, dtype) for shape, dtype in types[1:]]
    check(native, [rng.integers(0, 50, (2, 7)), *tables])


@each_target
@pytest.mark.parametrize("kind", ["u4", "i4"])
def test_expand(target, kind, rng):
    def build(b, codes, scale, step, *zero):
        return b(ops.Dequantize, b(ops.Expand, codes, step, *zero), scale)

    zero = [((B, 3), "u8")] if kind == "u4" else []
    types = [((B, 96), kind), ((B, 1), "f32"), ((B, 3), "u8"), *zero]
    native = Native(kernel_of(build, *types), target)
    inputs = [random_array(rng, tuple(5 if d == B else d for d in shape), dtype) for shape, dtype in types]
    inputs[2:] = [rng.integers(0, 40, a.shape).astype(np.uint8) for a in inputs[2:]]
    check(native, inputs)


def test_no_result_of_four_bits():
    assert "a result of i4" in EMITTER.match(kernel_of(lambda b, x: b(ops.Reshape, x, (8,)), ((2, 4), "i4")), TARGETS[0])
