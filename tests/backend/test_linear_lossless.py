"""Kernels over compressed weights: what plain bf16 kernels give, bit for bit."""

import numpy as np
import pytest

from tests.backend.loops_harness import kernel_of
from tests.backend.test_mlir_linear_codes import named
from tilewright.codegen.emitters import emitter
from tilewright.codegen.mlir.linear_emitter import LinearEmitter
from tilewright.codegen.standalone import StandaloneKernel
from tilewright.ir import Builder, DType, Function, Value, ops, sym
from tilewright.ir.ops.lossless import SPARE
from tilewright.passes.compress import choose_base, compress, exponent_counts

B = sym("B")
BF16 = DType.bf16.np
ESCAPES = 4000


def compressed(weight: np.ndarray) -> tuple[np.ndarray, ...]:
    base, _ = choose_base(exponent_counts(weight))
    return compress(weight, base, ESCAPES)


def plain_kernel(n: int, k: int, count: int) -> Function:
    def body(b: Builder, x: Value, *weights: Value) -> Value:
        return b.add(ops.GatedLinear(x, *weights) if count == 2 else ops.Linear(x, *weights))

    return kernel_of(body, ((B, k), "bf16"), *[((n, k), "bf16")] * count)


def compressed_kernel(n: int, k: int, count: int) -> Function:
    def body(b: Builder, x: Value, *parts: Value) -> Value:
        each = [b.add(ops.Decompress(*parts[i : i + 5], rows=n, columns=k)) for i in range(0, 5 * count, 5)]
        return b.add(ops.GatedLinear(x, *each) if count == 2 else ops.Linear(x, *each))

    blocks, steps = -(-n // 16), -(-k // 4)
    parts = [((blocks, steps, 64), "u8"), ((blocks, steps, 3), "i64"), ((ESCAPES + SPARE,), "u8"), ((blocks,), "i32"),
             ((1,), "u8")]  # fmt: skip
    return kernel_of(body, ((B, k), "bf16"), *parts * count)


@pytest.mark.parametrize("where", ["x86-64-v3", "x86-64-v4", "native"])
@pytest.mark.parametrize(("n", "k", "count"), [(70, 97, 1), (16, 2, 1), (64, 128, 2), (33, 31, 2), (200, 600, 1)])
def test_results_are_those_of_plain_weights(where: str, n: int, k: int, count: int) -> None:
    rng = np.random.default_rng(n)
    weights = [(rng.standard_normal((n, k)) * 0.05).astype(BF16) for _ in range(count)]
    weights[0][0, 0], weights[0][-1, -1] = 0, 1e10
    plain, small = plain_kernel(n, k, count), compressed_kernel(n, k, count)
    schedule = LinearEmitter().default_schedule(plain, named(where))
    assert emitter("mlir.linear").match(small, named(where)) is None
    assert LinearEmitter().default_schedule(small, named(where)) == schedule
    whole, packed = StandaloneKernel(plain, named(where)), StandaloneKernel(small, named(where))
    for b in (1, 2, 7, 130):
        x = rng.standard_normal((b, k)).astype(BF16)
        (want,) = whole([x, *weights], {"B": b})
        (got,) = packed([x, *(p for w in weights for p in compressed(w))], {"B": b})
        assert np.array_equal(got.view(np.uint16), want.view(np.uint16))


def test_panels_hold_whole_blocks() -> None:
    """Schedules that the space offers can all be compiled."""
    kernel = compressed_kernel(70, 97, 1)
    target = named("x86-64-v3")
    space = LinearEmitter().space(kernel, target, {"B": 1})
    widths = {schedule.tile_v for schedule in space}  # type: ignore[attr-defined]
    assert widths
    assert all(width * target.lanes % 16 == 0 for width in widths)
