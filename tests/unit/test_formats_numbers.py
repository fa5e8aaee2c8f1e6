"""The numbers that formats choose, against what papers and standards say, and other implementations."""

from __future__ import annotations

from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch

from tilewright.ir import DType
from tilewright.passes.formats import round_to_nearest
from tilewright.passes.formats.codebook import NORMAL_FLOATS, Codebook, NormalFloat
from tilewright.passes.formats.floats import Floats, Microscaling
from tilewright.passes.formats.integers import Integers
from tilewright.passes.formats.kmeans import clusters
from tilewright.passes.formats.ternary import Ternary
from tilewright.passes.formats.two_level import TwoLevel

INTEGERS = [Integers(bits, group, zero) for bits in (8, 4, 3, 2) for group in (0, 32) for zero in (False, True)]


def normal(n: int, k: int) -> np.ndarray:
    return np.random.default_rng(k).standard_normal((n, k)).astype(np.float32)


def steps(format: Integers, weight: np.ndarray) -> np.ndarray:
    """The distance between two codes, for each group."""
    grouped = weight.reshape(len(weight), -1, format.group or weight.shape[1])
    low, high = grouped.min(-1), grouped.max(-1)
    if format.zero:
        return (np.maximum(high, 0) - np.minimum(low, 0)) / (2**format.bits - 1)
    return np.maximum(-low, high) / (127 if format.bits == 8 else 2 ** (format.bits - 1))


@pytest.mark.parametrize("format", INTEGERS, ids=str)
def test_errors_of_integers_stay_within_half_a_step(format: Integers) -> None:
    weight = normal(40, 96) * np.random.default_rng(0).uniform(1e-3, 10, (40, 1)).astype(np.float32)
    weight[3] = np.abs(weight[3])  # one sign
    groups = weight.reshape(40, -1, format.group or 96)
    params = format.fit(groups)
    error = np.abs(format.decode(format.encode(groups, params), params) - groups).max(-1)
    # Half a step; a whole one at the top of a symmetric group of few bits, which has one code fewer, and with zero
    # points half of one more, since they are rounded too. Scales of groups are rounded to 11 bits.
    most = 1.0 if format.zero or format.bits < 8 else 0.5
    assert (error <= steps(format, weight) * most * 1.02 + np.abs(weight).max() * 2**-11).all()


@pytest.mark.parametrize(("kind", "torch_kind", "most"), [
    (DType.f8e4m3, torch.float8_e4m3fn, 448.0),
    (DType.f8e5m2, torch.float8_e5m2, 57344.0),
])  # fmt: skip
def test_floats_of_eight_bits_round_as_torch_does(kind: DType, torch_kind: torch.dtype, most: float) -> None:
    weight = normal(13, 80)
    codes, scale = round_to_nearest(Floats(kind), weight)
    want = np.abs(weight).max(1, keepdims=True) / np.float32(most)
    np.testing.assert_array_equal(scale, want)
    other = torch.from_numpy(weight * (np.float32(1) / want)).clamp(-most, most).to(torch_kind)
    np.testing.assert_array_equal(codes.view(np.uint8), other.view(torch.uint8).numpy())


def microscaled(block: np.ndarray) -> tuple[int, list[float]]:
    """The exponent and the elements of one block, as the standard words it, in exact arithmetic."""
    exponent = 0
    most = max(map(abs, map(float, block)))
    while most and 2.0 ** (exponent + 1) <= most / 4:
        exponent += 1
    while most and 2.0**exponent > most / 4:
        exponent -= 1
    grid = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    found = []
    for number in map(float, block):
        size = abs(number) / 2.0**exponent
        index = min(range(8), key=lambda i: (abs(grid[i] - size), i % 2))  # a tie goes to the even mantissa
        found.append(float(np.copysign(grid[index], number)))
    return exponent, found


def test_microscaling_is_the_standard() -> None:
    weight = normal(24, 64) * np.exp2(np.random.default_rng(0).integers(-30, 30, (24, 1))).astype(np.float32)
    weight[0, :32] = np.arange(32) / 4  # ties, and numbers beyond the largest code
    weight[1] = 4.0
    weight[2] = np.nextafter(np.float32(8), np.float32(0))
    weight[3] = 0
    codes, scale = round_to_nearest(Microscaling(), weight)
    for row in range(24):
        for group in range(2):
            exponent, want = microscaled(weight[row, 32 * group : 32 * group + 32])
            assert float(scale[row, group]) == 2.0**exponent
            np.testing.assert_array_equal(codes[row, 32 * group : 32 * group + 32].astype(np.float32), want)


@pytest.mark.parametrize("most", [2.0**-149, 2.0**-126, 3.4e38])
def test_microscaling_reaches_the_ends_of_f32(most: float) -> None:
    weight = np.full((1, 32), most, np.float32)
    codes, scale = round_to_nearest(Microscaling(), weight)
    got = codes.astype(np.float64) * scale.astype(np.float64)
    assert (np.abs(got - np.float64(weight)) <= max(float(weight[0, 0]) / 4, 2.0**-127)).all()


def test_the_table_of_normal_floats_holds_quantiles_of_the_normal_distribution() -> None:
    quantile = NormalDist().inv_cdf
    high = [quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    low = [-quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    want = np.sort([*high, 0.0, *low]) / max(high)
    np.testing.assert_allclose(NORMAL_FLOATS, want, atol=2e-7)
    table, scale = round_to_nearest(NormalFloat(64), normal(5, 128))[1:]
    np.testing.assert_array_equal(table, NORMAL_FLOATS[None])
    np.testing.assert_array_equal(scale, np.abs(normal(5, 128).reshape(5, 2, 64)).max(-1).astype(np.float16))


def test_ternary_scales_are_mean_magnitudes() -> None:
    weight = normal(6, 64)
    codes, scale = round_to_nearest(Ternary(), weight)
    mean = np.abs(weight).mean(1, keepdims=True)
    np.testing.assert_allclose(scale, mean, rtol=1e-6)
    np.testing.assert_array_equal(codes.astype(np.float32), np.sign(weight) * (np.abs(weight) > mean / 2))


# ---- codebooks ---------------------------------------------------------------------------------------------------


def best_clusters(row: np.ndarray, weight: np.ndarray, count: int) -> float:
    """The least weighted squared distance to ``count`` centres, by dynamic programming over the sorted row."""
    order = np.argsort(row)
    x, w = row[order].astype(float), weight[order].astype(float)

    def cost(a: int, b: int) -> float:
        mean = (x[a:b] * w[a:b]).sum() / w[a:b].sum()
        return float((w[a:b] * (x[a:b] - mean) ** 2).sum())

    best = [0.0] + [np.inf] * len(x)
    for _ in range(count):
        best = [0.0] + [min(best[a] + cost(a, b) for a in range(b)) for b in range(1, len(x) + 1)]
    return best[-1]


def distance(rows: np.ndarray, centres: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return (np.square(rows[:, :, None] - centres[:, None]).min(-1) * weight).sum(-1)


@pytest.mark.parametrize("weighted", [False, True])
def test_clusters_are_near_the_best_there_are(weighted: bool) -> None:
    rows = np.concatenate([normal(4, 40), np.random.default_rng(3).standard_t(3, (4, 40)).astype(np.float32)])
    weight = np.random.default_rng(4).uniform(0, 1, 40) ** 2 if weighted else np.ones(40)
    got = distance(rows, clusters(rows, 4, weight if weighted else None), weight)
    want = np.array([best_clusters(row, weight, 4) for row in rows])
    assert (got >= want * (1 - 1e-6)).all()
    assert got.sum() <= 1.15 * want.sum()


def test_centres_are_the_means_of_their_clusters() -> None:
    rows = normal(5, 1000)
    weight = np.random.default_rng(4).uniform(0, 1, 1000)
    for row, centres in zip(rows, clusters(rows, 8, weight)):
        nearest = np.abs(row[:, None] - centres).argmin(1)
        means = [np.average(row[nearest == i], weights=weight[nearest == i]) for i in range(8)]
        np.testing.assert_allclose(centres, means, atol=0.02)
        assert (np.diff(centres) > 0).all()


def test_rows_of_few_numbers_are_exact() -> None:
    rows = np.random.default_rng(0).choice(np.float32([-3, -0.5, 0, 0.25, 7]), (20, 200))
    codes, table = round_to_nearest(Codebook(3), rows)
    np.testing.assert_array_equal(np.take_along_axis(table, codes.astype(int), 1), rows)


def test_clusters_go_where_the_importance_is() -> None:
    rows = np.tile(normal(1, 256), (3, 1))
    importance = np.where(rows[0] > 0, 1, 1e-4)
    plain, weighted = clusters(rows, 8), clusters(rows, 8, importance)
    assert ((weighted > 0).sum(1) > (plain > 0).sum(1)).all()
    assert (distance(rows, weighted, importance) < distance(rows, plain, importance)).all()
    np.testing.assert_array_equal(weighted[0], weighted[2])
    np.testing.assert_array_equal(clusters(rows, 8, np.zeros(256)), plain)


def test_rows_are_clustered_alike_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = normal(20, 100)
    whole = clusters(rows, 8)
    monkeypatch.setattr("tilewright.passes.formats.kmeans._AT_ONCE", 300)
    np.testing.assert_array_equal(clusters(rows, 8), whole)


def test_fitted_tables_are_better_than_fixed_ones() -> None:
    weight = normal(8, 1024)
    error = {}
    for format in (Integers(3), Codebook(3), Integers(4), Codebook(4)):
        groups = weight.reshape(8, 1, -1)
        params = format.fit(groups)
        error[format] = np.square(format.decode(format.encode(groups, params), params) - groups).mean()
    assert error[Codebook(3)] < 0.65 * error[Integers(3)]
    assert error[Codebook(4)] < 0.65 * error[Integers(4)]
    # the least mean squared errors of quantizers of normal numbers with 8 and 16 levels (Max 1960)
    assert error[Codebook(3)] < 1.02 * 0.03454
    assert error[Codebook(4)] < 1.02 * 0.009497


# ---- two levels --------------------------------------------------------------------------------------------------


def test_no_code_of_two_levels_expands_beyond_eight_bits() -> None:
    rng = np.random.default_rng(0)
    fitted = rng.standard_normal((64, 8, 32)).astype(np.float32)
    fitted[:, 0] *= 30  # most groups get small steps, the first one the largest
    fitted[1, 0], fitted[2, 0], fitted[3] = 100, -100, np.abs(fitted[3])
    params = TwoLevel(32).fit(fitted)
    for w in (fitted, fitted * 3, -fitted, np.sign(fitted) * 1e6):  # also what was not fitted
        codes = TwoLevel(32).encode(w, params).astype(int)
        wide = (codes - params["zero"].astype(int)[..., None]) * params["step"].astype(int)[..., None]
        assert codes.min() >= 0
        assert codes.max() <= 15
        assert wide.min() >= -128
        assert wide.max() <= 127


def test_two_levels_cost_little_against_one() -> None:
    weight = normal(16, 512).reshape(16, 4, 128)
    error = {}
    for format in (Integers(4, 128, zero=True), TwoLevel(128)):
        params = format.fit(weight)
        error[format] = np.square(format.decode(format.encode(weight, params), params) - weight).mean()
    assert error[TwoLevel(128)] < 1.1 * error[Integers(4, 128, zero=True)]


def test_steps_are_chosen_by_the_error_that_matters() -> None:
    weight = normal(64, 64).reshape(64, 2, 32)
    importance = np.random.default_rng(1).uniform(0, 1, (2, 32)).astype(np.float32) ** 4
    plain, weighted = TwoLevel(32).fit(weight), TwoLevel(32).fit(weight, importance=importance)
    errors = [
        (np.square(TwoLevel(32).decode(TwoLevel(32).encode(weight, p), p) - weight) * importance).sum(-1)
        for p in (weighted, plain)
    ]
    assert (errors[0] <= errors[1]).all()
    assert any((a != b).any() for a, b in pairwise([plain["step"], weighted["step"]]))
