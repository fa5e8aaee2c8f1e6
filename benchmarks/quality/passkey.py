"""Whether a key that stands somewhere in a long text is found when the text's end asks for it.

The models are too small to say a key that they were told, however it is asked for. But a text that names one makes it
likelier than it was. So each text is made with every one of ``KEYS`` names in the same place,
and the name is found that gains most, among all of them, over what it has in the mean of the texts. Chance finds one in
``KEYS``; ``gain`` is in nats, of the name that was there over those that were not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.evaluation import log_softmax
from tilewright.runtime import Session, Tokenizer
from tilewright.runtime.following import follow

Array = np.ndarray[Any, Any]
KEYS = 16
LENGTH = 480
FORMS = (
    ("\n        raise ValueError(\"@ passkey\")\n", "\n        raise ValueError(\"", r"[a-z]{4,9}"),
    ("\n    def@(self, passkey):\n", "\n    def", r" [a-z]{4,9}"),
    ("\n        self.@ = passkey\n", "\n        return self.", r"[a-z]{4,9}"),
    ("\nfrom passkey import@\n", "\nfrom passkey import", r" [a-z]{4,9}"),
)  # fmt: skip
"""How a key (@) is told, how it is asked for, and what its one token looks like."""


@dataclass(frozen=True)
class Question:
    """``texts`` [KEYS, LENGTH + 1] differ in the key alone and end with it; the ``asked`` tokens before ask for it."""

    texts: Array
    asked: int

    @property
    def keys(self) -> Array:
        return self.texts[:, -1]


def questions(tokenizer: Tokenizer, filler: Array, vocabulary: int, seed: int = 0) -> Iterator[Question]:
    """One of each form; the key stands after a tenth of the text, three, five, seven tenths."""
    for number, (told, question, like) in enumerate(FORMS):
        random = np.random.default_rng((seed, number))
        words = [t for t in range(vocabulary) if re.fullmatch(like, tokenizer.decode([t]))]
        before, after = (tokenizer.encode(part) for part in told.split("@"))
        end, keys = tokenizer.encode(question), random.choice(words, KEYS, replace=False)
        count = LENGTH - len(before) - 1 - len(after) - len(end)
        begin = int(random.integers(len(filler) - count))
        around, at = list(filler[begin : begin + count]), int(count * (0.1 + 0.2 * number))
        yield Question(np.array([around[:at] + before + [k] + after + around[at:] + end + [k] for k in keys]), len(end))


def found(session: Session, asked: Sequence[Question]) -> dict[str, float]:
    """``right``: the share of keys that were found; ``gain``; ``said``: the share that a greedy answer would have given.

    The texts are fed in chunks, the questions token by token.
    """
    right, gains, greedy = [], [], []
    for question in asked:
        *_, said = follow(session, question.texts, LENGTH - question.asked)
        likely = log_softmax(said)[:, question.keys]
        gained, own = likely - likely.mean(0), np.eye(len(likely), dtype=bool)
        right.append(gained.argmax(1) == np.arange(len(likely)))
        gains.append(gained[own].mean() - gained[~own].mean())
        greedy.append(said.argmax(1) == question.keys)
    return {"said": float(np.mean(greedy)), "right": float(np.mean(right)), "gain": round(float(np.mean(gains)), 5)}
