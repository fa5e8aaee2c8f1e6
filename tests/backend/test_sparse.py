"""Kernels of sparse layers against the interpreter, over ragged shapes and all counts of rows."""

import numpy as np
import pytest

from tests.backend.harness import assert_close
from tests.backend.loops_harness import kernel_of
from tests.backend.test_mlir_linear_codes import named
from tilewright.codegen.emitters import emitter
from tilewright.codegen.mlir.sparse_emitter import SparseSchedule
from tilewright.codegen.standalone import StandaloneKernel
from tilewright.ir import Builder, CodegenError, DType, Function, Module, Value, interpret, ops, sym

SPARSE = emitter("mlir.sparse")
B = sym("B")


def kernel(n: int, k: int, r: int, x: str, values: str, columns: str) -> Function:
    def body(b: Builder, *operands: Value) -> Value:
        return b.add(ops.SparseLinear(*operands))

    return kernel_of(body, ((B, 2, k), x), ((n, r), values), ((n, r), columns))


def check(function: Function, where: str, schedule: SparseSchedule | None = None, tolerance: float = 1e-5) -> None:
    compiled, rng = StandaloneKernel(function, named(where), SPARSE, schedule), np.random.default_rng(0)
    module = Module("m", dims={"B": (1, 1 << 20)})
    module.add(function)
    x, values, columns = function.args
    k, shape = int(x.shape[-1]), tuple(map(int, values.shape))
    for b in (1, 2, 3, 8, 21):  # twice as many rows
        operands = [
            rng.standard_normal((b, 2, k)).astype(x.dtype.np),
            rng.standard_normal(shape).astype(values.dtype.np),
            rng.integers(0, k, shape).astype(columns.dtype.np),
        ]
        assert_close(compiled(operands, {"B": b})[0], interpret(module, "k", operands)[0], tolerance)


@pytest.mark.parametrize("where", ["x86-64-v3", "native"])
@pytest.mark.parametrize(("n", "k", "r"), [(37, 65, 3), (16, 1, 1), (256, 32, 5), (100, 257, 1), (1, 7, 7), (300, 40, 2)])
def test_ragged_shapes(where: str, n: int, k: int, r: int) -> None:
    check(kernel(n, k, r, "f32", "f32", "i16"), where)


@pytest.mark.parametrize("where", ["x86-64-v3", "native"])
@pytest.mark.parametrize(("x", "values", "columns"),
                         [("bf16", "bf16", "i16"), ("f32", "bf16", "i32"), ("f16", "f16", "i16")])  # fmt: skip
def test_element_types(where: str, x: str, values: str, columns: str) -> None:
    check(kernel(70, 97, 4, x, values, columns), where, tolerance=1e-5 if x == "f32" else 2.0**-7)


def test_every_schedule_computes_the_same() -> None:
    function = kernel(600, 33, 2, "f32", "f32", "i16")
    for schedule in SPARSE.space(function, named("native"), {"B": 4}):
        check(function, "native", schedule)


def test_what_is_refused() -> None:
    def computed(b: Builder, x: Value, values: Value, columns: Value) -> Value:
        return b.add(ops.SparseLinear(b.add(ops.Neg(x)), values, columns))

    types = (((B, 8), "f32"), ((4, 2), "f32"), ((4, 2), "i16"))
    assert SPARSE.match(kernel_of(computed, *types), named("native")) == "not one sparse linear layer alone"
    assert "f64" in (SPARSE.match(kernel(4, 8, 2, "f64", "f32", "i16"), named("native")) or "")
    with pytest.raises(CodegenError, match=r"mlir\.sparse cannot lower @k"):
        SPARSE.emit(kernel(4, 8, 2, "f64", "f32", "i16"), SparseSchedule(), named("native"), "k")


def test_columns_outside_have_no_meaning() -> None:
    module = Module("m", dims={"B": (1, 8)})
    module.add(kernel(2, 3, 1, "f32", "f32", "i16"))
    x, values = np.ones((1, 2, 3), np.float32), np.ones((2, 1), np.float32)
    with pytest.raises(Exception, match="outside the 3 of x"):
        interpret(module, "k", [x, values, np.array([[0], [3]], DType.i16.np)])
