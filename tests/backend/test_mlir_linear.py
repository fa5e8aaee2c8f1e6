"""Linear kernels against numpy over dtypes, ragged sizes and targets."""

import dataclasses

import numpy as np
import pytest

from tests.backend.mlir_helpers import TARGETS, assert_close, library_calls, random_array, target
from tilewright.codegen.mlir.builder import Kernel
from tilewright.codegen.mlir.linear import LinearBuffers, emit_linear, linear_kernel
from tilewright.codegen.mlir.linear_spec import LinearSpec
from tilewright.codegen.mlir.lower import assembly, compile_kernel
from tilewright.codegen.mlir.native import NativeKernel, aligned
from tilewright.codegen.schedule import LinearSchedule
from tilewright.codegen.target import CpuTarget, parse_target

DTYPES = [
    ("f32", "f32", "f32"), ("bf16", "bf16", "bf16"), ("f32", "bf16", "f32"),
    ("f16", "f16", "f16"), ("bf16", "f32", "f32"),
]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@dataclasses.dataclass
class Case:
    """A compiled kernel with weights; ``run`` computes, ``expected`` is the exact result."""

    spec: LinearSpec
    target: CpuTarget
    schedule: LinearSchedule
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self.kernel = NativeKernel(linear_kernel("k", self.target, self.spec, self.schedule))
        self.exact = [random_array(self.rng, (self.spec.n, self.spec.k), self.spec.weight) for _ in range(self.spec.parts)]
        packing = self.spec.packing(self.schedule, self.target)
        self.packed = [packing.pack(weight, aligned(packing.shape, self.spec.weight)) for weight in self.exact]
        self.biases = [random_array(self.rng, self.spec.n, self.spec.bias) for _ in self.exact if self.spec.bias]

    def run(self, x: np.ndarray, pieces: int = 1) -> np.ndarray:
        m = len(x)
        y = aligned((m, self.spec.y_stride or self.spec.n), self.spec.out_dtype, fill=7)
        arrays = (x, *self.packed, *self.biases, y)
        tasks = self.spec.tasks(self.schedule, self.target, m)
        for piece in range(pieces):
            self.kernel(piece * tasks // pieces, (piece + 1) * tasks // pieces, (m,), arrays)
        return y

    def expected(self, x: np.ndarray) -> np.ndarray:
        sums = [x.astype(np.float64) @ weight.T.astype(np.float64) for weight in self.exact]
        sums = [total + bias.astype(np.float64) for total, bias in zip(sums, self.biases)] if self.biases else sums
        first = silu(sums[0]) if self.spec.activation == "silu" else sums[0]
        return first * sums[1] if self.spec.gated else first


def case(name: str, spec: LinearSpec, **knobs: int) -> Case:
    where = target(name)
    schedule = dataclasses.replace(LinearSchedule.default(where), **knobs)
    return Case(spec, where, schedule, np.random.default_rng(0))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("x", "weight", "out"), DTYPES)
def test_dtypes_and_rows(name: str, x: str, weight: str, out: str) -> None:
    """Every count of rows takes another path: one, a few, a tile, tiles and a remainder, several blocks."""
    subject = case(name, LinearSpec(n=150, k=67, x_dtype=x, weight=weight, out_dtype=out, bias=out))
    for m in (1, 2, 5, 6, 7, 97, 200):
        rows = random_array(subject.rng, (m, 67), x)
        assert_close(subject.run(rows), subject.expected(rows), out)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("x", "weight", "out"), DTYPES)
@pytest.mark.parametrize("wide", [False, True])
def test_a_row_is_the_same_among_any_others(name: str, x: str, weight: str, out: str, wide: bool) -> None:
    """To the bit: a token's logits do not depend on the batch, nor on how a prompt is cut into calls."""
    subject = case(name, LinearSpec(n=70, k=331, x_dtype=x, weight=weight, out_dtype=out), block_k=128,
                   tile_v=4 if wide and target(name).vector_bits == 512 else 2)  # fmt: skip
    rows = random_array(subject.rng, (110, 331), x)
    y = subject.run(rows)
    for begin, end in ((0, 1), (4, 6), (50, 53), (11, 15), (30, 37), (20, 45), (9, 110)):
        some = aligned((end - begin, 331), x)
        some[...] = rows[begin:end]
        assert np.array_equal(subject.run(some), y[begin:end])


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 16), (17, 15), (127, 129), (64, 1), (3, 700)])
def test_sizes(name: str, dtype: str, n: int, k: int) -> None:
    """Any N and K, also across several blocks of K."""
    subject = case(name, LinearSpec(n, k, dtype, dtype, dtype), block_k=256)
    for m in (1, 3, 16):
        rows = random_array(subject.rng, (m, k), dtype)
        assert_close(subject.run(rows), subject.expected(rows), dtype)


@pytest.mark.parametrize("name", TARGETS)
def test_gated(name: str) -> None:
    subject = case(name, LinearSpec(90, 64, "bf16", "bf16", "bf16", gated=True, activation="silu", bias="f32"))
    for m in (1, 9):
        rows = random_array(subject.rng, (m, 64), "bf16")
        assert_close(subject.run(rows), subject.expected(rows), "bf16")


def test_tasks_split_anywhere() -> None:
    subject = case("x86-64-v3", LinearSpec(100, 40), block_m=24)
    rows = random_array(subject.rng, (130, 40), "f32")
    assert np.array_equal(subject.run(rows), subject.run(rows, pieces=7))


def test_blocks_of_rows_that_are_no_whole_tiles() -> None:
    """Whole tiles in each block cover M before the last block: that one has nothing to do."""
    subject = case("native", LinearSpec(256, 1536, "bf16", "bf16", "bf16", bias="bf16"), tile_m=5, tile_v=2, block_m=48)
    x = random_array(subject.rng, (2048, 1536), "bf16")
    assert_close(subject.run(x), subject.expected(x), "bf16")


def test_a_nan_stays_in_its_row() -> None:
    """An odd K must not read its neighbour's numbers, not even to multiply them by zero."""
    subject = case("x86-64-v4+bf16", LinearSpec(20, 33, "bf16", "bf16", "f32"))
    rows = random_array(subject.rng, (3, 33), "bf16")
    rows[1] = np.nan
    y = subject.run(rows)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


def test_strides_and_offsets() -> None:
    """x may be a slice of wider rows, and so may y; the rest of y is left alone."""
    subject = case("x86-64-v3", LinearSpec(40, 24, x_stride=50, x_offset=5, y_stride=64, y_offset=10))
    wide = random_array(subject.rng, (9, 50), "f32")
    y = subject.run(wide)
    assert_close(y[:, 10:50], subject.expected(wide[:, 5:29]), "f32")
    assert (y[:, :10] == 7).all()
    assert (y[:, 50:] == 7).all()


@pytest.mark.parametrize("name", TARGETS)
def test_epilogue_sees_rows_columns_and_masks(name: str) -> None:
    """A residual added through the hook, from a further buffer."""
    where, spec = target(name), LinearSpec(37, 20)
    schedule = LinearSchedule.default(where)
    buffers = [("residual", "f32"), ("x", "f32"), ("w", "f32"), ("y", "f32")]
    with Kernel("k", where, ("M",), buffers) as kernel:
        residual, x, w, y = kernel.buffers

        def add(value, place):
            return value + residual.load(place.row * spec.n + place.col, place.lanes, place.mask)

        emit_linear(kernel, spec, schedule, kernel.dims["M"], LinearBuffers(x, [w], y=y), epilogue=add)
    rng = np.random.default_rng(1)
    rows, weight, extra = (random_array(rng, shape, "f32") for shape in ((5, 20), (37, 20), (5, 37)))
    result = aligned((5, 37), "f32")
    packing = spec.packing(schedule, where)
    packed = packing.pack(weight, aligned(packing.shape, "f32"))
    NativeKernel(kernel)(0, spec.tasks(schedule, where, 5), (5,), (extra, rows, packed, result))
    assert_close(result, rows.astype(np.float64) @ weight.T + extra, "f32")


@pytest.mark.parametrize(("x", "weight", "out"), DTYPES)
def test_avx2_code_has_no_wide_registers(x: str, weight: str, out: str) -> None:
    where = parse_target("x86-64-v3")
    kernel = linear_kernel("k", where, LinearSpec(50, 33, x, weight, out), LinearSchedule.default(where))
    code = assembly(kernel)
    assert "ymm" in code
    assert "zmm" not in code
    assert library_calls(code) <= {"memset"}


def test_code_is_deterministic() -> None:
    where = parse_target("x86-64-v4")
    spec, schedule = LinearSpec(50, 33, "bf16", "bf16", "bf16"), LinearSchedule.default(where)
    first, second = (compile_kernel(linear_kernel("k", where, spec, schedule)) for _ in range(2))
    assert first == second


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown activation 'swish'; known: .*silu"):
        LinearSpec(1, 1, activation="swish")
