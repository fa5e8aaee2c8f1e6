"""Every format of the table: what it stores, that it means what it encodes, and numbers that are hard."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

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
    verify,
)
from tilewright.passes.formats import SCHEMES, Format, Params, find_scheme, round_to_nearest
from tilewright.passes.formats.codebook import Codebook, NormalFloat
from tilewright.passes.formats.floats import Floats, Microscaling
from tilewright.passes.formats.integers import Integers
from tilewright.passes.formats.ternary import Ternary
from tilewright.passes.formats.two_level import TwoLevel

FORMATS: list[Format] = [
    *(Integers(bits, group, zero) for bits in (8, 4, 3, 2) for group in (0, 32) for zero in (False, True)),
    *(Ternary(group) for group in (0, 32)),
    *(Floats(codes, group) for codes in (DType.f8e4m3, DType.f8e5m2) for group in (0, 32)),
    Microscaling(),
    *(NormalFloat(group) for group in (32, 96)),
    *(Codebook(bits) for bits in (4, 3, 2)),
    *(TwoLevel(group) for group in (32, 96)),
]
SHAPES = [(1, 96), (7, 96), (33, 192), (5, 97)]
each_format = pytest.mark.parametrize("format", FORMATS, ids=str)
each_scheme = pytest.mark.parametrize("name", SCHEMES)


def numbers(n: int, k: int) -> np.ndarray:
    """Rows of very different size, one of zeros, one of one sign, one with an outlier."""
    rng = np.random.default_rng(n)
    w = (rng.standard_normal((n, k)) * rng.uniform(1e-3, 10, (n, 1))).astype(np.float32)
    if n > 3:
        w[1], w[2], w[3, 5] = 0, np.abs(w[2]), 100
    return w


def grouped(format: Format, w: np.ndarray) -> np.ndarray:
    return w.reshape(len(w), format.groups(w.shape[1]), -1)


def meaning(format: Format, w: np.ndarray, dtype: DType = DType.f32) -> np.ndarray:
    """What the interpreter makes of the stored parts; checks their types."""
    module = Module("m")
    function = module.add(Function("forward"))
    types = format.parts("w", *w.shape)
    arrays = round_to_nearest(format, w)
    weights = [module.weight(name, t, ArraySource(a)) for (name, t), a in zip(types.items(), arrays, strict=True)]
    function.append(Return((format.value(Builder(function).add, weights, dtype),)))
    verify(module)
    return interpret(module, "forward", [])[0]


@pytest.mark.parametrize(("format", "shape"), [(f, s) for f in FORMATS for s in SHAPES if not f.unfit(*s)], ids=str)
def test_decoding_is_what_the_operations_mean(format: Format, shape: tuple[int, int]) -> None:
    w = numbers(*shape)
    groups = grouped(format, w)
    params = format.fit(groups)
    got = format.decode(format.encode(groups, params), params)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got.reshape(shape), meaning(format, w))
    np.testing.assert_array_equal(got.reshape(shape).astype(DType.bf16.np), meaning(format, w, DType.bf16))


@each_format
def test_codes_are_the_nearest(format: Format) -> None:
    w = numbers(7, 96)
    groups = grouped(format, w)
    params = format.fit(groups)
    codes = format.encode(groups, params)
    kind = next(iter(format.parts("w", *w.shape).values())).dtype
    every = np.arange(1 << kind.bits, dtype=np.uint8)
    if isinstance(format, TwoLevel):  # codes that would expand beyond i8 are not for use
        reached = (every - params["zero"][..., None].astype(int)) * params["step"][..., None]
        usable = (reached >= -128) & (reached <= 127)
    else:
        usable = np.ones((1, 1, len(every)), bool)
    if kind.is_int and kind.value.startswith("i"):
        every = every.view(np.int8) if kind.bits == 8 else (every.astype(np.int8) - (1 << (kind.bits - 1)))
        lowest = -127 if kind.bits == 8 else -1 if isinstance(format, Ternary) else -128
        every = every[every >= lowest]
        usable = usable[..., : len(every)]
    numbers_of = format.decode(np.broadcast_to(every.view(codes.dtype), (*params_grid(format, w), len(every))), params)
    usable = usable & np.isfinite(numbers_of)
    best = np.where(usable[..., None, :], np.abs(groups[..., None] - numbers_of[..., None, :]), np.inf).min(-1)
    error = np.abs(groups - format.decode(codes, params))
    np.testing.assert_allclose(error, best, rtol=1e-5, atol=1e-6)


def params_grid(format: Format, w: np.ndarray) -> tuple[int, int]:
    return len(w), format.groups(w.shape[1])


@each_format
def test_zeros_constants_and_tiny_numbers(format: Format) -> None:
    w = np.zeros((4, 96), np.float32)
    w[1], w[2], w[3, 5] = 0.5, -3.0, 1e-12
    got = meaning(format, w)
    assert np.isfinite(got).all()
    assert not got[0].any()
    coarse = 0.34 if isinstance(format, Microscaling) else 0.07 if isinstance(format, TwoLevel) else 2e-3
    np.testing.assert_allclose(got[1:3], w[1:3], rtol=coarse)
    np.testing.assert_allclose(got[3], w[3], atol=1e-11)


@each_format
def test_groups_are_fitted_one_by_one_like_all_at_once(format: Format) -> None:
    """As methods do that change later groups by what was lost in earlier ones."""
    w = grouped(format, numbers(33, 192))
    shared = format.shared(w)
    whole = format.fit(w)
    parts = [format.fit(w[:, i : i + 1], shared=shared) for i in range(w.shape[1])]
    joined: Params = {key: np.concatenate([p[key] for p in parts], 1) for key in whole}
    codes = np.concatenate([format.encode(w[:, i : i + 1], p) for i, p in enumerate(parts)], 1)
    flat = codes.reshape(33, 192)
    for a, b in zip(format.store(flat, joined), format.store(flat, whole), strict=True):
        np.testing.assert_array_equal(a, b)
    one = format.encode(w[:, :1, 7:8], parts[0])  # one column
    np.testing.assert_array_equal(one, codes[:, :1, 7:8])


@each_format
def test_shrinking_narrows_the_range(format: Format) -> None:
    w = grouped(format, numbers(9, 96)[4:])
    shrink = np.full(w.shape[:2], 0.5, np.float32)
    reach = [np.abs(format.decode(format.encode(w, p), p)).max() for p in (format.fit(w), format.fit(w, shrink))]
    assert 0.4 * reach[0] < reach[1] < 0.75 * reach[0]


@each_format
def test_a_weight_is_encoded_alike_in_blocks_of_rows(format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    w = numbers(50, 96)
    whole = round_to_nearest(format, w.astype(DType.bf16.np))
    monkeypatch.setattr("tilewright.passes.formats.base._ROWS_AT_ONCE", 96 * 7)
    for a, b in zip(whole, round_to_nearest(format, w.astype(DType.bf16.np)), strict=True):
        np.testing.assert_array_equal(a, b)


@each_format
def test_a_scale_that_its_type_cannot_hold_is_refused(format: Format) -> None:
    huge = np.full((2, 96), 1e8, np.float32)
    if any(t.dtype is DType.f16 for t in format.parts("w", 2, 96).values()):
        with pytest.raises(PassError, match=r"@big has numbers up to 1e\+08, too large for its format .* with f32"):
            round_to_nearest(format, huge, name="big")
    else:
        np.testing.assert_allclose(meaning(format, huge), huge, rtol=0.35)


@each_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_the_arithmetic_of_the_format(format: Format, shape: tuple[int, int]) -> None:
    n, k = shape
    if k % (format.group or 1):
        assert format.unfit(n, k) == f"groups of {format.group} do not divide its rows of {k}"
        return
    assert format.unfit(n, k) is None
    arrays = round_to_nearest(format, numbers(n, k))
    types = format.parts("w", n, k)
    assert [(a.shape, a.dtype) for a in arrays] == [(t.shape, t.dtype.np) for t in types.values()]
    assert sum(int(t.bytes) for t in types.values()) == format.size.bytes(n, k, format.groups(k))


@each_scheme
def test_bits_of_a_scheme_are_those_of_its_format(name: str) -> None:
    scheme = find_scheme(name)
    n, k = 256, 8192
    stored = 8 * sum(int(t.bytes) for t in scheme.format.parts("w", n, k).values())
    once_a_row = 0 if scheme.format.group else scheme.format.size.group
    assert stored - (scheme.format.size.row + once_a_row) * n - scheme.format.size.once == scheme.bits * n * k


@each_scheme
def test_options_of_a_scheme_are_fields_of_its_format(name: str) -> None:
    scheme = find_scheme(name)
    fields = {f.name for f in dataclasses.fields(scheme.format)}
    assert set(scheme.format.options) <= fields & {"group", "zero"}
    for option in {"group", "zero"} - set(scheme.format.options):
        with pytest.raises(PassError, match=rf"scheme {name} has no option '{option}'; of group and zero it has "):
            scheme.with_options(name, **{option: 64})


def test_groups_are_checked() -> None:
    for name in ("two-level", "nf4"):
        with pytest.raises(PassError, match="choose one of 1 or more elements, such as group="):
            find_scheme(name).with_options(name, group=0)
    with pytest.raises(PassError, match="a group has 1 or more elements"):
        find_scheme("fp8").with_options("fp8", group=-1)


def test_types_of_parts_are_as_wide_as_they_say() -> None:
    assert TensorType((5, 7), DType.i3).bytes == 14  # 105 bits
    assert Integers(3).size.bytes(5, 7, 1) == 14 + 5 * 4
