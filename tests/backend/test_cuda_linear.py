"""CUDA kernels around linear layers, on an emulated device, against the interpreter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from unittest import mock

import numpy as np
import pytest

from tests.backend.harness import assert_close
from tests.backend.loops_harness import _aligned, _Guarded, expected, kernel_of
from tests.backend.test_mlir_linear_codes import random_codes
from tests.cuda.emulator import Emulated
from tilewright.codegen.cuda.compile import Cubin
from tilewright.codegen.cuda.linear import CudaLinearEmitter
from tilewright.codegen.cuda.linear_schedule import CudaLinearSchedule
from tilewright.codegen.target import parse_target
from tilewright.ir import Builder, CodegenError, DType, Function, Value, eval_dim, ops, sym
from tilewright.ir.interpreter import bind_dims

LINEAR = CudaLinearEmitter()
AMPERE, HOPPER = parse_target("cuda{arch=sm_80}"), parse_target("cuda{arch=sm_90a}")
TOLERANCE = {"bf16": 2**-8, "f16": 2**-10, "f32": 1e-5}
B = sym("B")
ROWS = (1, 2, 3, 8, 9, 17, 70)
"""One of each range that has a function of its own, but for the last two."""


def sample(value: Value, dims: Mapping[str, int], rng: np.random.Generator) -> np.ndarray:
    """Codes over their whole range, scales that are positive, other numbers normal with a mean that is not 0."""
    shape, kind = [eval_dim(d, dims) for d in value.shape], value.dtype
    if kind is DType.f8e8m0:
        return rng.integers(118, 124, shape).astype(np.uint8).view(kind.np)
    if any(isinstance(op, ops.Expand) and op.scale is value for op in value.users):
        return rng.integers(1, 17, shape).astype(np.uint8)
    if kind.bits <= 8 and kind is not DType.bool:
        return random_codes(rng, kind.value, tuple(shape))
    if any(getattr(op, "scale", None) is value for op in value.users):
        return rng.uniform(0.002, 0.02, shape).astype(kind.np)
    return (rng.standard_normal(shape) + 0.2).astype(kind.np)


class Compiled:
    """A kernel on the emulated device, which takes its C: there is no cubin."""

    def __init__(self, kernel: Function, schedule: CudaLinearSchedule | None = None) -> None:
        assert LINEAR.match(kernel, AMPERE) is None
        self.kernel = kernel
        schedule = schedule or LINEAR.default_schedule(kernel, AMPERE)
        with mock.patch("tilewright.codegen.cuda.source.compile_source", return_value=Cubin(b"", {})):
            self.code = LINEAR.emit(kernel, schedule, AMPERE, "tw_k")
        self.device = Emulated(self.code)

    def check(self, rows: Sequence[int], tolerance: float | None = None) -> None:
        """The results are the interpreter's, whether copies are early or late, and nothing else is written."""
        for b in rows:
            rng = np.random.default_rng(b)
            inputs = [sample(arg, {"B": b}, rng) for arg in self.kernel.args]
            want = expected(self.kernel, inputs)[0]
            for self.device.late in (False, True):
                assert_close(self.run(inputs), want, tolerance or TOLERANCE.get(self.kernel.returns[0].dtype.value, 0))

    def run(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        dims = bind_dims(self.kernel.args, inputs)
        out = _Guarded(self.kernel.returns[0], dims)
        guard = out.surroundings()
        scratch = [np.full(eval_dim(size, dims), 0xFF, np.uint8) for size in self.code.scratch]
        self.device([*(_aligned(a, v.dtype) for a, v in zip(inputs, self.kernel.args)), out.array, *scratch], dims)
        assert out.surroundings() == guard, "wrote past the end"
        return out.array


Type = tuple[tuple, str]


def weight_types(n: int, k: int, kind: str, groups: int = 1, scale: str = "f32") -> list[Type]:
    """A plain weight, or codes with scales and what they need beside them."""
    if kind in TOLERANCE:
        return [((n, k), kind)]
    zero = [((n, groups), "u8")] if kind.startswith("u") else []
    return [((n, k), kind), ((n, groups), scale), *zero]


def made(b: Builder, parts: Sequence[Value]) -> Value:
    """A weight out of its parts."""
    return parts[0] if len(parts) == 1 else b.add(ops.Dequantize(*parts))


def layer(x: Type, weight: Sequence[Type], gated: str | None = None, biases: Sequence[Type] = (), more: Sequence[Type] = (),
          tail: Callable[..., Value] | None = None) -> Function:  # fmt: skip
    """x (codes come with scales), once or twice a weight, biases; ``tail(b, y, *more)`` goes on from there."""
    scales = [((*x[0][:-1], 1), "f32")] if x[1] == "i8" else []
    parts = 2 if gated else 1

    def body(b: Builder, *values: Value) -> Value:
        counts = [1 + len(scales), *[len(weight)] * parts, len(biases), len(more)]
        edges = np.cumsum([0, *counts])
        first, *weights, bias, extra = (values[i:j] for i, j in itertools.pairwise(edges))
        operands = [made(b, first), *(made(b, w) for w in weights), *bias]
        y = b.add(ops.GatedLinear(*operands, act=gated) if gated else ops.Linear(*operands))
        return tail(b, y, *extra) if tail else y

    return kernel_of(body, x, *scales, *weight * parts, *biases, *more)


N, K = 70, 192
FORMATS = {
    "bf16": ("bf16", weight_types(N, 136, "bf16")),
    "f16": ("f16", weight_types(N, K, "f16")),
    "f32": ("f32", weight_types(N, 75, "f32")),
    "bf16 not aligned": ("bf16", weight_types(37, 75, "bf16")),
    "i8": ("bf16", weight_types(N, 80, "i8")),
    "u8 groups": ("bf16", weight_types(N, K, "u8", 3, "f16")),
    "u8 groups f16": ("f16", weight_types(N, K, "u8", 3, "f16")),
    "i4 groups": ("bf16", weight_types(N, K, "i4", 6, "f16")),
    "i4 groups f16": ("f16", weight_types(N, K, "i4", 3)),
    "u4": ("bf16", weight_types(N, K, "u4")),
    "u4 groups f16": ("f16", weight_types(N, K, "u4", 6, "f16")),
    "i4 f32": ("f32", weight_types(N, K, "i4", 3, "f16")),
    "u4 odd groups": ("bf16", weight_types(N, K, "u4", 8, "f16")),
    "i3": ("bf16", weight_types(N, K, "i3", 3, "f16")),
    "u2": ("bf16", weight_types(N, 256, "u2", 4, "f16")),
    "f8e4m3": ("bf16", weight_types(N, K, "f8e4m3")),
    "f8e5m2 f16": ("f16", weight_types(N, K, "f8e5m2", 3)),
    "f4e2m1": ("bf16", weight_types(N, K, "f4e2m1", 6, "f8e8m0")),
    "i8 by i8": ("i8", weight_types(N, 144, "i8")),
    "i8 by u8": ("i8", weight_types(N, K, "u8")),
    "i8 by i4 groups": ("i8", weight_types(N, K, "i4", 6, "f16")),
    "i8 by u4 groups": ("i8", weight_types(N, K, "u4", 3, "f16")),
    "i8 by i2": ("i8", weight_types(N, 256, "i2", 4, "f16")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str) -> None:
    x, weight = FORMATS[name]
    k = weight[0][0][1]
    Compiled(layer(((B, k), x), weight)).check(ROWS)
    few = layer(((1, k), x), weight)
    code = LINEAR.emit(few, LINEAR.default_schedule(few, HOPPER), HOPPER, "tw_k")
    assert code.device.resources["tw_k_0"]["spills"] == 0


def test_many_rows_and_long_sums() -> None:
    """Both 4-bit codes that are symmetric and x of one sign: sums of what codes are raised by must not show."""
    kernel = layer(((B, 1024), "bf16"), weight_types(24, 1024, "i4", 8, "f16"))
    Compiled(kernel).check((1, 8, 70, 130, 600))


GATED = {
    "bf16": ("silu", "bf16", weight_types(N, 104, "bf16"), "bf16"),
    "u4 groups": ("gelu", "bf16", weight_types(N, K, "u4", 3, "f16"), "f32"),
    "i8 by i4 groups": ("gelu_tanh", "i8", weight_types(N, K, "i4", 3, "f16"), "f32"),
    "f32": ("relu", "f32", weight_types(N, 50, "f32"), "f32"),
    "no activation": ("none", "f16", weight_types(N, 64, "f16"), "f16"),
}


@pytest.mark.parametrize("name", GATED)
def test_gated_with_biases(name: str) -> None:
    act, x, weight, bias = GATED[name]
    kernel = layer(((B, weight[0][0][1]), x), weight, act, [((N,), bias)] * 2)
    Compiled(kernel).check((1, 5, 20, 70))


def test_offsets() -> None:
    def body(b: Builder, x: Value, codes: Value, scale: Value, offset: Value) -> Value:
        return b.add(ops.Linear(x, b.add(ops.Dequantize(codes, scale, offset=offset))))

    groups = ((N, 6), "f32")
    Compiled(kernel_of(body, ((B, K), "bf16"), ((N, K), "u4"), groups, groups)).check((1, 9, 70))


@pytest.mark.parametrize("tables", [1, N])
def test_tables(tables: int) -> None:
    def body(b: Builder, x: Value, *weight: Value) -> Value:
        return b.add(ops.Linear(x, b.add(ops.Lookup(*weight))))

    scale = [((N, 3), "f16")] if tables == 1 else []
    Compiled(kernel_of(body, ((B, K), "bf16"), ((N, K), "u4"), ((tables, 16), "f32"), *scale)).check((1, 9, 70))


def test_two_levels_of_scales() -> None:
    def body(b: Builder, x: Value, xs: Value, codes: Value, scale: Value, step: Value, zero: Value) -> Value:
        weight = b.add(ops.Dequantize(b.add(ops.Expand(codes, step, zero)), scale))
        return b.add(ops.Linear(b.add(ops.Dequantize(x, xs)), weight))

    codes = [((N, K), "u4"), ((N, 1), "f32"), ((N, 3), "u8"), ((N, 3), "u8")]
    Compiled(kernel_of(body, ((B, K), "i8"), ((B, 1), "f32"), *codes)).check((1, 9, 70))


# --- what comes after -------------------------------------------------------------------------------------------------


def residual(b: Builder, y: Value, r: Value) -> Value:
    return b.add(ops.Add(b.add(ops.Cast(y, DType.bf16)), r))


def busy(b: Builder, y: Value, scale: Value, mask: Value, turned: Value) -> Value:
    """Operands of several shapes, one of them read through a transposition."""
    y = b.add(ops.Mul(b.add(ops.Silu(y)), scale))
    y = b.add(ops.Where(mask, y, b.add(ops.Full(y.shape, -1.0, y.dtype))))
    return b.add(ops.Sub(y, b.add(ops.Transpose(turned, (1, 2, 0)))))


def test_cast_and_residual() -> None:
    weight = weight_types(N, K, "i4", 3, "f16")
    Compiled(layer(((B, 3, K), "i8"), weight, more=[((B, 3, N), "bf16")], tail=residual)).check((1, 3, 23), 2**-7)


@pytest.mark.parametrize("x", ["bf16", "f32"])
def test_busy_epilogue(x: str) -> None:
    more = [((N,), x), ((B, 1, 1), "bool"), ((N, B, 3), x)]
    kernel = layer(((B, 3, 40), x), weight_types(N, 40, x), biases=[((N,), x)], more=more, tail=busy)
    Compiled(kernel).check((1, 3, 6, 23), 2 * TOLERANCE[x])


def test_a_result_that_is_no_float() -> None:
    def tail(b: Builder, y: Value, limit: Value) -> Value:
        return b.add(ops.Gt(y, limit))

    Compiled(layer(((B, 64), "bf16"), weight_types(N, 64, "bf16"), more=[((1,), "bf16")], tail=tail)).check((1, 20))


# --- schedules --------------------------------------------------------------------------------------------------------

SAMPLED = {
    "bf16": lambda m: layer(((m, 264), "bf16"), weight_types(200, 264, "bf16")),
    "u4 groups": lambda m: layer(((m, 512), "bf16"), weight_types(120, 512, "u4", 4, "f16"), "silu"),
    "i8 by i4": lambda m: layer(((m, 256), "i8"), weight_types(200, 256, "i4", 4, "f16")),
    "f32": lambda m: layer(((m, 50), "f32"), weight_types(200, 50, "f32")),
}


@pytest.mark.parametrize("rows", [7, 25, 90, 515])
@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_schedules(name: str, rows: int) -> None:
    kernel = SAMPLED[name](rows)
    space = LINEAR.space(kernel, AMPERE, {})
    assert space.default in space
    Compiled(kernel, space.sample(np.random.default_rng(rows))).check((rows,))


@cache
def long() -> Function:
    return layer(((40, 2048), "bf16"), weight_types(48, 2048, "bf16"))


@pytest.mark.parametrize("fill", [0, 1])
def test_blocks_that_divide_k(fill: int) -> None:
    compiled = Compiled(long(), replace(LINEAR.default_schedule(long(), AMPERE), fill=fill))
    assert len(compiled.code.device.launches) == 1 + fill
    assert len(compiled.code.scratch) == fill
    compiled.check((40,))


def test_features_tell_schedules_apart() -> None:
    kernel = layer(((B, 4096), "bf16"), weight_types(4096, 4096, "i4", 32, "f16"), "silu")
    for rows, knobs in ((1, {"few_n": 32}), (40, {"some_stages": 2}), (2000, {"block_m": 64})):
        describe = LINEAR.features(kernel, HOPPER, {"B": rows})
        default = LINEAR.default_schedule(kernel, HOPPER)
        first, second = describe(default), describe(replace(default, **knobs))
        assert all(math.isfinite(x) for x in first.values())
        assert first.keys() == second.keys()
        assert first != second
        assert LINEAR.layouts(kernel, HOPPER)(default) == {}


def test_schedules_that_do_not_fit() -> None:
    kernel = SAMPLED["bf16"](600)
    deep = replace(LINEAR.default_schedule(kernel, HOPPER), block_k=128, stages=5)
    assert deep not in LINEAR.space(kernel, HOPPER, {})
    with pytest.raises(CodegenError, match="bytes of shared memory of 232448"):
        LINEAR.emit(kernel, deep, HOPPER, "tw_k")
    with pytest.raises(CodegenError, match="256 sums a thread, at most 128"):
        LINEAR.emit(kernel, replace(deep, block_m=256, block_n=256), HOPPER, "tw_k")


# --- the sizes that matter --------------------------------------------------------------------------------------------

SHAPES = {(4096, 4096): None, (14336, 4096): "silu", (4096, 14336): None, (128256, 4096): None}


@pytest.mark.parametrize("target", [AMPERE, HOPPER], ids=str)
@pytest.mark.parametrize("kind", ["bf16", "i4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_resources_of_defaults(shape: tuple[int, int], kind: str, target) -> None:
    n, k = shape
    kernel = layer(((B, k), "bf16"), weight_types(n, k, kind, k // 128, "f16"), SHAPES[shape])
    code = LINEAR.emit(kernel, LINEAR.default_schedule(kernel, target), target, "tw_k")
    for launch in code.device.launches:
        used = code.device.resources[launch.symbol]
        assert used["spills"] == 0
        assert 0 < used["registers"] * launch.block <= 65536
        assert launch.shared <= target.shared_bytes
    at_once = [target.shared_bytes // launch.shared for launch in code.device.launches[:4]]
    assert min(at_once) >= 2, "blocks of a few rows must overlap"


def reason(kernel: Function) -> str:
    return LINEAR.match(kernel, AMPERE) or ""


def test_refusals_say_why() -> None:
    def flat(b: Builder, y: Value) -> Value:
        return b.add(ops.Reshape(y, (B * N,)))

    def softmax(b: Builder, y: Value) -> Value:
        return b.add(ops.Softmax(y, 1))

    def narrow(b: Builder, x: Value, w: Value, ws: Value) -> Value:
        return b.add(ops.Linear(x, b.add(ops.Dequantize(w, ws, dtype=DType.bf16))))

    x, weight = ((B, 64), "bf16"), weight_types(N, 64, "bf16")
    assert "core.reshape after the layer is not elementwise" in reason(layer(x, weight, tail=flat))
    assert "nn.softmax after the layer is not elementwise" in reason(layer(x, weight, tail=softmax))
    assert "sums are made of unrounded numbers" in reason(kernel_of(narrow, x, ((N, 64), "i8"), ((N, 1), "f32")))
    with pytest.raises(CodegenError, match=r"cuda\.linear cannot lower"):
        LINEAR.emit(layer(x, weight, tail=flat), CudaLinearSchedule(), AMPERE, "tw_k")
