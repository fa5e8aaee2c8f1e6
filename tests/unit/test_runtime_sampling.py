"""Native sampling against an independent, plain implementation, compiled for plain x86-64 and for wide vectors."""

from __future__ import annotations

import ctypes
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.toy_artifact import compile_c
from tilewright.runtime import InputError, ProgramError
from tilewright.runtime.host import cpu_features
from tilewright.runtime.native import Library
from tilewright.runtime.sampling import Sampler, Sampling, generators

WIDE = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
FLAGS = {"plain": [], "avx2": WIDE[:2], "avx512": WIDE}


@pytest.fixture(scope="module", params=FLAGS)
def library(request, tmp_path_factory):
    """The runtime's native code for vectors of 16, 32 and 64 bytes."""
    if request.param != "plain" and not {"avx2", "fma"} <= cpu_features():
        pytest.skip("the host has no AVX2")
    if request.param == "avx512" and not {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= cpu_features():
        pytest.skip("the host has no AVX-512")
    path = tmp_path_factory.mktemp("sampling") / "native.so"
    path.write_bytes(compile_c("", *FLAGS[request.param]))
    with open(path, "rb") as file:
        return Library(file.fileno(), str(path), [])


@pytest.fixture(scope="module")
def choose(library):
    """choose(logits, generator, temperature, top_k, top_p)"""
    return lambda logits, generator, *options: Sampler(library, Sampling(*options)).choose(logits, generator)


class Fixed:
    """A generator that draws one given number."""

    def __init__(self, number):
        self.number = number

    def random(self):
        return self.number


def plain(logits, temperature, top_k, top_p, number):
    """The definition, in Python numbers: returns the token, and how near the draw was to another one."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = order[:top_k] if top_k else order
    weight = {i: math.exp((logits[i] - logits[order[0]]) / temperature) for i in kept}
    if top_p < 1:
        nucleus, mass = [], 0.0
        for token in kept:
            nucleus.append(token)
            mass += weight[token]
            if mass >= top_p * math.fsum(weight.values()):
                break
        kept = nucleus
    total = math.fsum(weight[i] for i in kept)
    reached = 0.0
    for token in sorted(kept):
        reached += weight[token]
        if number * total < reached:
            return token
    return max(kept)


VALUES = st.one_of(st.integers(-4, 4).map(float), st.floats(-20, 20).map(lambda v: round(v, 3)), st.just(-math.inf))


@settings(max_examples=300, deadline=None)
@given(
    logits=st.lists(VALUES, min_size=1, max_size=12).filter(lambda v: max(v) > -math.inf),
    temperature=st.sampled_from([0.25, 0.7, 1.0, 3.0]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.1, 0.37, 0.6, 0.95, 1.0]),
    number=st.floats(0.001, 0.999),
)
def test_agrees_with_the_definition(choose, logits, temperature, top_k, top_p, number):
    logits = np.array(logits, np.float32).tolist()
    expected = plain(logits, temperature, top_k, top_p, number)
    got = choose(np.array(logits, np.float32), Fixed(number), temperature, top_k, top_p)
    edges = [(n, p) for n in (number - 1e-9, number + 1e-9) for p in (top_p - 1e-9, top_p)]
    near = {plain(logits, temperature, top_k, p, n) for n, p in edges}
    assert got == expected or got in near  # a draw on the very edge may fall on either side


def quick(logits, temperature, top_k, top_p, number):
    """``plain`` in numpy, for large vocabularies."""
    order = np.lexsort((np.arange(logits.size), -logits.astype(np.float64)))
    kept = order[:top_k] if top_k else order
    weight = np.exp((logits[kept].astype(np.float64) - float(logits[order[0]])) / temperature)
    if top_p < 1:
        kept = kept[: int(np.searchsorted(np.cumsum(weight), top_p * weight.sum())) + 1]
    weight = weight[: kept.size][np.argsort(kept)]
    return int(np.sort(kept)[np.searchsorted(np.cumsum(weight), number * weight.sum(), side="right")])


LIMITS = [(1.0, 0, 1.0), (1.0, 0, 0.9), (0.3, 0, 0.95), (0.7, 50, 1.0), (1.3, 77, 0.5), (1.0, 1000, 0.99),
          (1.0, 20_000, 1.0), (1.0, 151_935, 0.3)]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("size", [1, 255, 256, 257, 5000, 151_936])
def test_large_vocabularies_agree_with_the_definition(choose, size, dtype):
    random = np.random.default_rng(size)
    logits = (random.standard_normal(size) * 3).astype(dtype)
    for number in (0.0, 0.01, 0.3, 0.77, 0.9999):
        for options in LIMITS:
            assert choose(logits, Fixed(number), *options) == quick(logits, *options, number), (options, number)


@pytest.mark.parametrize("order", ["rising", "falling", "equal", "two values"])
def test_selection_in_any_order(choose, order):
    """What a selection by partition, or by a bound that rises, may do badly."""
    logits = np.linspace(-4, 4, 3000, dtype=np.float32)
    logits = {"rising": logits, "falling": logits[::-1].copy(), "equal": np.zeros_like(logits),
              "two values": np.where(logits * 1e3 % 7 < 3, np.float32(1), np.float32(-1))}[order]  # fmt: skip
    for options in [(1.0, 40, 1.0), (1.0, 40, 0.5), (1.0, 0, 0.5), (1.0, 2999, 1.0), (1.0, 1, 1.0)]:
        for number in (0.0, 0.25, 0.9999):
            assert choose(logits, Fixed(number), *options) == quick(logits, *options, number)


def test_every_half_is_read_as_the_number_it_is(choose):
    """Finite f16 and bf16 against f32, subnormals included: alone beside a larger and a smaller one."""
    for dtype in (np.float16, ml_dtypes.bfloat16):
        values = np.arange(2**16, dtype=np.uint16).view(dtype)
        values = values[np.isfinite(values.astype(np.float32))]
        ascending = values[np.argsort(values.astype(np.float32), kind="stable")]
        for begin in range(0, ascending.size, 997):
            row = ascending[begin : begin + 997].copy()
            assert choose(row, None) == int(np.argmax(row.astype(np.float32)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_greedy_takes_the_smallest_of_the_largest(choose, dtype):
    logits = np.array([0, 3, -math.inf, 3, 1], dtype)
    assert choose(logits, None) == 1
    assert choose(logits, Fixed(0.99), 2.0, 1) == 1
    assert choose(logits, Fixed(0.2), 1e-9) == 1
    assert choose(logits, Fixed(0.8), 1e-9) == 3
    assert choose(logits, Fixed(0.8), 5e-324) == 3
    assert choose(np.array([-1, -0.0, 0.0], dtype), None) == 1
    assert choose(np.array([1, math.inf, math.inf], dtype), Fixed(0.9), 1.0) == 1


def test_every_second_of_a_larger_array(choose):
    assert choose(np.array([1, 9, 2, 9, 3, 9], np.float32)[::2], None) == 2


def test_impossible_tokens_are_never_drawn(choose):
    logits = np.array([-math.inf, 0.0, -math.inf, -1e30], np.float32)
    for number in (0.0, 0.5, 1 - 2**-53):
        for options in [(1.0,), (1.0, 3), (1.0, 2), (1.0, 0, 0.999), (1.0, 4, 0.999)]:
            assert choose(logits, Fixed(number), *options) == 1


def chi_square(counts, probabilities):
    expected = np.asarray(probabilities) * sum(counts)
    return float((((counts - expected) ** 2) / expected).sum())


OPTIONS = [((0.8,), 40), ((0.8, 12), 12), ((0.8, 0, 0.6), None), ((0.8, 20, 0.6), None)]


@pytest.mark.parametrize(("options", "kept"), OPTIONS)
def test_frequencies_follow_the_probabilities(choose, options, kept):
    """Pearson's chi-square of 20,000 draws, below the value that a right sampler exceeds once in 10^5."""
    logits = (np.random.default_rng(5).standard_normal(40) * 1.5).astype(np.float32)
    order = np.argsort(-logits)
    weight = np.exp(logits[order].astype(np.float64) / options[0])[: (options[1:2] or [0])[0] or None]
    if len(options) == 3:
        kept = int(np.searchsorted(np.cumsum(weight), options[2] * weight.sum())) + 1
    random = np.random.default_rng(0)
    counts = np.bincount([choose(logits, random, *options) for _ in range(20_000)], minlength=40)[order]
    assert counts[kept:].sum() == 0
    freedom = kept - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 4.265 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty
    assert chi_square(counts[:kept], weight[:kept] / weight[:kept].sum()) < bound


def test_limits_that_do_not_limit_change_nothing(choose):
    logits = np.random.default_rng(1).standard_normal(100).astype(np.float32)
    for number in np.linspace(0.001, 0.999, 50):
        free = choose(logits, Fixed(number), 1.0)
        assert free == choose(logits, Fixed(number), 1.0, 100)
        assert free == choose(logits, Fixed(number), 1.0, 10**30)


@pytest.mark.parametrize("logits", [[math.nan, 1.0], [1.0, -math.nan], [math.inf, math.nan], [-math.inf] * 300])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_impossible_logits(choose, logits, dtype, temperature):
    with pytest.raises(ProgramError, match="NaN or are all -inf"):
        choose(np.array(logits, dtype), Fixed(0.5), temperature)


def test_nan_of_either_sign_anywhere(choose):
    for at in (0, 299, 300, 999):
        for bits in (0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001):
            logits = np.zeros(1000, np.float32)
            logits.view(np.uint32)[at] = bits
            with pytest.raises(ProgramError, match="NaN"):
                choose(logits, None)


def test_no_memory_is_an_error(library):
    class Full:
        sample = staticmethod(lambda *arguments: -2)

    with pytest.raises(MemoryError, match="candidates among 3 tokens"):
        Sampler(Full(), Sampling(1.0, 2)).choose(np.zeros(3, np.float32), Fixed(0.5))
    assert library.sample.restype is ctypes.c_int64


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}, {"temperature": "1"}, {"top_k": -1},
     {"top_k": 1.5}, {"top_p": 0}, {"top_p": 1.1}, {"top_p": math.nan}],
)  # fmt: skip
def test_wrong_options(options):
    (name,) = options
    with pytest.raises(InputError, match=f"{name}: expected"):
        Sampling(**options)


def draws(prompts, seed):
    return [g.random() for g in generators([np.array(p, np.int64) for p in prompts], seed)]


def test_a_sequence_draws_the_same_in_any_batch():
    alone = {p: draws([p], 7)[0] for p in [(1, 2), (3,), (1,)]}
    assert draws(list(alone), 7) == list(alone.values())
    assert draws(list(alone)[::-1], 7) == list(alone.values())[::-1]
    assert len({*alone.values(), *draws(list(alone), 8)}) == 6


def test_equal_prompts_draw_differently():
    first, second, other, third = draws([(1, 2), (1, 2), (9,), (1, 2)], 7)
    assert len({first, second, third, other}) == 4
    assert first == draws([(1, 2)], 7)[0]


def test_one_seed_for_each_prompt():
    assert draws([(1,), (2,), (3,)], [5, 5, 6])[0] == draws([(8,)], [5])[0]
    a, b, c = draws([(1,), (2,), (3,)], [5, 5, 6])
    assert a == b != c


@pytest.mark.parametrize("seed", [-1, 1.5, [1], [1, -2], [1, True]])
def test_wrong_seed(seed):
    with pytest.raises((InputError, TypeError)):
        draws([(1,), (2,)], seed)
