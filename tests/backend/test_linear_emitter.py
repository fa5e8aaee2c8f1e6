"""Kernels around quantized linear layers, from IR to code, against the interpreter."""

from collections.abc import Callable

import numpy as np
import pytest

from tests.backend.harness import assert_close
from tests.backend.loops_harness import kernel_of
from tests.backend.test_mlir_linear_codes import NARROW_FLOATS, WEIGHTS, named, random_codes
from tilewright.codegen.emitters import emitter
from tilewright.codegen.mlir.linear_spec import LinearSpec
from tilewright.codegen.schedule import LinearSchedule
from tilewright.codegen.standalone import StandaloneKernel
from tilewright.codegen.target import parse_target
from tilewright.ir import Builder, CodegenError, DType, Function, Module, Value, interpret, ops, sym

LINEAR = emitter("mlir.linear")
B, N, K = sym("B"), 70, 96
BF16 = DType.bf16
X, ROWS = ((B, 3, K), "i8"), ((B, 3, 1), "f32")


def sample(value: Value, b: int, rng: np.random.Generator) -> np.ndarray:
    """Codes over their whole range, scales that are positive, other numbers normal."""
    shape, kind = [b if d == B else int(d) for d in value.shape], value.dtype.value
    if any(isinstance(op, ops.Expand) and op.scale is value for op in value.users):
        return rng.integers(1, 17, shape).astype(np.uint8)
    if kind == "f8e8m0":
        return rng.integers(118, 124, shape).astype(np.uint8).view(value.dtype.np)
    if kind in (*WEIGHTS, *NARROW_FLOATS):
        return random_codes(rng, kind, tuple(shape))
    numbers = rng.standard_normal(shape)
    return (np.abs(numbers) / 50 if value.shape[-1] in (1, 3) else numbers).astype(value.dtype.np)


def check(kernel: Function, where: str, tolerance: float = 1e-5) -> None:
    """The code agrees with the interpreter, for one row and for many."""
    assert LINEAR.match(kernel, named(where)) is None
    compiled, rng = StandaloneKernel(kernel, named(where)), np.random.default_rng(0)
    module = Module("m", dims={"B": (1, 1 << 20)})
    module.add(kernel)
    for b in (1, 9):
        operands = [sample(arg, b, rng) for arg in kernel.args]
        for got, want in zip(compiled(operands, {"B": b}), interpret(module, "k", operands)):
            assert_close(got, want, tolerance)


def dynamic(*weight: tuple, more: tuple = (), build: Callable[..., Value] | None = None) -> Function:
    """``linear(dequantize(x), dequantize(weight))``; ``build(b, y, *more)`` goes on from there."""

    def body(b: Builder, x: Value, xs: Value, *rest: Value) -> Value:
        w, extra = rest[:len(weight)], rest[len(weight):]
        y = b.add(ops.Linear(b.add(ops.Dequantize(x, xs)), b.add(ops.Dequantize(*w))))
        return build(b, y, *extra) if build else y

    return kernel_of(body, X, ROWS, *weight, *more)


WHERE = ["x86-64-v3", "native"]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("weight", [
    [((N, K), "i8"), ((N, 1), "f32")], [((N, K), "i4"), ((N, 3), "f16")],
    [((N, K), "u8"), ((N, 3), "f32"), ((N, 3), "u8")], [((N, K), "u4"), ((N, 1), "f16"), ((N, 1), "u8")]])
def test_int8_activations(where: str, weight: list) -> None:
    check(dynamic(*weight), where)


@pytest.mark.parametrize("where", WHERE)
def test_float_activations(where: str) -> None:
    def body(b: Builder, x: Value, w: Value, ws: Value) -> Value:
        return b.add(ops.Linear(x, b.add(ops.Dequantize(w, ws))))

    for x in ("bf16", "f16", "f32"):
        kernel = kernel_of(body, ((B, K), x), ((N, K), "i4"), ((N, 3), "f16"))
        check(kernel, where, {"bf16": 2**-8, "f16": 2**-11}.get(x, 1e-5))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("weight", [
    [((N, K), "i3"), ((N, 3), "f16")], [((N, K), "u2"), ((N, 3), "f16"), ((N, 3), "u8")], [((N, K), "i2"), ((N, 1), "f32")],
    [((N, K), "f8e4m3"), ((N, 1), "f32")], [((N, K), "f4e2m1"), ((N, 3), "f8e8m0")]])
def test_narrow_codes(where: str, weight: list) -> None:
    def body(b: Builder, x: Value, *rest: Value) -> Value:
        return b.add(ops.Linear(x, b.add(ops.Dequantize(*rest))))

    check(kernel_of(body, ((B, K), "bf16"), *weight), where, 2**-8)
    if not weight[0][1].startswith("f"):
        check(dynamic(*weight), where)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("scale", [[], [((N, 3), "f16")]])
def test_lookup_in_one_table(where: str, scale: list) -> None:
    def body(b: Builder, x: Value, *rest: Value) -> Value:
        return b.add(ops.Linear(x, b.add(ops.Lookup(*rest))))

    check(kernel_of(body, ((B, K), "bf16"), ((N, K), "u4"), ((1, 16), "f32"), *scale), where, 2**-8)


@pytest.mark.parametrize("where", WHERE)
def test_codes_with_an_offset(where: str) -> None:
    def body(b: Builder, x: Value, codes: Value, scale: Value, offset: Value) -> Value:
        return b.add(ops.Linear(x, b.add(ops.Dequantize(codes, scale, offset=offset))))

    check(kernel_of(body, ((B, K), "bf16"), ((N, K), "u4"), ((N, 3), "f32"), ((N, 3), "f32")), where, 2**-8)


@pytest.mark.parametrize("where", WHERE)
def test_lookup_in_a_table_of_the_row(where: str) -> None:
    def body(b: Builder, x: Value, *rest: Value) -> Value:
        gate, up = b.add(ops.Lookup(*rest[:2])), b.add(ops.Lookup(*rest[2:]))
        return b.add(ops.GatedLinear(x, gate, up))

    weight = [((N, K), "u3"), ((N, 8), "f16")]
    check(kernel_of(body, ((B, K), "bf16"), *weight, *weight), where, 2**-8)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("zero", [[], [((N, 3), "u8")]])
def test_two_levels_of_scales(where: str, zero: list) -> None:
    def body(b: Builder, x: Value, xs: Value, codes: Value, scale: Value, step: Value, *rest: Value) -> Value:
        weight = b.add(ops.Dequantize(b.add(ops.Expand(codes, step, *rest)), scale))
        return b.add(ops.Linear(b.add(ops.Dequantize(x, xs)), weight))

    codes = ((N, K), "u4" if zero else "i4")
    check(kernel_of(body, X, ROWS, codes, ((N, 1), "f32"), ((N, 3), "u8"), *zero), where)


def test_steps_that_are_too_large() -> None:
    packing = LinearSpec(4, 64, "i8", "u4", expands=32).step_packing(LinearSchedule(), parse_target("x86-64-v3"), 17)
    with pytest.raises(CodegenError, match=r"a step of 40 in .*at most 17"):
        packing.pack(np.full((4, 2), 40, np.uint8))


@pytest.mark.parametrize("where", WHERE)
def test_trailing_cast_and_residual(where: str) -> None:
    def tail(b: Builder, y: Value, residual: Value) -> Value:
        return b.add(ops.Add(b.add(ops.Cast(y, BF16)), residual))

    weight = [((N, K), "i4"), ((N, 3), "f16")]
    check(dynamic(*weight, more=[((B, 3, N), "bf16")], build=tail), where, 2**-8)


@pytest.mark.parametrize("where", WHERE)
def test_gated_with_biases(where: str) -> None:
    def body(b: Builder, x: Value, xs: Value, g: Value, gs: Value, u: Value, us: Value, gb: Value, ub: Value) -> Value:
        gate, up = b.add(ops.Dequantize(g, gs)), b.add(ops.Dequantize(u, us))
        return b.add(ops.Cast(b.add(ops.GatedLinear(b.add(ops.Dequantize(x, xs)), gate, up, gb, ub)), BF16))

    weight, bias = [((N, K), "i8"), ((N, 1), "f32")], ((N,), "f32")
    check(kernel_of(body, X, ROWS, *weight, *weight, bias, bias), where, 2**-8)


def reason(kernel: Function) -> str:
    return LINEAR.match(kernel, parse_target("x86-64-v3")) or ""


def test_refusals_say_why() -> None:
    def narrow(b: Builder, x: Value, w: Value, ws: Value) -> Value:
        return b.add(ops.Linear(x, b.add(ops.Dequantize(w, ws, dtype=BF16))))

    def grouped(b: Builder, x: Value, xs: Value, w: Value, ws: Value) -> Value:
        return b.add(ops.Linear(b.add(ops.Dequantize(x, xs)), b.add(ops.Dequantize(w, ws))))

    i8, scale = ((N, K), "i8"), ((N, 1), "f32")
    assert "sums are made of unrounded numbers" in reason(kernel_of(narrow, ((B, K), "bf16"), i8, scale))
    assert "not i8 with one f32 scale a row" in reason(kernel_of(grouped, X, ((B, 3, 3), "f32"), i8, scale))
    assert "groups of 12 do not divide K = 96 into multiples of 8" in reason(dynamic(((N, K), "i4"), ((N, 8), "f16")))
    assert "int8 activations with f8e5m2 weights" in reason(dynamic(((N, K), "f8e5m2"), ((N, 1), "f32")))
