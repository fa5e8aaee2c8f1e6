"""Choosing a token from logits: greedy, temperature, top-k, top-p; in float64, reproducible for each sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from tilewright.runtime.errors import InputError, ProgramError

Array = np.ndarray[Any, Any]
_BLOCK = 64


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 keep every token; both given, top-k cuts first."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.temperature, int | float) and 0 <= self.temperature < math.inf):
            raise InputError("temperature", "a finite number >= 0", repr(self.temperature))
        if not (isinstance(self.top_k, int) and self.top_k >= 0):
            raise InputError("top_k", "an integer >= 0 (0: no limit)", repr(self.top_k))
        if not (isinstance(self.top_p, int | float) and 0 < self.top_p <= 1):
            raise InputError("top_p", "a number in (0, 1]", repr(self.top_p))

    def choose(self, logits: Array, generator: np.random.Generator) -> int:
        """A token for logits [V]. Draws one number from ``generator`` unless greedy. The smaller id wins a tie.

        Raises ProgramError on NaN logits and when no token is possible.
        """
        best = int(logits.argmax())  # of the first NaN, if there is one
        highest = float(logits[best])
        if math.isnan(highest) or highest == -math.inf:
            raise ProgramError("the logits hold NaN or are all -inf; the model overflowed or its weights are damaged: "
                               "compare with the reference, or compile in a wider dtype")
        if self.temperature == 0 or highest == math.inf:
            return best
        # In place from here on: for a large vocabulary fresh pages cost more than the arithmetic.
        values = logits.astype(np.float64)
        values -= highest
        values /= self.temperature
        tokens = _largest(values, self.top_k) if 0 < self.top_k < values.size else None
        weights = values if tokens is None else values[tokens]
        np.exp(weights, out=weights)
        if self.top_p < 1:
            kept = _nucleus(weights, self.top_p)
            tokens = kept if tokens is None else tokens[kept]
            weights = weights[kept]
        cumulative = np.cumsum(weights, out=weights)
        drawn = int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))
        return drawn if tokens is None else int(tokens[drawn])


def _largest(values: Array, count: int) -> Array:
    """The indices of the ``count`` largest values, ascending."""
    tokens = np.flatnonzero(values >= _lower_bound(values, count))
    order = np.argsort(-values[tokens], kind="stable")[:count]
    return np.sort(tokens[order])


def _lower_bound(values: Array, count: int) -> Any:
    """A value that at least ``count`` others reach, and few more: the last of the best blocks' maxima."""
    maxima = np.maximum.reduceat(values, np.arange(0, values.size, _BLOCK))
    if maxima.size < count:
        maxima = values
    return np.partition(maxima, -count)[-count]


def _nucleus(weights: Array, top_p: float) -> Array:
    """The indices, ascending, of the fewest largest weights that reach ``top_p`` of the sum."""
    total = weights.sum()
    # What is below this holds less than 1 - top_p in all, so the others reach top_p: sort only those.
    likely = np.flatnonzero(weights * weights.size >= total * (1 - top_p))
    order = likely[np.argsort(-weights[likely], kind="stable")]
    count = int(np.searchsorted(np.cumsum(weights[order]), top_p * total)) + 1
    return np.sort(order[:count])


def generators(prompts: Sequence[Array], seed: int | Sequence[int]) -> list[np.random.Generator]:
    """One random generator a prompt.

    From one seed: it depends on the seed and the prompt's own tokens, so what else is in the batch does not change
    a sequence; equal prompts of a batch get different generators, in order. From one seed a prompt: on that alone.
    """
    if isinstance(seed, int):
        _check_seed(seed)
        return [_generator(seed, *key) for key in _prompt_keys(prompts)]
    if len(seed) != len(prompts):
        raise InputError("seed", f"one integer, or one for each of the {len(prompts)} prompts", f"{len(seed)}")
    for one in seed:
        _check_seed(one)
    return [_generator(int(one)) for one in seed]


def _prompt_keys(prompts: Sequence[Array]) -> list[tuple[int, int]]:
    seen: dict[int, int] = {}
    keys = []
    for prompt in prompts:
        digest = xxhash.xxh3_64_intdigest(prompt.tobytes())
        keys.append((digest, seen.setdefault(digest, 0)))
        seen[digest] += 1
    return keys


def _generator(*entropy: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def _check_seed(seed: Any) -> None:
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
        raise InputError("seed", "an integer >= 0", repr(seed))
