"""GPTQ and the clipping search: against plain definitions, over every format, and on a language model."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.test_calibration import decoder, given, ids
from tests.unit.test_formats import FORMATS, grouped
from tilewright.ir import (
    ArraySource,
    Builder,
    DType,
    Function,
    Module,
    PassError,
    Return,
    TensorType,
    interpret,
    ops,
    sym,
)
from tilewright.passes.base import PassContext
from tilewright.passes.calibration.clip import clipped, group_errors, search
from tilewright.passes.calibration.gptq import Gptq, added, inverse_factor, inverse_lower
from tilewright.passes.calibration.spill import SpilledSource
from tilewright.passes.formats import Format, Params, round_to_nearest
from tilewright.passes.formats.codebook import Codebook
from tilewright.passes.formats.integers import Integers
from tilewright.passes.pipeline import Pipeline

Array = np.ndarray[Any, Any]
each_format = pytest.mark.parametrize("format", FORMATS, ids=str)
GPTQ_FORMATS = [Integers(4), Integers(4, 32), Integers(3, 32, True), Integers(4, 64), Codebook(3)]


def layer(n: int, k: int, seed: int = 0) -> tuple[Array, Array]:
    """A weight, and the Hessian of inputs whose channels depend on each other and differ in size."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, k)).astype(np.float32)
    x = rng.standard_normal((4 * k, k)) @ (rng.standard_normal((k, k)) * rng.uniform(0.1, 1, k))
    return w, x.T @ x / len(x)


def meaning(format: Format, weight: Array, arrays: tuple[Array, ...]) -> Array:
    """What the IR makes of stored arrays."""
    module = Module("m")
    function = module.add(Function("forward"))
    types = format.parts("w", *weight.shape)
    parts = [module.weight(name, t, ArraySource(a)) for (name, t), a in zip(types.items(), arrays, strict=True)]
    function.append(Return((format.value(Builder(function).add, parts, DType.f32),)))
    return interpret(module, "forward", [])[0]


def error(w: Array, got: Array, h: Array) -> float:
    e = (w - got).astype(np.float64)
    return float(np.einsum("ij,jk,ik->", e, h, e))


def compensated(method: Gptq, w: Array, h: Array, name: str = "weight") -> tuple[tuple[Array, ...], Array]:
    """The arrays, and what they mean."""
    return method.round(w, method.prepare(h, name), name)


def reference(format: Format, weight: Array, h: Array, damping: float, order: bool) -> Array:
    """The definition: round a column, give its error to those left by the inverse of what is left of H (OBQ).

    What is exactly 0 in ``weight`` is rounded as 0.
    """
    k = weight.shape[1]
    size = k // format.groups(k)
    importance = np.diag(h).astype(np.float32).reshape(-1, size)
    h = torch.from_numpy(h + damping * np.diag(h).mean() * np.eye(k))
    w = torch.from_numpy(weight.astype(np.float64))
    columns = torch.argsort(-torch.diag(h), stable=True) if order else torch.arange(k)
    shared = format.shared(grouped(format, weight), importance)

    def fit(g: int, current: Array) -> Params:
        part = np.where(weight == 0, 0, current)[:, g * size : (g + 1) * size]
        part = np.ascontiguousarray(part, dtype=np.float32)[:, None]
        return format.fit(part, 1.0, importance[g : g + 1], shared)

    fitted = {g: fit(g, weight) for g in range(k // size)} if order else {}
    out = np.empty_like(weight)
    for i, j in enumerate(columns.tolist()):
        if j // size not in fitted:
            fitted[j // size] = fit(j // size, w.numpy())
        params = fitted[j // size]
        column = np.where(weight[:, j] == 0, 0, w[:, j].numpy()).astype(np.float32)[:, None, None]
        out[:, j] = format.decode(format.encode(column, params), params)[:, 0, 0]
        left = columns[i:]
        inverse = torch.linalg.inv(h[left][:, left])
        w[:, left] -= torch.outer((w[:, j] - torch.from_numpy(out[:, j])) / inverse[0, 0], inverse[0])
    return out


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("format", GPTQ_FORMATS, ids=str)
def test_blocks_change_nothing(format: Format, order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilewright.passes.calibration.gptq.BLOCK", 48)  # holds one group of 32, a part of one of 64
    monkeypatch.setattr("tilewright.passes.calibration.gptq._AT_ONCE", 7 * 192)
    w, h = layer(12, 192)
    _, got = compensated(Gptq(format, 0.01, order), w, h)
    np.testing.assert_array_equal(got, reference(format, w, h, 0.01, order))


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("format", GPTQ_FORMATS, ids=str)
def test_exact_zeros_stay_and_others_make_up_for_them(format: Format, order: bool) -> None:
    w, h = layer(12, 128)
    w[np.random.default_rng(2).uniform(size=w.shape) < 0.5] = 0
    _, got = compensated(Gptq(format, 0.01, order), w, h)
    np.testing.assert_array_equal(got, reference(format, w, h, 0.01, order))
    assert not got[w == 0].any()
    nearest = meaning(format, w, round_to_nearest(format, w))
    assert error(w, got, h) < 0.9 * error(w, nearest, h)


@each_format
def test_errors_are_smaller_than_those_of_rounding_and_arrays_mean_them(format: Format) -> None:
    w, h = layer(20, 192)
    nearest = error(w, meaning(format, w, round_to_nearest(format, w)), h)
    arrays, got = compensated(Gptq(format), w, h)
    np.testing.assert_array_equal(meaning(format, w, arrays), got)
    assert error(w, got, h) < 0.75 * nearest
    _, searched = compensated(Gptq(format, clip=True, order=False), w, h)
    assert error(w, searched, h) < 0.8 * nearest


@each_format
def test_the_search_never_raises_the_weighted_error(format: Format) -> None:
    w, h = layer(20, 192, seed=1)
    w[3], w[4, 7] = 0, 9
    importance = np.diag(h).astype(np.float32)
    groups = importance.reshape(format.groups(192), -1)
    plain, found = (meaning(format, w, a) for a in (
        round_to_nearest(format, w, importance), clipped(format, w, importance)))  # fmt: skip
    before, after = (group_errors(grouped(format, w), grouped(format, x), groups) for x in (plain, found))
    assert (after <= before * 1.0001).all()


def test_the_search_finds_the_least_of_all_widths() -> None:
    format, rng = Integers(3, 32), np.random.default_rng(0)
    w = rng.standard_t(3, (5, 2, 32)).astype(np.float32)
    importance = rng.uniform(0.1, 2, (2, 32)).astype(np.float32)
    found = search(format, w, importance, {})
    got = group_errors(w, format.decode(format.encode(w, found), found), importance)
    tried = []
    for width in np.linspace(1, 0.4, 25):
        params = format.fit(w, float(np.float32(width)))
        tried.append((np.square(w - format.decode(format.encode(w, params), params)) * importance).sum(-1))
    np.testing.assert_allclose(got, np.min(tried, axis=0), rtol=1e-5)
    assert (got < 0.9 * tried[0]).any()


def test_channels_that_no_input_reached_are_rounded_to_the_nearest() -> None:
    w, h = layer(6, 64)
    dead = [3, 40, 63]
    h[dead], h[:, dead] = 0, 0
    _, got = compensated(Gptq(Integers(4)), w, h)
    nearest = meaning(Integers(4), w, round_to_nearest(Integers(4), w))
    np.testing.assert_array_equal(got[:, dead], nearest[:, dead])
    assert np.isfinite(compensated(Gptq(Integers(4)), w, np.zeros_like(h))[1]).all()


def test_factors_are_inverses() -> None:
    _, h = layer(1, 150)
    h += np.diag(added(np.diag(h), 0.01))
    u = inverse_factor(h, "w").astype(np.float64)
    np.testing.assert_array_equal(u, np.triu(u))
    np.testing.assert_allclose(u.T @ u @ h, np.eye(150), atol=1e-4)
    lower = np.linalg.cholesky(h)
    np.testing.assert_allclose(inverse_lower(lower) @ lower, np.eye(150), atol=1e-10)


def test_what_is_not_finite_or_not_definite_is_named() -> None:
    w, h = layer(4, 32)
    with pytest.raises(PassError, match=r"@up\.weight.*NaN or infinite"):
        compensated(Gptq(Integers(4)), w, np.full_like(h, np.nan), "up.weight")
    w[2, 1] = np.inf
    with pytest.raises(PassError, match=r"@up\.weight has numbers that are NaN or infinite, first in row 2"):
        compensated(Gptq(Integers(4)), w, h, "up.weight")
    with pytest.raises(PassError, match=r"@up\.weight.*not positive definite; raise damping, or give more calibration"):
        compensated(Gptq(Integers(4), damping=0), np.ones_like(w), np.ones_like(h), "up.weight")


def chain(layers: int, k: int) -> Module:
    """Linear layers one after the other, each of ``k`` channels."""
    module, rng = Module("chain", dims={"B": (1, 512)}), np.random.default_rng(0)
    function = module.add(Function("forward"))
    b = Builder(function)
    x: Any = function.arg("x", TensorType((sym("B"), k), DType.f32))
    for i in range(layers):
        x = b(ops.Linear, x, module.constant((rng.standard_normal((k, k)) / k**0.5).astype(np.float32), f"w{i}"))
    b.insert(Return((x,)))
    return module


def test_numbers_wait_in_a_file_at_their_real_bits() -> None:
    module, k, count = chain(24, 256), 256, 24
    x = np.random.default_rng(1).standard_normal((256, k)).astype(np.float32)
    pipeline = Pipeline.parse("quantize{scheme=w4a16 group=32 method=gptq},dce")
    pipeline.run(chain(1, k), ctx=given([{"x": x}]))  # what is imported and cached stays
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    pipeline.run(module, ctx=given([{"x": x}]))
    held, peak = (m - before for m in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    codes = [w.source for name, w in module.weights.items() if name.endswith(".i4")]
    assert all(isinstance(s, SpilledSource) and s.size == k * k // 2 for s in codes)
    assert len(codes) == count
    assert held < count * k * k // 4, "codes stayed in memory"
    assert peak < count * k * k * 4, "more than some layers were in memory"


def test_the_report_says_how_far_outputs_moved() -> None:
    module, ctx = decoder(), given(ids((4, 64)))
    Pipeline.parse("quantize{scheme=w4a16 group=8 method=gptq}").run(module, ctx=ctx)
    assert any("gptq over 256 tokens: outputs of layers differ by" in line and "most at @" in line for _, line in ctx.notes)
    Pipeline.parse("quantize{scheme=w4a16 group=8 method=clip}").run(decoder(), ctx=(plain := PassContext()))
    assert any("clip without calibration data" in line for _, line in plain.notes)


@pytest.mark.parametrize("scheme", ["w4a16 group=8", "w3a16 group=8", "w8a8", "codebook3", "nf4 group=8"])
@pytest.mark.parametrize("method", ["clip", "gptq", "gptq order=false damping=0.05 clip=true"])
def test_functions_keep_their_meaning(scheme: str, method: str) -> None:
    batch = ids((2, 20), seed=5)[0]
    want = interpret(decoder(), "forward", batch)[0]
    module = decoder()
    Pipeline.parse(f"quantize{{scheme={scheme} method={method}}},dce").run(module, ctx=given(ids((8, 64))))
    got = interpret(module, "forward", batch)[0]
    assert 0 < np.linalg.norm(got - want) < 0.6 * np.linalg.norm(want)
