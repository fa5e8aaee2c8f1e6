"""Patterns, and methods that make zeros, against plain definitions."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from tilewright.ir import DType, PassError
from tilewright.passes.calibration.statistics import hessian
from tilewright.passes.sparsity.inputs import Inputs
from tilewright.passes.sparsity.methods import METHODS, find_method
from tilewright.passes.sparsity.patterns import Pattern, find_pattern, lowest

Array = np.ndarray[Any, Any]
PATTERNS = [Pattern(), Pattern(4), Pattern(8), Pattern(1, 2, 4), Pattern(1, 1, 8), Pattern(2, 3, 4)]
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def layer(n: int, k: int, seed: int = 0) -> tuple[Array, Inputs]:
    """A weight, and inputs whose channels depend on each other, differ in size and are not around 0."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, k)).astype(np.float32)
    x = rng.standard_normal((4 * k, k)) @ (rng.standard_normal((k, k)) * rng.uniform(0.1, 1, k)) + rng.standard_normal(k)
    return w, Inputs([x.astype(np.float32).reshape(2, -1, k)])


def share(pattern: Pattern, sparsity: float = 0.5) -> float:
    return sparsity if pattern.sparsity is None else pattern.sparsity


# ---- patterns ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3, 7, [0, 2, 7, 3, 1]])
def test_the_lowest_of_equal_ones_are_the_first(count: Any) -> None:
    values = np.random.default_rng(0).integers(0, 4, (5, 7)).astype(np.float32)
    want = np.zeros((5, 7), bool)
    for r in range(5):
        for c in sorted(range(7), key=lambda c: (values[r, c], c))[: count if isinstance(count, int) else count[r]]:
            want[r, c] = True
    np.testing.assert_array_equal(lowest(values, np.array(count)), want)


@each_pattern
def test_units_stay_by_what_their_loss_costs(pattern: Pattern) -> None:
    cost = np.random.default_rng(1).uniform(0, 1, (6, 48)).astype(np.float32)
    keep = pattern.keeps(cost, share(pattern))
    size = pattern.span or 48
    for row, kept in zip(cost, keep):
        for start in range(0, 48, size):
            units = [(row[i : i + pattern.group].sum(), i) for i in range(start, start + size, pattern.group)]
            gone = sorted(units)[: round(len(units) * share(pattern))]
            want = np.ones(48, bool)
            for _, i in gone:
                want[i : i + pattern.group] = False
            np.testing.assert_array_equal(kept[start : start + size], want[start : start + size])


@pytest.mark.parametrize("sparsity", [0.013, 0.3333, 0.7, 0.99])
def test_all_rows_together_have_the_zeros_that_were_asked_for(sparsity: float) -> None:
    keep = Pattern().keeps(np.random.default_rng(0).uniform(0, 1, (101, 37)), sparsity)
    assert (~keep).sum() == round(sparsity * keep.size)
    assert np.ptp((~keep).sum(1)) <= 1


@pytest.mark.parametrize(("text", "group", "message"), [
    ("2:2", 1, "there is no pattern '2:2'; there are unstructured and N:M"),
    ("0:4", 1, "there is no pattern"),
    ("2/4", 1, "there is no pattern"),
    ("2:4", 0, "a group of weights has 1 or more; got 0"),
])  # fmt: skip
def test_patterns_that_make_no_sense(text: str, group: int, message: str) -> None:
    with pytest.raises(PassError, match=message):
        find_pattern(text, group)
    assert find_pattern("2:4", 8).unfit(96) is None
    assert find_pattern("2:4", 8).unfit(80) == "the pattern takes 32 neighbours together, which do not divide rows of 80"


# ---- methods -----------------------------------------------------------------------------------------------------


@each_pattern
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_what_stays_is_chosen_by_the_products_of_weights_and_inputs(method: str, pattern: Pattern) -> None:
    w, inputs = layer(7, 64)
    rows = np.concatenate(inputs.arrays).reshape(-1, 64).astype(np.float64)
    size = np.linalg.norm(rows, axis=0) if method == "wanda" else np.ones(64)
    want = np.where(pattern.keeps((np.abs(w) * size) ** 2, share(pattern)), w, 0)
    got = METHODS[method](pattern).prune(w, share(pattern), inputs)
    np.testing.assert_array_equal(got, want)


def eliminated(weight: Array, inputs: Inputs, pattern: Pattern, sparsity: float, block: int) -> Array:
    """The definition: columns one by one, each loss made up for by all that are left, by the inverse of what is left of H.

    What goes is decided for a block at its start, by how much the loss adds once the columns before it are settled.
    """
    h = hessian(inputs.arrays)
    k = len(h)
    hessians = torch.from_numpy(h + 0.01 * np.diag(h).mean() * np.eye(k))
    w, g, span = torch.from_numpy(weight.astype(np.float64)), pattern.group, pattern.span or block
    keep = np.ones(weight.shape, bool)
    for j in range(k):
        if j % span == 0:
            starts = range(j, min(j + span, k), g)
            cost = np.empty((len(weight), len(starts)))
            for u, s in enumerate(starts):
                inner = torch.linalg.inv(torch.linalg.inv(hessians[s:, s:])[:g, :g])
                cost[:, u] = torch.einsum("ni,ij,nj->n", w[:, s : s + g], inner, w[:, s : s + g])
            if pattern.of:
                gone = cost.argsort(1).argsort(1) < pattern.of - pattern.kept
            else:
                gone = (cost.reshape(-1).argsort().argsort() < round(cost.size * sparsity)).reshape(cost.shape)
            keep[:, j : j + span] = ~np.repeat(gone, g, axis=1)
        inverse = torch.linalg.inv(hessians[j:, j:])
        lost = torch.where(torch.from_numpy(keep[:, j]), 0.0, w[:, j])
        w[:, j:] -= torch.outer(lost / inverse[0, 0], inverse[0])
        w[:, j][~keep[:, j]] = 0
    return w.numpy()


@each_pattern
def test_sparsegpt_is_elimination_column_by_column(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilewright.passes.sparsity.sparsegpt.BLOCK", 16)
    w, inputs = layer(9, 64)
    got = METHODS["sparsegpt"](pattern).prune(w, share(pattern), inputs)
    want = eliminated(w, inputs, pattern, share(pattern), 16)
    np.testing.assert_array_equal(got == 0, want == 0)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def error(w: Array, got: Array, inputs: Inputs) -> float:
    e = (w - got).astype(np.float64)
    return float(np.einsum("ij,jk,ik->", e, hessian(inputs.arrays), e))


@each_pattern
def test_data_make_smaller_errors(pattern: Pattern) -> None:
    w, inputs = layer(20, 192)
    found = {m: METHODS[m](pattern).prune(w, share(pattern), inputs) for m in METHODS}
    zeros = {m: (a == 0).sum() for m, a in found.items()}
    assert len(set(zeros.values())) == 1, zeros
    errors = {m: error(w, a, inputs) for m, a in found.items()}
    assert errors["sparsegpt"] < 0.9 * errors["wanda"] < 0.9 * errors["magnitude"]
    assert errors["alps"] < 0.9 * errors["sparsegpt"]


@each_pattern
def test_what_alps_leaves_is_the_least_squares_solution(pattern: Pattern) -> None:
    w, inputs = layer(9, 64)
    got = METHODS["alps"](pattern).prune(w, share(pattern), inputs)
    h = hessian(inputs.arrays)
    h += 0.01 * np.diag(h).mean() * np.eye(64)
    for row, found in zip(w, got):
        stays = found != 0
        want = np.linalg.solve(h[np.ix_(stays, stays)], h[stays] @ row)
        np.testing.assert_allclose(found[stays], want, rtol=2e-2, atol=2e-2)


def test_alps_is_near_the_best_of_all_choices() -> None:
    w, inputs = layer(24, 10)
    h = hessian(inputs.arrays)
    best = np.full(24, np.inf)
    for stays in map(list, combinations(range(10), 5)):
        part = np.zeros_like(w, np.float64)
        part[:, stays] = np.linalg.solve(h[np.ix_(stays, stays)], h[stays] @ w.T).T
        best = np.minimum(best, np.einsum("ni,ij,nj->n", w - part, h, w - part))
    errors = {m: error(w, METHODS[m](Pattern()).prune(w, 0.5, inputs), inputs) for m in ("sparsegpt", "alps")}
    assert errors["alps"] < 1.35 * best.sum() < errors["sparsegpt"]


@each_pattern
@pytest.mark.parametrize("method", METHODS)
def test_zeros_that_are_there_stay_and_count(method: str, pattern: Pattern) -> None:
    w, inputs = layer(16, 64)
    pruned = METHODS["magnitude"](pattern).prune(w, share(pattern, 0.4))
    got = METHODS[method](pattern).prune(pruned, share(pattern), inputs)
    assert not got[pruned == 0].any()
    assert (got == 0).sum() == max(round(share(pattern) * got.size), (pruned == 0).sum())


@pytest.mark.parametrize("dtype", [DType.f32, DType.bf16, DType.f16], ids=lambda d: d.value)
@pytest.mark.parametrize("method", METHODS)
def test_zeros_are_exact_and_positive_in_any_type(method: str, dtype: DType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilewright.passes.sparsity.methods._AT_ONCE", 64 * 7)
    w, inputs = layer(23, 64)
    w[:, ::5] = -0.0
    w[3], w[4] = 1e-41, -1e-41
    got = METHODS[method](Pattern()).prune(w.astype(dtype.np), 0.5, inputs)
    assert got.dtype == dtype.np
    assert (got == 0).mean() >= 0.5
    assert not np.signbit(got[got == 0].astype(np.float32)).any()


def test_channels_that_no_input_reached_go_first() -> None:
    w, inputs = layer(6, 64)
    inputs.arrays[0][..., [3, 40, 63]] = 0
    for method in ("wanda", "sparsegpt", "alps"):
        got = METHODS[method](Pattern()).prune(w, 0.25, inputs)
        assert not got[:, [3, 40, 63]].any()


def test_numbers_that_are_not_finite_are_named() -> None:
    w, _ = layer(6, 64)
    bad = Inputs([np.full((4, 64), np.nan, np.float32)], name="up.weight")
    for method in ("wanda", "sparsegpt", "alps"):
        with pytest.raises(PassError, match=r"the inputs of the layer with @up\.weight became NaN or infinite"):
            METHODS[method](Pattern()).prune(w, 0.5, bad)
    w[2, 1] = np.inf
    with pytest.raises(PassError, match=r"@up\.weight has numbers that are NaN or infinite, first in row 2"):
        METHODS["magnitude"](Pattern()).prune(w, 0.5, name="up.weight")


# ---- dsnot -------------------------------------------------------------------------------------------------------


def exchanged(w: Array, keep: Array, inputs: Inputs, pattern: Pattern) -> Array:
    """DSnoT for single weights, row by row."""
    x = np.concatenate(inputs.arrays).reshape(-1, w.shape[1]).astype(np.float64)
    mean, var, norm = x.mean(0), x.var(0), np.sqrt((x**2).mean(0))
    keep = keep.copy()
    for row, kept in zip(w.astype(np.float64), keep):
        for _ in range(50):
            off = float((row * mean)[~kept].sum())
            back = max(np.flatnonzero(~kept), key=lambda i: np.sign(off) * row[i] * mean[i] / var[i])
            size = pattern.of or len(row)
            near = range(back // size * size, (back // size + 1) * size)
            may = [i for i in near if kept[i] and np.sign(off) * row[i] * mean[i] < 0]
            if not may:
                break
            gone = min(may, key=lambda i: abs(row[i]) * norm[i])
            if abs(off - row[back] * mean[back] + row[gone] * mean[gone]) >= abs(off):
                break
            kept[back], kept[gone] = True, False
    return keep


@pytest.mark.parametrize("pattern", [Pattern(), Pattern(1, 2, 4)], ids=str)
def test_dsnot_is_its_definition_and_brings_means_of_outputs_nearer(pattern: Pattern) -> None:
    w, inputs = layer(30, 64)
    plain = METHODS["wanda"](pattern).prune(w, 0.5, inputs)
    got = find_method("wanda", "dsnot", pattern).prune(w, 0.5, inputs)
    np.testing.assert_array_equal(got, np.where(exchanged(w, plain != 0, inputs, pattern), w, 0))
    off = [np.abs((a - w) @ inputs.mean).mean() for a in (plain, got)]
    assert off[1] < 0.6 * off[0]


@each_pattern
def test_dsnot_keeps_the_pattern(pattern: Pattern) -> None:
    w, inputs = layer(12, 64, seed=3)
    got = find_method("magnitude", "dsnot", pattern).prune(w, 0.5, inputs) != 0
    units = got.reshape(12, -1, pattern.group)
    assert (units.all(-1) | ~units.any(-1)).all()
    counts = units[..., 0].reshape(12, -1, pattern.of or units.shape[1]).sum(-1)
    assert (counts == (pattern.kept or units.shape[1] // 2)).all()


@pytest.mark.parametrize(("method", "refine", "message"), [
    ("wand", "none", r"prune has no method 'wand' \(did you mean wanda\?\); there are magnitude, wanda, sparsegpt, alps"),
    ("wanda", "dsn", r"prune has no refine 'dsn' \(did you mean dsnot\?\); there are none, dsnot"),
    ("sparsegpt", "dsnot", "refine=dsnot swaps weights that stay as they are, method=sparsegpt changes them: leave one"),
])  # fmt: skip
def test_methods_that_do_not_exist(method: str, refine: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        find_method(method, refine, Pattern())
