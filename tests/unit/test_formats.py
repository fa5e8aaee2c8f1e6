"""Formats of weights: bounds that follow from the arithmetic, and numbers that are hard."""

import numpy as np
import pytest

from tilewright.ir import PassError
from tilewright.passes.formats import round_to_nearest
from tilewright.passes.formats.integers import Integers

INTEGERS = [Integers(bits, group, zero) for bits in (8, 4, 3, 2) for group in (0, 32) for zero in (False, True)]


def decoded(format: Integers, weight: np.ndarray) -> np.ndarray:
    codes, scale, *zero = round_to_nearest(format, weight)
    assert codes.dtype == format.codes.np
    assert scale.dtype == format.scale.np
    groups = codes.astype(np.float32).reshape(*scale.shape, -1)
    shift = zero[0].astype(np.float32)[..., None] if zero else 0
    return ((groups - shift) * scale.astype(np.float32)[..., None]).reshape(weight.shape)


def steps(format: Integers, weight: np.ndarray) -> np.ndarray:
    """The distance between two codes, for each group."""
    grouped = weight.reshape(len(weight), -1, format.group or weight.shape[1])
    low, high = grouped.min(-1), grouped.max(-1)
    if format.zero:
        return (np.maximum(high, 0) - np.minimum(low, 0)) / (2**format.bits - 1)
    return np.maximum(-low, high) / (127 if format.bits == 8 else 2 ** (format.bits - 1))


@pytest.mark.parametrize("format", INTEGERS, ids=str)
def test_errors_stay_within_half_a_step(format: Integers) -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((40, 96)) * rng.uniform(1e-3, 10, (40, 1))).astype(np.float32)
    weight[3] = np.abs(weight[3])  # one sign
    error = np.abs(decoded(format, weight) - weight).reshape(40, -1, format.group or 96).max(-1)
    # Half a step; a whole one at the top of a symmetric group of few bits, which has one code fewer, and with zero
    # points half of one more, since they are rounded too. Scales of groups are rounded to 11 bits.
    most = 1.0 if format.zero or format.bits < 8 else 0.5
    assert (error <= steps(format, weight) * most * 1.02 + np.abs(weight).max() * 2**-11).all()


@pytest.mark.parametrize("format", INTEGERS, ids=str)
def test_zeros_constants_and_tiny_numbers(format: Integers) -> None:
    weight = np.zeros((4, 64), np.float32)
    weight[1], weight[2], weight[3, 5] = 0.5, -3.0, 1e-12
    got = decoded(format, weight)
    assert np.isfinite(got).all()
    assert not got[0].any()
    np.testing.assert_allclose(got[1:3], weight[1:3], rtol=2e-3)
    np.testing.assert_allclose(got[3], weight[3], atol=1e-11)


def test_a_weight_is_encoded_alike_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(1).standard_normal((50, 64)).astype(np.float32)
    whole = round_to_nearest(Integers(4, 32), weight)
    monkeypatch.setattr("tilewright.passes.formats.base._ROWS_AT_ONCE", 64 * 7)
    for a, b in zip(whole, round_to_nearest(Integers(4, 32), weight), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_scale_that_f16_cannot_hold_is_refused() -> None:
    with pytest.raises(PassError, match=r"@big has numbers up to 1e\+06, too large for its format .*; choose one with f32"):
        round_to_nearest(Integers(4, 32), np.full((2, 64), 1e6, np.float32), name="big")
    assert round_to_nearest(Integers(4), np.full((2, 64), 1e6, np.float32))[1][0, 0] == -1e6 / 8
