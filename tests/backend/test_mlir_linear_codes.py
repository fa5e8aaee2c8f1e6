"""Linear kernels over quantized weights against integer arithmetic in numpy."""

import dataclasses
from functools import partial

import numpy as np
import pytest

from tests.backend.mlir_helpers import assert_close, library_calls, random_array, target
from tilewright.codegen.mlir.linear import linear_kernel
from tilewright.codegen.mlir.linear_codes import CODES
from tilewright.codegen.mlir.linear_expand import largest_step
from tilewright.codegen.mlir.linear_spec import LinearSpec
from tilewright.codegen.mlir.lower import assembly
from tilewright.codegen.mlir.native import NativeKernel, aligned
from tilewright.codegen.schedule import LinearSchedule
from tilewright.codegen.target import CpuTarget, parse_target
from tilewright.ir import DType

VNNI = "cpu{arch=x86-64-v4 features=+avx512bf16+avx512vnni}"
CODED_TARGETS = ["x86-64-v3", "x86-64-v4", VNNI]
WEIGHTS = {"i8": (-128, 128), "u8": (0, 256), "i4": (-8, 8), "u4": (0, 16), "i3": (-4, 4), "u3": (0, 8),
           "i2": (-2, 2), "u2": (0, 4)}
NARROW_FLOATS = ("f8e4m3", "f8e5m2", "f4e2m1")


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@dataclasses.dataclass
class Weight:
    """Random codes, scales and zero points of one weight; ``whole`` makes every scale 1."""

    spec: LinearSpec
    rng: np.random.Generator
    whole: bool = False
    extreme: bool = False

    def __post_init__(self) -> None:
        spec, rng = self.spec, self.rng
        groups = (spec.n, spec.groups.count)
        self.codes = random_codes(rng, spec.weight, (spec.n, spec.k), self.extreme)
        self.scale = np.ones(groups) if self.whole or not spec.scale else rng.uniform(0.005, 0.02, groups)
        self.scale = self.scale.astype(DType(spec.scale or "f32").np)
        steps = (spec.n, spec.steps.count) if spec.expands else groups
        self.zero = rng.integers(0, 1 << CODES[spec.weight], steps) if spec.has_zeros else np.zeros(steps, int)
        self.step = rng.integers(1, largest_step(spec.weight) + 1, steps) if spec.expands else None
        self.offset = rng.uniform(-0.3, 0, groups).astype(np.float32) if spec.offset else None
        tables = (spec.n if spec.row_tables else 1, 1 << spec.bits)
        self.table = rng.standard_normal(tables).astype(DType(spec.table or "f32").np)

    @property
    def exact(self) -> np.ndarray:
        if self.offset is not None:
            scale, offset = (np.repeat(a.astype(np.float64), self.spec.groups.size, 1) for a in (self.scale, self.offset))
            return self.codes.astype(np.float64) * scale + offset
        if self.step is not None:
            step, zero = (np.repeat(a, self.spec.expands, 1) for a in (self.step, self.zero))
            return np.clip((self.codes.astype(int) - zero) * step, -128, 127) * self.scale.astype(np.float64)
        spread = [np.repeat(a, self.spec.groups.size, 1) for a in (self.scale.astype(np.float64), self.zero)]
        tables = np.broadcast_to(self.table, (self.spec.n, self.table.shape[1]))
        numbers = np.take_along_axis(tables, self.codes.astype(int), 1) if self.spec.table else self.codes
        return (numbers.astype(np.float64) - spread[1]) * spread[0]

    def arrays(self, schedule: LinearSchedule, where: CpuTarget) -> list[np.ndarray]:
        pairs = [(self.spec.packing(schedule, where), self.codes)]
        if self.spec.scale:
            pairs.append((self.spec.group_packing(self.spec.scale, schedule, where), self.scale))
        if self.spec.has_zeros:
            make = self.spec.step_packing if self.spec.expands else partial(self.spec.group_packing, "u8")
            pairs.append((make(schedule, where), self.zero.astype(np.uint8)))
        if self.step is not None:
            most = largest_step(self.spec.weight)
            pairs.append((self.spec.step_packing(schedule, where, most), self.step.astype(np.uint8)))
        if self.offset is not None:
            pairs.append((self.spec.group_packing("f32", schedule, where), self.offset))
        packed = [packing.pack(array, aligned(packing.shape, packing.stored)) for packing, array in pairs]
        return [*packed, self.table] if self.spec.table else packed


def random_codes(rng: np.random.Generator, weight: str, shape: tuple[int, ...], extreme: bool = False) -> np.ndarray:
    """All codes there are, or only those at the ends of the range; no NaN and no infinity."""
    kind = DType(weight)
    if weight in WEIGHTS:
        low, high = WEIGHTS[weight]
        return (rng.choice([low, high - 1], shape) if extreme else rng.integers(low, high, shape)).astype(kind.np)
    codes = rng.integers(0, 1 << kind.bits, shape).astype(np.uint8).view(kind.np)
    return np.where(np.isfinite(codes.astype(np.float32)), codes, kind.np.type(0))


class Case:
    """A compiled kernel with its weights; ``run`` computes, ``expected`` is the exact result."""

    def __init__(self, name: str, spec: LinearSpec, schedule: LinearSchedule | None = None, **kind: bool) -> None:
        self.spec, self.target, self.rng = spec, named(name), np.random.default_rng(0)
        self.schedule = schedule or LinearSchedule.default(self.target)
        self.kernel = NativeKernel(linear_kernel("k", self.target, spec, self.schedule))
        self.weights = [Weight(spec, self.rng, **kind) for _ in range(spec.parts)]
        arrays = [weight.arrays(self.schedule, self.target) for weight in self.weights]
        self.packed = [array for role in zip(*arrays) for array in role]
        self.biases = [random_array(self.rng, spec.n, spec.bias) for _ in self.weights if spec.bias]

    def x(self, m: int, extreme: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Rows of x, and their scales."""
        shape, dtype = (m, self.spec.k), self.spec.x_dtype
        if dtype != "i8":
            return random_array(self.rng, shape, dtype), np.ones(m, np.float32)
        codes = self.rng.choice([-128, 127], shape) if extreme else self.rng.integers(-128, 128, shape)
        return codes.astype(np.int8), self.rng.uniform(0.01, 0.1, m).astype(np.float32)

    def run(self, x: np.ndarray, scale: np.ndarray, pieces: int = 1) -> np.ndarray:
        m = len(x)
        y = aligned((m, self.spec.n), self.spec.out_dtype, fill=7)
        given = [x, scale] if self.spec.dynamic else [x]
        tasks = self.spec.tasks(self.schedule, self.target, m)
        for piece in range(pieces):
            begin, end = piece * tasks // pieces, (piece + 1) * tasks // pieces
            self.kernel(begin, end, (m,), (*given, *self.packed, *self.biases, y))
        return y

    def expected(self, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        rows = x.astype(np.float64) * scale[:, None]
        sums = [rows @ weight.exact.T for weight in self.weights]
        sums = [total + bias.astype(np.float64) for total, bias in zip(sums, self.biases)] if self.biases else sums
        first = silu(sums[0]) if self.spec.activation == "silu" else sums[0]
        return first * sums[1] if self.spec.gated else first


def named(name: str) -> CpuTarget:
    if name != VNNI:
        return target(name)
    target("x86-64-v4+bf16")
    where = parse_target(name)
    try:
        return where if parse_target("native").has_vnni else pytest.skip("host lacks avx512vnni")
    except ValueError:
        return pytest.skip("host lacks avx512vnni")


@pytest.mark.parametrize("name", CODED_TARGETS)
@pytest.mark.parametrize(("x", "weight", "group"), [
    *(("i8", weight, group) for weight in WEIGHTS for group in (0, 32)),
    *(("bf16", weight, group) for weight in ("i8", "u8", "i4", "u4") for group in (0, 32)),
    ("bf16", "i3", 0), ("bf16", "u3", 32), ("bf16", "i2", 32), ("bf16", "u2", 0),
    *(("bf16", weight, group) for weight in NARROW_FLOATS for group in (0, 32)),
    ("f32", "i3", 64), ("f32", "u2", 32), ("f16", "f8e4m3", 0), ("f32", "f8e5m2", 32), ("f32", "f4e2m1", 32),
    ("i8", "i4", 128), ("i8", "i8", 64), ("f32", "i4", 32), ("f32", "i8", 0), ("f16", "u4", 64), ("bf16", "i4", 256)])
def test_formats_and_rows(name: str, x: str, weight: str, group: int) -> None:
    """Every count of rows takes another path: one, a few, a tile, tiles and a remainder, several blocks."""
    k = 3 * group if group else 187
    subject = Case(name, LinearSpec(70, k, x, weight, "f32", group=group, scale="f32" if group == 64 else "f16"))
    for m in (1, 2, 4, 5, 13, 29, 103):
        rows = subject.x(m)
        assert_close(subject.run(*rows), subject.expected(*rows), "f32")


@pytest.mark.parametrize("name", CODED_TARGETS)
@pytest.mark.parametrize(("x", "weight", "table", "scale", "group"), [
    ("bf16", "u4", "f32", "f16", 32), ("bf16", "u4", "bf16", "f32", 64), ("f32", "u3", "f16", None, 0),
    ("bf16", "u2", "bf16", None, 0), ("f16", "u4", "f32", "f32", 0), ("bf16", "u3", "bf16", "f16", 32)])
def test_tables(name: str, x: str, weight: str, table: str, scale: str | None, group: int) -> None:
    """One table for all weights, as NormalFloat has it."""
    subject = Case(name, LinearSpec(70, 3 * group or 107, x, weight, "f32", group=group, scale=scale, table=table))
    for m in (1, 5, 29):
        rows = subject.x(m)
        assert_close(subject.run(*rows), subject.expected(*rows), "f32")


@pytest.mark.parametrize("name", CODED_TARGETS)
@pytest.mark.parametrize(("x", "weight", "table", "n", "k"), [
    ("bf16", "u4", "f16", 70, 300), ("f32", "u3", "f16", 70, 700), ("bf16", "u2", "bf16", 33, 256),
    ("f16", "u4", "f32", 1, 5)])
def test_tables_of_rows(name: str, x: str, weight: str, table: str, n: int, k: int) -> None:
    spec = LinearSpec(n, k, x, weight, "f32", "f32", scale=None, table=table, row_tables=True)
    schedule = dataclasses.replace(LinearSchedule.default(named(name)), block_k=256)
    subject = Case(name, spec, schedule)
    for m in (1, 3, 5, 29):
        rows = subject.x(m)
        assert_close(subject.run(*rows), subject.expected(*rows), "f32")


@pytest.mark.parametrize("name", CODED_TARGETS)
@pytest.mark.parametrize(("weight", "group", "k"), [
    ("u4", 32, 96), ("i4", 128, 384), ("u4", 128, 128), ("u2", 32, 64), ("i3", 64, 128)])
def test_codes_that_expand(name: str, weight: str, group: int, k: int) -> None:
    """Exact, also where what they expand to is cut off at the ends of i8."""
    spec = LinearSpec(70, k, "i8", weight, "f32", scale="f32", expands=group)
    subject = Case(name, spec, whole=True)
    edges = np.abs(subject.weights[0].exact) >= 127
    assert 0.01 < edges.mean() < 0.9 or weight != "u4"
    for m in (1, 2, 4, 5, 29, 103):
        codes, scale = subject.x(m)
        scale[:] = 1
        assert np.array_equal(subject.run(codes, scale), subject.expected(codes, scale))


@pytest.mark.parametrize("name", CODED_TARGETS)
def test_codes_that_expand_gated(name: str) -> None:
    spec = LinearSpec(90, 256, "i8", "u4", "bf16", "f32", "silu", True, scale="f32", expands=128)
    subject = Case(name, spec)
    for m in (1, 9):
        rows = subject.x(m)
        assert_close(subject.run(*rows), subject.expected(*rows), "bf16")


@pytest.mark.parametrize("name", CODED_TARGETS)
@pytest.mark.parametrize(("x", "weight", "group"), [
    ("i8", "u4", 32), ("bf16", "u4", 32), ("f32", "u2", 64), ("i8", "u8", 0), ("bf16", "u3", 0)])
def test_offsets(name: str, x: str, weight: str, group: int) -> None:
    subject = Case(name, LinearSpec(70, 192, x, weight, "f32", "f32", group=group, scale="f16", offset=True))
    for m in (1, 5, 29):
        rows = subject.x(m)
        assert_close(subject.run(*rows), subject.expected(*rows), "f32")


@pytest.mark.parametrize("name", CODED_TARGETS)
def test_scales_that_are_powers_of_two(name: str) -> None:
    subject = Case(name, LinearSpec(70, 96, "bf16", "f4e2m1", "f32", "f32", "silu", True, group=32, scale="f8e8m0"))
    for m in (1, 29):
        rows = subject.x(m)
        assert_close(subject.run(*rows), subject.expected(*rows), "f32")


@pytest.mark.parametrize("name", CODED_TARGETS)
@pytest.mark.parametrize("weight", NARROW_FLOATS)
@pytest.mark.parametrize("x", ["f32", "bf16"])
def test_every_code_of_a_narrow_float(name: str, weight: str, x: str) -> None:
    """One k, a scale and x of 1: the results are the numbers themselves, subnormal ones too, infinities and NaNs."""
    count = 1 << DType(weight).bits
    subject = Case(name, LinearSpec(count, 1, x, weight, "f32"), whole=True)
    codes = np.arange(count, dtype=np.uint8)[:, None].view(DType(weight).np)
    packing = subject.spec.packing(subject.schedule, subject.target)
    packing.pack(codes, subject.packed[0])
    for m in (1, 13):
        got = subject.run(np.ones((m, 1), DType(x).np), np.ones(m, np.float32))
        np.testing.assert_array_equal(got, np.broadcast_to(codes.T.astype(np.float32), got.shape))


@pytest.mark.parametrize("name", CODED_TARGETS)
def test_every_scale_of_eight_bits(name: str) -> None:
    subject = Case(name, LinearSpec(256, 1, "f32", "i8", "f32", scale="f8e8m0"), whole=True)
    scales = np.arange(256, dtype=np.uint8)[:, None].view(DType.f8e8m0.np)
    subject.spec.group_packing("f8e8m0", subject.schedule, subject.target).pack(scales, subject.packed[1])
    got = subject.run(np.ones((1, 1), np.float32), np.ones(1, np.float32))
    with np.errstate(over="ignore"):
        want = subject.weights[0].codes[:, 0].astype(np.float32) * scales[:, 0].astype(np.float32)
    np.testing.assert_array_equal(got[0], want)


@pytest.mark.parametrize("name", CODED_TARGETS)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("group", [0, 32])
def test_integer_products_are_exact(name: str, weight: str, group: int) -> None:
    """The largest codes there are, and scales of 1: nothing saturates, nothing is rounded."""
    subject = Case(name, LinearSpec(70, 256, "i8", weight, "f32", group=group), whole=True, extreme=True)
    for m in (1, 5, 30):
        for extreme in (True, False):
            codes, scale = subject.x(m, extreme)
            scale[:] = 1
            assert np.array_equal(subject.run(codes, scale), subject.expected(codes, scale))


@pytest.mark.parametrize("name", CODED_TARGETS)
@pytest.mark.parametrize(("x", "weight"), [
    ("i8", "i8"), ("i8", "i4"), ("i8", "u3"), ("bf16", "i8"), ("bf16", "i4"), ("bf16", "u2")])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 15), (33, 9), (3, 700)])
def test_sizes(name: str, x: str, weight: str, n: int, k: int) -> None:
    """Any N and K, also across several blocks of K."""
    schedule = dataclasses.replace(LinearSchedule.default(named(name)), block_k=256)
    subject = Case(name, LinearSpec(n, k, x, weight, "f32"), schedule)
    for m in (1, 3, 17):
        rows = subject.x(m)
        assert_close(subject.run(*rows), subject.expected(*rows), "f32")


@pytest.mark.parametrize("name", CODED_TARGETS)
@pytest.mark.parametrize("x", ["i8", "bf16"])
def test_gated_with_bias(name: str, x: str) -> None:
    spec = LinearSpec(90, 128, x, "u4", "bf16", "f32", gated=True, activation="silu", group=32, scale="f16")
    subject = Case(name, spec)
    for m in (1, 9):
        rows = subject.x(m)
        assert_close(subject.run(*rows), subject.expected(*rows), "bf16")


@pytest.mark.parametrize("name", CODED_TARGETS)
def test_unaligned_x(name: str) -> None:
    subject = Case(name, LinearSpec(40, 96, "i8", "i4", "f32", group=32))
    codes, scale = subject.x(3)
    moved = np.empty(codes.size + 1, np.int8)[1:].reshape(codes.shape)
    moved[...] = codes
    assert np.array_equal(subject.run(moved, scale), subject.run(codes, scale))


def test_tasks_split_anywhere() -> None:
    schedule = dataclasses.replace(LinearSchedule.default(parse_target("x86-64-v3")), block_m=24)
    subject = Case("x86-64-v3", LinearSpec(100, 64, "i8", "i4", "f32", group=32), schedule)
    rows = subject.x(130)
    assert np.array_equal(subject.run(*rows), subject.run(*rows, pieces=7))


@pytest.mark.parametrize(("arch", "instruction"), [
    ("x86-64-v3", "vpmaddubsw"), ("x86-64-v4", "vpmaddubsw"), ("alderlake", "{vex} vpdpbusd"), ("znver4", "vpdpbusd")])
def test_instructions(arch: str, instruction: str) -> None:
    where = parse_target(arch)
    spec = LinearSpec(64, 64, "i8", "i4", "f32", group=32)
    code = assembly(linear_kernel("k", where, spec, LinearSchedule.default(where)))
    assert " ".join(instruction.split()) in " ".join(code.split())
    assert ("zmm" in code) == (where.vector_bits == 512)
    assert library_calls(code) <= {"memset"}


@pytest.mark.parametrize(("spec", "reason"), [
    ({"weight": "i4", "group": 12, "k": 96}, "groups of 12 do not divide K = 96 into multiples of 8"),
    ({"weight": "i8", "group": 32, "k": 100}, "groups of 32 do not divide K = 100"),
    ({"weight": "bf16", "k": 96}, "int8 activations with bf16 weights"),
    ({"weight": "f8e4m3", "k": 96}, "int8 activations with f8e4m3 weights"),
    ({"weight": "u4", "expands": 12, "k": 96}, "groups of 12 do not divide K = 96 into multiples of 8"),
    ({"weight": "u4", "k": 96, "table": "f16"}, "int8 activations with a table of f16"),
    ({"weight": "i3", "group": 16, "k": 96}, "groups of 16 do not divide K = 96 into multiples of 32"),
    ({"weight": "i4", "group": 8, "k": 96, "scale": "bf16"}, "no kernel for bf16 scales"),
    ({"weight": "i8", "k": 70000}, "may overflow; at most 65793"),
])
def test_refusals(spec: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LinearSpec(n=8, x_dtype="i8", **spec)
