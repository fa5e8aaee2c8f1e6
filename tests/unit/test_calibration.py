"""Running over data in lock-step, what is recorded, where numbers wait, and data that do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.models.tiny_decoder import Decoder, learned, tril
from tilewright.ir import ArraySource, DType, Module, PassError, TensorType, interpret, ops, parse_module
from tilewright.passes.base import PassContext
from tilewright.passes.calibration.data import calibration
from tilewright.passes.calibration.spill import Spill, packed
from tilewright.passes.calibration.statistics import hessian, moments, sample
from tilewright.passes.calibration.stream import LAYERS, Stream, stream
from tilewright.passes.pipeline import Pipeline

Array = np.ndarray[Any, Any]


def decoder(**options: Any) -> Module:
    module = Decoder(positions=learned, mask=tril, rope=True, **options).build()
    Pipeline.parse("clean,fusions").run(module)
    return module


def ids(*shapes: tuple[int, int], seed: int = 0) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(0, 40, shape)} for shape in shapes]


def given(batches: Any) -> PassContext:
    return PassContext({"calibration": batches})


# ---- the run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", [None, "quantize{scheme=w4a16 group=8}", "quantize{scheme=codebook4}"])
def test_results_are_the_interpreters_for_batches_of_any_size(pipeline: str | None) -> None:
    module = decoder(merged=True)
    if pipeline:
        Pipeline.parse(pipeline).run(module)
    batches = ids((2, 7), (1, 11), (3, 2))
    got = Stream(module.functions["forward"], batches).results()
    for i, batch in enumerate(batches):
        np.testing.assert_array_equal(got[0][i], interpret(module, "forward", batch)[0])


def layers_of(module: Module) -> list[Any]:
    return list(module.functions["forward"].walk(*LAYERS))


def test_layers_are_visited_in_order_with_the_inputs_of_every_batch() -> None:
    module, batches = decoder(), ids((2, 7), (1, 11))
    want: dict[Any, list[Array]] = {}
    for batch in batches:
        made: dict[Any, Array] = {}
        interpret(module, "forward", batch, observer=lambda op, out, made=made: made.update(zip(op.results, out)))
        for op in layers_of(module):
            want.setdefault(op, []).append(made[op.x])
    seen = []

    def visit(op: Any, inputs: Sequence[Array]) -> None:
        seen.append(op)
        for a, b in zip(inputs, want[op], strict=True):
            np.testing.assert_array_equal(a, b)

    stream(module.functions["forward"], batches, visit, layers_of(module))
    assert seen == layers_of(module)


def test_later_layers_see_what_a_visitor_made_of_earlier_weights() -> None:
    module, batches = decoder(), ids((2, 7))
    first, *_, last = layers_of(module)
    changed = decoder()
    weight = changed.weights[first.weight.name]
    weight.source = ArraySource(weight.load() * np.float32(0.5))
    found = []

    def visit(op: Any, inputs: Sequence[Array]) -> dict[Any, Array] | None:
        found.append(inputs[0])
        return {op.weight: op.weight.load() * np.float32(0.5)} if op is first else None

    stream(module.functions["forward"], batches, visit, [first, last])
    want: list[Array] = []
    stream(changed.functions["forward"], batches, lambda op, xs: want.append(xs[0]), [layers_of(changed)[-1]])
    np.testing.assert_array_equal(found[1], want[0])


def test_what_nothing_wants_is_not_run() -> None:
    module = decoder()
    head = layers_of(module)[-1]
    head.weight.source = None  # loading it would fail
    stream(module.functions["forward"], ids((1, 4)), lambda op, xs: None, layers_of(module)[:-1])


def test_weights_are_loaded_once_for_all_batches_and_released() -> None:
    events: list[str] = []

    class Source(ArraySource):
        def load(self) -> Array:
            events.append("load")
            return super().load()

        def release(self) -> None:
            events.append("release")

    module = decoder()
    weight = layers_of(module)[0].weight
    weight.source = Source(weight.load())
    Stream(module.functions["forward"], ids((1, 4), (2, 4), (1, 3))).results()
    assert events == ["load", "release"]


def test_a_value_goes_after_its_last_use() -> None:
    module = decoder(layers=3)
    run = Stream(module.functions["forward"], ids((1, 4)), layers_of(module))
    most = 0
    for layer in run:
        most = max(most, len(run.known))
        run.step()
        assert all(any(v in op.operands for op in run.body[run.at :]) for v in run.known), layer
    assert most < 8


def test_forks_go_their_own_way() -> None:
    module, batches = decoder(), ids((2, 5), (1, 4))
    function = module.functions["forward"]
    layers = layers_of(module)
    want = [interpret(module, "forward", batch)[0] for batch in batches]
    zeros = {layers[2].weight: lambda: np.zeros(layers[2].weight.shape, np.float32)}
    run = Stream(function, batches, [*layers, function.terminator])
    changed: list[Array] = []
    for layer in run:
        if layer is layers[2]:
            changed = run.fork(zeros).results()[0]
    for got, plain, other in zip(run.results()[0], want, Stream(function, batches, replaced=zeros).results()[0]):
        np.testing.assert_array_equal(got, plain)
        assert np.abs(other - plain).max() > 1e-3
    for got, other in zip(changed, Stream(function, batches, replaced=zeros).results()[0], strict=True):
        np.testing.assert_array_equal(got, other)


# ---- what is recorded --------------------------------------------------------------------------------------------


def test_moments_and_hessian_are_those_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilewright.passes.calibration.statistics._ROWS", 5)
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((2, 6, 3)).astype(np.float32), rng.standard_normal((7, 3)).astype(np.float32)]
    rows = np.concatenate([p.reshape(-1, 3) for p in parts]).astype(np.float64)
    found = moments(parts)
    np.testing.assert_allclose(found.top, np.abs(rows).max(0))
    np.testing.assert_allclose(found.mean, np.abs(rows).mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.square, (rows**2).mean(0), rtol=1e-6)
    np.testing.assert_allclose(hessian(parts), rows.T @ rows / len(rows), rtol=1e-5)
    assert found.rows == 19


def test_a_sample_is_spread_over_all_rows() -> None:
    parts = [np.arange(30, dtype=np.float32).reshape(5, 3, 2), np.arange(30, 60, dtype=np.float32).reshape(15, 2)]
    np.testing.assert_array_equal(sample(parts, 100), np.arange(60).reshape(30, 2))
    assert sample(parts, 3)[:, 0].tolist() == [0, 28, 58]


# ---- where numbers wait ------------------------------------------------------------------------------------------

WIDTHS = [DType.i8, DType.u8, DType.i4, DType.u4, DType.i3, DType.u3, DType.i2, DType.u2, DType.f32, DType.f16, DType.bf16]


@pytest.mark.parametrize("dtype", WIDTHS, ids=lambda d: d.value)
@pytest.mark.parametrize("count", [1, 8, 63, 1000])
def test_codes_wait_at_their_real_bits(dtype: DType, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilewright.passes.calibration.spill._CODES", 64)
    rng = np.random.default_rng(0)
    if dtype.is_float:
        array = rng.standard_normal(count).astype(dtype.np)
    else:
        low = 0 if dtype.value.startswith("u") else -(1 << dtype.bits - 1)
        array = rng.integers(low, low + (1 << dtype.bits), count).astype(np.int8).view(dtype.np)
    spill = Spill()
    first = spill.put(array, TensorType((count,), dtype))
    second = spill.put(array[::-1], TensorType((count, 1), dtype))
    np.testing.assert_array_equal(first.load().view(np.uint8), array.view(np.uint8))
    np.testing.assert_array_equal(second.load().reshape(-1).view(np.uint8), array[::-1].copy().view(np.uint8))
    assert first.size == (-(-count // 8) * dtype.bits if dtype.bits < 8 else count * dtype.size)


def test_a_full_disk_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(file: int, data: Any, at: int) -> int:
        if at >= 8:
            raise OSError(28, "No space left on device")
        return min(4, len(data))  # short writes go on where they ended

    monkeypatch.setattr("os.pwrite", pwrite)
    with pytest.raises(PassError, match=r"temporary file in .*took 8 bytes: No space left on device; set TMPDIR"):
        Spill().put(np.zeros(100, np.float32), TensorType((100,), DType.f32))


def test_codes_are_packed_from_the_lowest_bits() -> None:
    assert packed(np.array([1, 2, 3], np.uint8), DType.u4) == bytes([0x21, 0x03, 0, 0])
    assert packed(np.array([-1, 0, -4], np.int8), DType.i3) == bytes([0b00000111, 0b00000001, 0])


# ---- data that do not fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batches", "message"), [
    (None, r"gptq needs calibration data; give them with compile\(calibration=.*--calibration FILE"),
    ([], "the calibration data are empty"),
    ({"input_ids": np.zeros((2, 64), np.int64)}, "calibration data are a list of mappings from names to arrays, got dict"),
    ([{"ids": np.zeros((2, 64), np.int64)}], r"entry 0 has \['ids'\]; @forward takes \['input_ids'\]"),
    ([*ids((4, 64)), {"input_ids": np.zeros((2, 64), np.int32)}], r"entry 1: input input_ids: expected .*i64.*, got int32"),
    ([{"input_ids": np.zeros((2, 0), np.int64)}], r"entry 0 is empty: input_ids\[2, 0\]"),
    (ids((2, 65)), "S is 65; the model was traced for 1 to 64"),
    (ids((2, 63)), "the calibration data are 126 tokens; gptq needs 128 or more"),
])  # fmt: skip
def test_data_are_refused_before_any_work(batches: Any, message: str) -> None:
    module = decoder()
    for weight in module.weights.values():
        weight.source = None
    with pytest.raises(PassError, match=message):
        calibration(module, given(batches) if batches is not None else PassContext(), "gptq")


def test_floats_that_are_not_finite_are_refused() -> None:
    text = """module @m {
      dim B : 1..999
      weight @w : tensor<6x4xf32>
      func @forward(%x: tensor<Bx4xf32>) {
        %0 = nn.linear(%x, @w) : tensor<Bx6xf32>
        return([%0])
      }
    }"""
    x = np.ones((200, 4), np.float32)
    x[7, 2] = np.nan
    with pytest.raises(PassError, match="entry 0: x has numbers that are NaN or infinite"):
        calibration(parse_module(text), given([{"x": x}]), "clip")


@pytest.mark.parametrize("pipeline", ["cache", "kernels"])
def test_calibration_stands_before_caches_and_kernels(pipeline: str) -> None:
    module = decoder()
    Pipeline.parse(pipeline).run(module)
    with pytest.raises(PassError, match="must stand before kv-layout and fuse in the pipeline"):
        Pipeline.parse("quantize{method=gptq}").run(module, ctx=given(ids((4, 64))))


def test_layers_of_experts_and_shared_weights_fall_back() -> None:
    """What the run does not visit is rounded to the nearest, and a weight that two layers share has one set of numbers."""
    module = parse_module("""module @m {
      dim B : 1..999
      weight @embed : tensor<16x8xf32>
      weight @w : tensor<8x8xf32>
      func @forward(%ids: tensor<Bxi64>) {
        %0 = nn.embedding(%ids, @embed) : tensor<Bx8xf32>
        %1 = nn.linear(%0, @w) : tensor<Bx8xf32>
        %2 = nn.linear(%1, @w) : tensor<Bx8xf32>
        return([%2])
      }
    }""")
    rng = np.random.default_rng(0)
    for w in module.weights.values():
        w.source = ArraySource(rng.standard_normal(tuple(map(int, w.shape))).astype(np.float32))
    Pipeline.parse("quantize{scheme=w8a16 method=gptq},dce").run(module, ctx=given([{"ids": rng.integers(0, 16, 200)}]))
    assert set(module.weights) == {"embed.i8", "embed.scale", "w.i8", "w.scale"}
    assert len(list(module.functions["forward"].walk(ops.Dequantize))) == 3
    assert np.isfinite(interpret(module, "forward", [np.arange(16)])[0]).all()
