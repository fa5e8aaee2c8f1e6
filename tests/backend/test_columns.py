"""Linear layers behind a threshold, compiled, against the interpreter: ragged shapes, all counts of rows and of zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tests.backend.harness import assert_close
from tests.backend.loops_harness import kernel_of
from tests.backend.test_mlir_linear_codes import named
from tilewright.codegen.emitters import choose, emitter
from tilewright.codegen.mlir.columns_spec import ColumnsSchedule
from tilewright.codegen.standalone import StandaloneKernel
from tilewright.ir import Builder, DType, Function, Module, Value, eval_dim, interpret, ops, sym

COLUMNS = emitter("mlir.columns")
B = sym("B")
WHERE = ["x86-64-v3", "x86-64-v4", "native"]
ROWS = (1, 2, 3, 19)
SMALL = ColumnsSchedule(rows=2, unroll=4)  # less to compile
Type = tuple[tuple, str]
Tail = Callable[..., Value]


def layer(x: Type, limits: Type, *weights: Type, parts: int = 1, by: bool = False, bias: bool = False,
          more: Sequence[Type] = (), tail: Tail | None = None) -> Function:  # fmt: skip
    """``linear(threshold(x), dequantize(*weights))``, gated with 2 ``parts``; ``tail(b, y, *more)`` goes on from there."""
    n = weights[0][0][0]
    types = [x, limits, *([x] if by else []), *list(weights) * parts, *([((n,), x[1])] * parts if bias else []), *more]

    def body(b: Builder, x: Value, limits: Value, *rest: Value) -> Value:
        given = list(rest)
        value = b.add(ops.Threshold(x, limits, given.pop(0) if by else None))
        each = [[given.pop(0) for _ in weights] for _ in range(parts)]
        factors = [part[0] if len(part) == 1 else b.add(ops.Dequantize(*part)) for part in each]
        biases = [given.pop(0) for _ in factors] if bias else []
        if parts == 2:
            y = b.add(ops.GatedLinear(value, *factors, *biases, act="silu"))
        else:
            y = b.add(ops.Linear(value, *factors, *biases))
        return tail(b, y, *given) if tail else y

    return kernel_of(body, *types)


def operands(kernel: Function, rows: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Normal numbers, codes over their whole range, limits that about half of x reaches."""
    made = []
    for value in kernel.args:
        shape = [rows if d == B else int(d) for d in value.shape]
        if value.dtype.is_int:
            most = 1 << value.dtype.bits - 1
            made.append(rng.integers(-most, most, shape).astype(value.dtype.np))
            continue
        numbers = rng.standard_normal(shape)
        numbers = np.abs(numbers) * (2 if isinstance(next(iter(value.users)), ops.Threshold) else 1 / 50) \
            if value.name == "a1" or isinstance(next(iter(value.users)), ops.Dequantize) else numbers  # fmt: skip
        made.append(numbers.astype(value.dtype.np))
    return made


def check(kernel: Function, where: str, schedule: ColumnsSchedule | None = SMALL, rows: Sequence[int] = ROWS,
          change: Callable[[list[np.ndarray]], None] | None = None) -> None:  # fmt: skip
    """The code agrees with the interpreter; ``change`` makes the operands special."""
    target = named(where)
    assert choose(kernel, target) is COLUMNS
    compiled, rng = StandaloneKernel(kernel, target, COLUMNS, schedule), np.random.default_rng(0)
    module = Module("m", dims={"B": (1, 1 << 20)})
    module.add(kernel)
    tolerance = {"bf16": 2**-8, "f16": 2**-10}.get(kernel.returns[0].dtype.value, 1e-5)
    for count in rows:
        given = operands(kernel, count, rng)
        if change:
            change(given)
        for got, want in zip(compiled(given, {"B": count}), interpret(module, "k", given)):
            assert_close(got, want, tolerance)


def codes(n: int, k: int, dtype: str, groups: int = 1) -> list[Type]:
    return [((n, k), dtype), ((n, groups), "f32")]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_floats_of_ragged_shapes(where: str, dtype: str) -> None:
    for n, k in ((1, 1), (300, 530)):
        check(layer(((B, k), dtype), ((1,), "f32"), ((n, k), dtype)), where)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_schedule_by_rule(dtype: str) -> None:
    check(layer(((B, 97), dtype), ((97,), "f32"), ((70, 97), dtype)), "native", None, rows=(1, 2, 3, 4, 5))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("x", "dtype", "groups"),
                         [("f32", "i8", 1), ("bf16", "i8", 5), ("f32", "i4", 1), ("bf16", "i4", 20)])  # fmt: skip
def test_codes(where: str, x: str, dtype: str, groups: int) -> None:
    check(layer(((B, 640), x), ((640,), "f32"), *codes(200, 640, dtype, groups)), where, rows=(1, 2, 9))


@pytest.mark.parametrize("where", WHERE)
def test_gated_with_biases(where: str) -> None:
    check(layer(((B, 700), "bf16"), ((700,), "f32"), ((150, 700), "bf16"), parts=2, bias=True), where, rows=(1, 7))


@pytest.mark.parametrize("where", ["x86-64-v3", "native"])
def test_gated_codes_in_groups(where: str) -> None:
    one = ColumnsSchedule(rows=1, unroll=2)
    check(layer(((B, 640), "bf16"), ((1,), "f32"), *codes(150, 640, "i4", 5), parts=2), where, one, rows=(1, 7))


@pytest.mark.parametrize("where", WHERE)
def test_by_other_numbers_and_an_epilogue(where: str) -> None:
    def tail(b: Builder, y: Value, row: Value, whole: Value) -> Value:
        return b.add(ops.Add(b.add(ops.Silu(b.add(ops.Mul(y, row)))), whole))

    more = (((70,), "f32"), ((B, 2, 70), "f32"))
    check(layer(((B, 2, 96), "f32"), ((96,), "f32"), ((70, 96), "f32"), by=True, bias=True, more=more, tail=tail), where)


@pytest.mark.parametrize("where", ["x86-64-v3", "native"])
@pytest.mark.parametrize("limit", [0.0, np.inf, np.nan])
def test_all_or_nothing_counts(where: str, limit: float) -> None:
    def change(given: list[np.ndarray]) -> None:
        given[1][...] = limit

    check(layer(((B, 320), "bf16"), ((1,), "f32"), *codes(70, 320, "i4", 5)), where, rows=(1, 2, 6), change=change)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_count(special: float) -> None:
    """A NaN and infinities are never left out."""

    def change(given: list[np.ndarray]) -> None:
        given[0][-1, 5] = special

    kernel = layer(((B, 96), "f32"), ((1,), "f32"), ((40, 96), "f32"))
    compiled, rng = StandaloneKernel(kernel, named("native"), schedule=SMALL), np.random.default_rng(0)
    module = Module("m", dims={"B": (1, 64)})
    module.add(kernel)
    for rows in (1, 2, 6):
        given = operands(kernel, rows, rng)
        change(given)
        (got,), (want,) = compiled(given, {"B": rows}), interpret(module, "k", given)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["x86-64-v3", "native"])
def test_weights_of_what_does_not_count_are_not_read(where: str) -> None:
    """A NaN among them would be seen."""

    def change(given: list[np.ndarray]) -> None:
        given[0][:, ::3] = 0.25
        given[1][...] = 0.5
        given[2][:, ::3] = np.nan

    kernel = layer(((B, 300), "f32"), ((1,), "f32"), ((130, 300), "f32"))
    compiled, rng = StandaloneKernel(kernel, named(where), schedule=SMALL), np.random.default_rng(0)
    for rows in (1, 2):
        given = operands(kernel, rows, rng)
        change(given)
        (got,) = compiled(given, {"B": rows})
        x, _, weight = given
        kept = np.where(np.abs(x) >= 0.5, x, 0)
        assert_close(got, kept @ np.nan_to_num(weight).T, 1e-5)


def test_a_constant_limit() -> None:
    def body(b: Builder, x: Value, w: Value) -> Value:
        return b.add(ops.Linear(b.add(ops.Threshold(x, b.add(ops.Full((), 0.5, DType.f32)))), w))

    check(kernel_of(body, ((B, 40), "f32"), ((30, 40), "f32")), "native")


@pytest.mark.parametrize("seed", range(4))
def test_every_schedule_computes_the_same(seed: int) -> None:
    kernel = layer(((B, 640), "f32"), ((1,), "f32"), ((600, 640), "f32"))
    space = COLUMNS.space(kernel, named("native"), {"B": 3})
    assert space.default in space
    check(kernel, "native", space.sample(np.random.default_rng(seed)), rows=(1, 3, 5))


def test_layouts_and_features_are_true() -> None:
    kernel, target = layer(((B, 640), "bf16"), ((1,), "f32"), *codes(600, 640, "i8")), named("native")
    schedule = COLUMNS.default_schedule(kernel, target)
    code = COLUMNS.emit(kernel, schedule, target, "k")
    assert code.packing == COLUMNS.layouts(kernel, target)(schedule)
    assert code.packing[2].startswith("columns{")
    assert COLUMNS.features(kernel, target, {"B": 1})(schedule)["tasks"] == eval_dim(code.tasks, {"B": 1})


@pytest.mark.parametrize(("kernel", "reason"), [
    (kernel_of(lambda b, x, w: b.add(ops.Linear(x, w)), ((B, 8), "f32"), ((4, 8), "f32")), "no threshold"),
    (layer(((B, 64), "f32"), ((1,), "f32"), ((4, 64), "u4"), ((4, 1), "f32"), ((4, 1), "u8")), "that are coded so"),
    (layer(((B, 64), "f32"), ((1,), "f32"), ((4, 64), "f8e4m3"), ((4, 1), "f32")), "that are coded so"),
    (kernel_of(lambda b, x, t, by, w: b.add(ops.Linear(b.add(ops.Threshold(x, t, by)), w)),
               ((B, 8), "f32"), ((1,), "f32"), ((1, 8), "f32"), ((4, 8), "f32")), "what is compared"),
])  # fmt: skip
def test_what_is_refused(kernel: Function, reason: str) -> None:
    assert reason in (COLUMNS.match(kernel, named("native")) or "")
