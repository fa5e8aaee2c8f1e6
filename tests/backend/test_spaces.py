"""Schedule spaces: every schedule in them computes the same, and what is said of one without compiling is true."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tilewright.codegen.emitters import choose
from tilewright.codegen.features import describer
from tilewright.codegen.mlir.linear_cost import linear_space
from tilewright.codegen.mlir.linear_spec import LinearSpec
from tilewright.codegen.schedule import LinearSchedule, Space
from tilewright.codegen.standalone import StandaloneKernel
from tilewright.codegen.target import parse_target
from tilewright.ir import Function, Module, eval_dim, interpret, parse_module

NATIVE, AVX2 = parse_target("native"), parse_target("x86-64-v3")
KERNELS = {
    "linear": """
        kernel @k(%x: tensor<Sx40xf32>, %w: tensor<37x40xf32>, %r: tensor<Sx37xf32>) {
          %0 = nn.linear(%x, %w) : tensor<Sx37xf32>
          %1 = core.add(%0, %r) : tensor<Sx37xf32>
          return([%1])
        }""",
    "quantized": """
        kernel @k(%x: tensor<Sx64xi8>, %xs: tensor<Sx1xf32>, %w: tensor<48x64xi4>, %ws: tensor<48x2xf16>) {
          %0 = quant.dequantize(%x, %xs) {dtype=f32} : tensor<Sx64xf32>
          %1 = quant.dequantize(%w, %ws) {dtype=f32} : tensor<48x64xf32>
          %2 = nn.linear(%0, %1) : tensor<Sx48xf32>
          return([%2])
        }""",
    "attention": """
        kernel @k(%q: tensor<1xSx4x16xf32>, %k: tensor<1xSx2x16xf32>, %v: tensor<1xSx2x16xf32>) {
          %0 = nn.attention(%q, %k, %v) {scale=0.25 causal=true} : tensor<1xSx4x16xf32>
          return([%0])
        }""",
    "loops": """
        kernel @k(%x: tensor<Sx70xf32>) {
          %0 = nn.softmax(%x) {axis=1} : tensor<Sx70xf32>
          return([%0])
        }""",
    "conv": """
        kernel @k(%x: tensor<1x4x12x16xf32>, %w: tensor<8x4x3x3xf32>) {
          %0 = nn.conv(%x, %w) {stride=[1, 1] padding=[1, 1] dilation=[1, 1] groups=1} : tensor<1x8x12x16xf32>
          return([%0])
        }""",
    "matmul": """
        kernel @k(%a: tensor<3xSx24xf32>, %b: tensor<3x24x16xf32>) {
          %0 = core.matmul(%a, %b) : tensor<3xSx16xf32>
          return([%0])
        }""",
}  # fmt: skip


def kernel(name: str) -> tuple[Function, Module]:
    module = parse_module(f"module @m {{ dim S : 1..64\n{KERNELS[name]}\n}}")
    return module.functions["k"], module


def inputs(function: Function, sizes: dict[str, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    made = []
    for arg in function.args:
        shape = [sizes.get(str(d), d) for d in arg.shape]
        values = rng.standard_normal(shape) if arg.dtype.is_float else rng.integers(-7, 8, shape)
        made.append(values.astype(arg.dtype.np))
    return made


@pytest.mark.parametrize("target", [NATIVE, AVX2], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_schedules_of_a_space_compute_the_same(name: str, target) -> None:
    function, module = kernel(name)
    sizes = {"S": 13}
    emitter = choose(function, target)
    space, rng = emitter.space(function, target, sizes), np.random.default_rng(1)
    values = inputs(function, sizes)
    (want,) = interpret(module, "k", values)
    known = {space.default.text}
    for _ in range(4):
        schedule = space.mutate(space.sample(rng), rng)
        assert schedule in space
        known.add(schedule.text)
        made = StandaloneKernel(function, target, emitter, schedule)
        assert made.code.packing == emitter.layouts(function, target)(schedule)
        (got,) = made(values, sizes)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max(), err_msg=schedule.text)
    assert len(known) > 2, "the space offers something"


@pytest.mark.parametrize("name", KERNELS)
def test_features_are_numbers_with_the_same_names_for_all_schedules(name: str) -> None:
    function, _ = kernel(name)
    sizes = {"S": 13}
    emitter = choose(function, NATIVE)
    space, rng = emitter.space(function, NATIVE, sizes), np.random.default_rng(1)
    describe = describer(emitter, function, NATIVE, sizes, threads=2)
    rows = [describe(space.sample(rng)) for _ in range(20)]
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert len({tuple(row.items()) for row in rows}) > 1
    if "tasks" in rows[0]:
        code = emitter.emit(function, space.default, NATIVE, "k")
        assert 2 ** describe(space.default)["tasks"] == pytest.approx(eval_dim(code.tasks, sizes))


def test_knobs_that_make_no_difference_stay() -> None:
    spec = LinearSpec(2048, 2048, "bf16", "bf16", "bf16")
    one, many = (linear_space(spec, NATIVE, rows) for rows in (1, 512))
    assert set(one.knobs) == {"tile_v", "block_k", "unroll", "prefetch"}
    assert set(many.knobs) == {"tile_m", "tile_v", "block_m", "block_k", "first"}
    assert max(one.domains["block_k"]) == 2048
    assert one.default == many.default == spec.schedule(NATIVE)


def test_crossing_takes_each_knob_from_one_of_the_two() -> None:
    space, rng = Space(LinearSchedule, NATIVE), np.random.default_rng(0)
    a, b = (space.sample(rng) for _ in range(2))
    child = space.cross(a, b, rng)
    for key in space.domains:
        assert getattr(child, key) in (getattr(a, key), getattr(b, key))


def test_equal_seeds_give_equal_schedules() -> None:
    space = Space(LinearSchedule, AVX2)
    runs = []
    for _ in range(2):
        rng = np.random.default_rng(7)
        start = space.sample(rng)
        runs.append([start, *(space.mutate(start, rng) for _ in range(5))])
    assert runs[0] == runs[1]
    assert all(s.refusal(AVX2) is None for s in runs[0])


def test_text_of_another_space_is_not_parsed() -> None:
    space = Space(LinearSchedule, NATIVE, LinearSchedule(), {"tile_v": (4,)})
    assert space.parse(space.default.text) == space.default
    for foreign in ("linear{tile_v=1}", "attention", "linear{tile_m=99}", "nonsense{", "linear{tile_m=14 tile_v=4}"):
        assert space.parse(foreign) is None
