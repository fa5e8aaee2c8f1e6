"""Choosing a token from logits: greedy, temperature, top-k, top-p; by native code, reproducible for each sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from tilewright.runtime.errors import InputError, ProgramError
from tilewright.runtime.manifest import DTYPES
from tilewright.runtime.memory import address

if TYPE_CHECKING:
    from tilewright.runtime.native import Library

Array = np.ndarray[Any, Any]
_NATIVE = {DTYPES["f32"]: 0, DTYPES["bf16"]: 1, DTYPES["f16"]: 2}
"""Element types of logits, as ``sampling.h`` numbers them."""
_NO_MEMORY = -2


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


class Sampler:
    """Chooses tokens with the native code of an artifact, from rows of logits in f32, f16 or bf16."""

    def __init__(self, library: Library, sampling: Sampling) -> None:
        self._sample = library.sample
        self.sampling = sampling
        # No set has more than 2^31 tokens; larger limits keep all.
        self._options = (float(sampling.temperature), min(sampling.top_k, 2**31), float(sampling.top_p))

    def choose(self, logits: Array, generator: np.random.Generator) -> int:
        """A token for logits [V]. Draws one number from ``generator`` unless greedy. The smaller id wins a tie.

        Raises ProgramError on NaN logits and when no token is possible.
        """
        if logits.dtype not in _NATIVE or not logits.flags.c_contiguous:
            logits = np.ascontiguousarray(logits, np.float32)
        number = generator.random() if self.sampling.temperature > 0 else 0.0
        token = self._sample(address(logits), _NATIVE[logits.dtype], logits.size, *self._options, number)
        if token == _NO_MEMORY:
            raise MemoryError(f"cannot allocate the candidates among {logits.size} tokens")
        if token < 0:
            raise ProgramError("the logits hold NaN or are all -inf; the model overflowed or its weights are damaged: "
                               "compare with the reference, or compile in a wider dtype")
        return int(token)


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
