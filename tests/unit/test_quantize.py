"""Integer weights: bounds that follow from the arithmetic, and what the pass does to whole functions."""

import numpy as np
import pytest

from tilewright.ir import ArraySource, Module, PassError, interpret, ops, parse_module
from tilewright.passes.pipeline import Pipeline
from tilewright.passes.quantize_formats import Format

FORMATS = [Format(bits, group, zero) for bits in (8, 4) for group in (0, 32) for zero in (False, True)]


def decoded(format: Format, weight: np.ndarray) -> np.ndarray:
    codes, scale, *zero = format.encode(weight)
    assert codes.dtype == format.codes.np
    assert scale.dtype == format.scale.np
    groups = codes.astype(np.float32).reshape(*scale.shape, -1)
    shift = zero[0].astype(np.float32)[..., None] if zero else 0
    return ((groups - shift) * scale.astype(np.float32)[..., None]).reshape(weight.shape)


def steps(format: Format, weight: np.ndarray) -> np.ndarray:
    """The distance between two codes, for each group."""
    grouped = weight.reshape(len(weight), -1, format.group or weight.shape[1])
    low, high = grouped.min(-1), grouped.max(-1)
    if format.zero:
        return (np.maximum(high, 0) - np.minimum(low, 0)) / (2**format.bits - 1)
    return np.maximum(-low, high) / (127 if format.bits == 8 else 8)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_errors_stay_within_half_a_step(format: Format) -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((40, 96)) * rng.uniform(1e-3, 10, (40, 1))).astype(np.float32)
    weight[3] = np.abs(weight[3])  # one sign
    error = np.abs(decoded(format, weight) - weight).reshape(40, -1, format.group or 96).max(-1)
    # Half a step; a whole one at the top of a symmetric 4-bit group, which has one code fewer, and with zero points
    # half of one more, since they are rounded too. Scales of groups are rounded to 11 bits.
    most = 1.0 if format.zero or format.bits == 4 else 0.5
    assert (error <= steps(format, weight) * most * 1.02 + np.abs(weight).max() * 2**-11).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_zeros_constants_and_tiny_numbers(format: Format) -> None:
    weight = np.zeros((4, 64), np.float32)
    weight[1], weight[2], weight[3, 5] = 0.5, -3.0, 1e-12
    got = decoded(format, weight)
    assert np.isfinite(got).all()
    assert not got[0].any()
    np.testing.assert_allclose(got[1:3], weight[1:3], rtol=2e-3)
    np.testing.assert_allclose(got[3], weight[3], atol=1e-11)


def test_a_weight_is_encoded_alike_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(1).standard_normal((50, 64)).astype(np.float32)
    whole = Format(4, 32).encode(weight)
    monkeypatch.setattr("tilewright.passes.quantize_formats._ROWS_AT_ONCE", 64 * 7)
    for a, b in zip(whole, Format(4, 32).encode(weight), strict=True):
        np.testing.assert_array_equal(a, b)


TIED = """
module @m {
  dim B : 1..8
  weight @up : tensor<64x32xf32>
  weight @down : tensor<32x64xf32>
  weight @embed : tensor<40x32xf32>
  func @forward(%ids: tensor<Bxi64>) {
    %0 = nn.embedding(%ids, @embed) : tensor<Bx32xf32>
    %1 = nn.linear(%0, @up) : tensor<Bx64xf32>
    %2 = core.silu(%1) : tensor<Bx64xf32>
    %3 = nn.linear(%2, @down) : tensor<Bx32xf32>
    %4 = nn.linear(%3, @embed) : tensor<Bx40xf32>
    return([%4])
  }
}
"""


def tied() -> Module:
    module, rng = parse_module(TIED), np.random.default_rng(2)
    for w in module.weights.values():
        w.source = ArraySource(rng.standard_normal(tuple(map(int, w.shape))).astype(np.float32))
    return module


@pytest.mark.parametrize(("pipeline", "close"), [
    ("quantize{scheme=w8a16}", 0.02),
    ("quantize{scheme=w8a8}", 0.04),
    ("quantize{scheme=w8a8 group=16 zero=true}", 0.04),
    ("quantize{scheme=w8a8 layers=head},quantize{scheme=w4a8 group=16 layers=body}", 0.2),
    ("quantize{scheme=w4a16 group=16 zero=true}", 0.2),
])  # fmt: skip
def test_functions_keep_their_meaning(pipeline: str, close: float) -> None:
    ids = np.arange(8)
    want = interpret(tied(), "forward", [ids])[0]
    module = tied()
    Pipeline.parse(f"{pipeline},dce").run(module)
    got = interpret(module, "forward", [ids])[0]
    assert 0 < np.linalg.norm(got - want) < close * np.linalg.norm(want)


def test_head_and_table_share_numbers_and_the_rest_has_its_own() -> None:
    module = tied()
    Pipeline.parse("quantize{scheme=w8a8 layers=head},quantize{scheme=w4a8 group=16 layers=body},dce").run(module)
    kinds = {name: w.dtype.value for name, w in module.weights.items() if not name.endswith("scale")}
    assert kinds == {"embed.i8": "i8", "up.i4": "i4", "down.i4": "i4"}
    assert sum(int(w.tensor.bytes) for w in module.weights.values()) == 40 * 36 + 2 * (64 * 32 // 2 + 64 * 32 // 16 * 2)


def test_layers_that_share_an_input_share_its_codes() -> None:
    text = TIED.replace("nn.linear(%3, @embed)", "nn.linear(%0, @embed)").replace("return([%4])", "return([%3, %4])")
    module = parse_module(text)
    Pipeline.parse("quantize{scheme=w8a8}").run(module)
    assert len(list(module.functions["forward"].walk(ops.Quantize))) == 2


def test_a_group_that_does_not_divide_is_refused_by_name() -> None:
    with pytest.raises(PassError, match=r"@down: groups of 48 do not divide its rows of 64; choose another group"):
        Pipeline.parse("quantize{scheme=w4a8 group=48 skip=[*up*, *embed*]}").run(tied())
