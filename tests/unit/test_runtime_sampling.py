"""Sampling against an independent, plain implementation."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.runtime import InputError, ProgramError
from tilewright.runtime.sampling import Sampling, generators


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
def test_agrees_with_the_definition(logits, temperature, top_k, top_p, number):
    expected = plain(logits, temperature, top_k, top_p, number)
    got = Sampling(temperature, top_k, top_p).choose(np.array(logits), Fixed(number))
    edges = [(n, p) for n in (number - 1e-9, number + 1e-9) for p in (top_p - 1e-9, top_p)]
    near = {plain(logits, temperature, top_k, p, n) for n, p in edges}
    assert got == expected or got in near  # a draw on the very edge may fall on either side


def test_large_vocabulary_agrees_with_the_definition():
    random = np.random.default_rng(0)
    logits = (random.standard_normal(5000) * 3).astype(np.float32)
    for number in (0.01, 0.3, 0.77, 0.999):
        for settings_ in [(1.0, 0, 0.9), (0.7, 50, 1.0), (1.3, 77, 0.5), (1.0, 1000, 1.0), (1.0, 0, 1.0)]:
            expected = plain(logits.astype(float).tolist(), *settings_, number)
            assert Sampling(*settings_).choose(logits, Fixed(number)) == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_greedy_takes_the_smallest_of_the_largest(dtype):
    logits = np.array([0, 3, -math.inf, 3, 1], dtype)
    assert Sampling().choose(logits, None) == 1
    assert Sampling(temperature=2.0, top_k=1).choose(logits, Fixed(0.99)) == 1
    assert Sampling(temperature=1e-9).choose(logits, Fixed(0.2)) == 1
    assert Sampling(temperature=1e-9).choose(logits, Fixed(0.8)) == 3


def test_impossible_tokens_are_never_drawn():
    logits = np.array([-math.inf, 0.0, -math.inf])
    for number in (0.0, 0.5, 1 - 2**-53):
        assert Sampling(1.0).choose(logits, Fixed(number)) == 1


def test_frequencies_follow_the_probabilities():
    logits = np.log([0.5, 0.25, 0.15, 0.1])
    random = np.random.default_rng(0)
    counts = np.bincount([Sampling(1.0).choose(logits, random) for _ in range(20_000)], minlength=4) / 20_000
    assert np.allclose(counts, [0.5, 0.25, 0.15, 0.1], atol=0.015)
    counts = np.bincount([Sampling(1.0, 0, 0.7).choose(logits, random) for _ in range(20_000)], minlength=4) / 20_000
    assert np.allclose(counts, [2 / 3, 1 / 3, 0, 0], atol=0.015)


def test_limits_that_do_not_limit_change_nothing():
    logits = np.random.default_rng(1).standard_normal(100)
    for number in np.linspace(0.001, 0.999, 50):
        free = Sampling(1.0).choose(logits, Fixed(number))
        assert free == Sampling(1.0, 100).choose(logits, Fixed(number))
        assert free == Sampling(1.0, 500).choose(logits, Fixed(number))


@pytest.mark.parametrize("logits", [[math.nan, 1.0], [-math.inf, -math.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_impossible_logits(logits, temperature):
    with pytest.raises(ProgramError, match="NaN or are all -inf"):
        Sampling(temperature).choose(np.array(logits), Fixed(0.5))


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
