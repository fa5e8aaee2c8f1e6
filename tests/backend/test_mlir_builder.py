"""The kernel builder: control flow, memory, casts, and the code they become."""

import ml_dtypes
import numpy as np
import pytest

from tests.backend.mlir_helpers import TARGETS, library_calls, target
from tilewright.codegen.mlir.builder import Kernel, constant
from tilewright.codegen.mlir.lower import assembly
from tilewright.codegen.mlir.native import NativeKernel, aligned, numpy_dtype


def test_loop_carries_values() -> None:
    with Kernel("k", target("x86-64-v3"), ("N",), [("x", "i64"), ("y", "i64")]) as kernel:
        x, y = kernel.buffers
        with kernel.loop(0, kernel.dims["N"], carry=[constant(0, "i64"), constant(1, "i64")]) as loop:
            total, product = loop.values
            value = x.load(loop.index)
            loop.next(total + value, product * value)
        for index, value in enumerate(loop.results):
            y.store(value, index)
    x, y = aligned(5, "i64"), aligned(2, "i64")
    x[:] = [3, 1, 4, 1, 5]
    NativeKernel(kernel)(0, 1, (5,), (x, y))
    assert y.tolist() == [14, 60]


def test_a_carrying_loop_must_hand_on() -> None:
    with (pytest.raises(RuntimeError, match=r"must end with loop\.next"),
          Kernel("k", target("x86-64-v3")) as kernel, kernel.loop(0, 3, carry=[constant(0)])):
        pass


def test_branch_and_when() -> None:
    with Kernel("k", target("x86-64-v3"), (), [("y", "i32")]) as kernel:
        (y,) = kernel.buffers
        with kernel.loop(kernel.begin, kernel.end) as loop:
            i = loop.index
            (value,) = kernel.branch(i < 2, lambda: [constant(10, "i32")], lambda: [i.to("i32") * i.to("i32")])
            with kernel.when(i.ne(3)):
                y.store(value, i)
    y = aligned(5, "i32", fill=-1)
    NativeKernel(kernel)(0, 5, (), (y,))
    assert y.tolist() == [10, 10, 4, -1, 16]


def test_inner_function_and_scratch() -> None:
    with Kernel("k", target("x86-64-v3"), (), [("y", "f32")]) as kernel:
        (y,) = kernel.buffers
        store = kernel.scratch(16, "f32")
        with kernel.function("fill", (store,), numbers=2) as fill:
            (memory,), (start, count) = fill.buffers, fill.numbers
            with kernel.loop(0, count) as loop:
                memory.store((start + loop.index).to("f32"), loop.index)
        fill((store,), (kernel.begin, 8))
        y.store(store.load(0, 8) * 2.0, 0)
    y = aligned(8, "f32")
    NativeKernel(kernel)(5, 6, (), (y,))
    assert y.tolist() == [2.0 * (5 + i) for i in range(8)]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "i8", "i32", "i64", "bool"])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 15, 16, 40])
def test_masked_copy_touches_only_its_lanes(name: str, dtype: str, count: int) -> None:
    with Kernel("k", target(name), (), [("x", dtype), ("y", dtype)]) as kernel:
        x, y = kernel.buffers
        mask = kernel.mask(kernel.end, 16)
        y.store(x.load(0, 16, mask), 0, mask)
    x, y = aligned(16, dtype, fill=1), aligned(16, dtype)
    NativeKernel(kernel)(0, count, (), (x, y))
    assert y.astype(np.float32).tolist() == [1.0 if i < count else 0.0 for i in range(16)]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("lanes", [0, 8, 16])
def test_round_to_bf16_is_to_nearest_even(name: str, lanes: int) -> None:
    with Kernel("k", target(name), (), [("x", "f32"), ("y", "bf16")]) as kernel:
        x, y = kernel.buffers
        with kernel.loop(0, kernel.end, max(lanes, 1)) as loop:
            y.store(x.load(loop.index, lanes).to("bf16"), loop.index)
    bits = np.random.default_rng(0).integers(0x00800000, 0x7F800000, 4096, dtype=np.uint32)
    bits[:2048] = bits[:2048] & 0xFFFF0000 | 0x8000  # ties
    x, y = aligned(4096, "f32"), aligned(4096, "bf16")
    x[:] = bits.view(np.float32)
    x[:4] = [np.nan, np.inf, -np.inf, 0]
    NativeKernel(kernel)(0, 4096, (), (x, y))
    expected = x.astype(ml_dtypes.bfloat16)
    assert np.array_equal(y[1:].view(np.uint16), expected[1:].view(np.uint16))
    assert np.isnan(y[0])


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("source", "result"), [
    ("bf16", "f32"), ("f16", "f32"), ("f32", "f16"), ("i8", "f32"), ("u8", "f32"), ("f32", "i8"), ("f32", "i64"),
    ("i64", "f32"), ("i32", "bool"), ("bool", "f32"), ("f32", "f64"), ("f64", "bf16"), ("i8", "i64"), ("i64", "i16"),
    ("f16", "bf16"),
])
def test_casts(name: str, source: str, result: str) -> None:
    with Kernel("k", target(name), (), [("x", source), ("y", result)]) as kernel:
        x, y = kernel.buffers
        y.store(x.load(0, 8).to(result), 0)
        y.store(x.load(8).to(result), 8)
    low = 0 if source in ("u8", "bool") else -100
    x, y = aligned(9, source, fill=None), aligned(9, result)
    x[:] = np.linspace(low, 120, 9).astype(numpy_dtype(source))
    NativeKernel(kernel)(0, 1, (), (x, y))
    assert np.array_equal(y, x.astype(numpy_dtype(result)))


def test_signed_division_rounds_down() -> None:
    with Kernel("k", target("x86-64-v3"), (), [("x", "i32"), ("d", "i32"), ("y", "i32")]) as kernel:
        x, d, y = kernel.buffers
        y.store(x.load(0, 8) // d.load(0, 8), 0)
        y.store(x.load(0, 8) % d.load(0, 8), 8)
    x, d, y = (aligned(n, "i32") for n in (8, 8, 16))
    x[:], d[:] = [7, -7, 7, -7, 6, -6, 0, 1], [2, 2, -2, -2, 3, 3, 5, -5]
    NativeKernel(kernel)(0, 1, (), (x, d, y))
    assert y[:8].tolist() == (x // d).tolist()
    assert y[8:].tolist() == (x % d).tolist()


def test_dtypes_never_mix_silently() -> None:
    with (pytest.raises(TypeError, match=r"operands differ: <f32> and <i32>; cast one"),
          Kernel("k", target("x86-64-v3"))):
        constant(1.0, "f32") + constant(1, "i32")


def test_kernels_do_not_nest() -> None:
    with (Kernel("outer", target("x86-64-v3")), pytest.raises(RuntimeError, match="outer is still being built"),
          Kernel("inner", target("x86-64-v3"))):
        pass


def test_bf16_without_instructions_calls_no_library() -> None:
    with Kernel("k", target("x86-64-v3"), (), [("x", "bf16")]) as kernel:
        (x,) = kernel.buffers
        x.store((x.load(0, 16).to("f32") * 2.0).to("bf16"), 0)
        x.store((x.load(16).to("f32") * 2.0).to("bf16"), 16)
    assert not library_calls(assembly(kernel))
