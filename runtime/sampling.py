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
        values = logits.astype(np.float64) - highest
        tokens = self._candidates(values)
        weights = np.exp(values[tokens] / self.temperature)
        cumulative = np.cumsum(weights)
        return int(tokens[np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")])

    def _candidates(self, values: Array) -> Array:
        """The ids that may be drawn, ascending; ``values`` are logits of which the largest is 0."""
        tokens = np.arange(values.size)
        if 0 < self.top_k < values.size:
            tokens = np.flatnonzero(values >= np.partition(values, -self.top_k)[-self.top_k])
            tokens = np.sort(_descending(values, tokens)[: self.top_k])
        if self.top_p == 1:
            return tokens
        return np.sort(self._nucleus(values, tokens))

    def _nucleus(self, values: Array, tokens: Array) -> Array:
        """The fewest most likely tokens whose probabilities reach ``top_p``."""
        weights = np.exp(values[tokens] / self.temperature)
        # Tokens below this weight hold less than 1 - top_p together, so the others reach top_p: sort only those.
        likely = weights * tokens.size >= weights.sum() * (1 - self.top_p)
        order = _descending(values, tokens[likely])
        cumulative = np.cumsum(np.exp(values[order] / self.temperature))
        count = int(np.searchsorted(cumulative, self.top_p * weights.sum())) + 1
        return order[:count]


def _descending(values: Array, tokens: Array) -> Array:
    return tokens[np.argsort(-values[tokens], kind="stable")]


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
