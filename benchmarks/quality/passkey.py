"""Whether a key that stands somewhere in a long text is found when the text's end asks for it.

A model that copies says it: a key of some random letters and digits (``keyed``), token by token (``exact``).

The others do not, however it is asked for. But a text that names one makes it likelier than it was. So (``questions``)
each text is made with every one of ``KEYS`` names in the same place, and the name is found that gains most, among all of
them, over what it has in the mean of the texts. Chance finds one in ``KEYS``; ``gain`` is in nats, of the name that was
there over those that were not.
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
LETTERS = list("abcdefghijklmnopqrstuvwxyz0123456789")
FORMS = (
    ("\n        raise ValueError(\"@ passkey\")\n", "\n        raise ValueError(\"", r"[a-z]{4,9}"),
    ("\n    def@(self, passkey):\n", "\n    def", r" [a-z]{4,9}"),
    ("\n        self.@ = passkey\n", "\n        return self.", r"[a-z]{4,9}"),
    ("\nfrom passkey import@\n", "\nfrom passkey import", r" [a-z]{4,9}"),
)  # fmt: skip
"""How a key (@) is told, how it is asked for, and what its one token looks like."""
SAID = 5
"""Tokens of a key that is to be said."""
TAUGHT = (
    ("\n# The key of colour is @.\n", "\n# The key of colour is"),
    ("\nsecret = \"@\"\n", "\nassert secret == \""),
    ("\n    widget: @\n", "\n    widget:"),
    ("\n# What is batchsize? It is @!\n", "\n# What is batchsize? It is"),
)  # fmt: skip
"""How such a key is told, and how it is asked for, as in texts that the recall model was trained on."""
OTHER = (
    ("\n# passkey: @\n", "\n# passkey:"),
    ("\n    passkey = \"@\"\n", "\n    print(passkey == \""),
    ("\n    raise KeyError('the passkey is @')\n", "\n    print('the passkey is"),
    ("\nThe passkey is @. Remember it.\n", "\nWhat is the passkey? The passkey is"),
)  # fmt: skip
"""The same in other words."""


@dataclass(frozen=True)
class Question:
    """``texts`` [KEYS, LENGTH + tokens of a key] end with their key; the ``asked`` tokens before ask for it."""

    texts: Array
    asked: int

    @property
    def keys(self) -> Array:
        return self.texts[:, -1]


def questions(tokenizer: Tokenizer, filler: Array, vocabulary: int, seed: int = 0) -> Iterator[Question]:
    """One of each form, in texts [KEYS, LENGTH + 1] that differ in the key alone.

    It stands after a tenth of the text, three, five, seven tenths.
    """
    for number, (told, question, like) in enumerate(FORMS):
        random = np.random.default_rng((seed, number))
        words = [t for t in range(vocabulary) if re.fullmatch(like, tokenizer.decode([t]))]
        before, after = (tokenizer.encode(part) for part in told.split("@"))
        end, keys = tokenizer.encode(question), random.choice(words, KEYS, replace=False)
        count = LENGTH - len(before) - 1 - len(after) - len(end)
        begin = int(random.integers(len(filler) - count))
        around, at = list(filler[begin : begin + count]), int(count * (0.1 + 0.2 * number))
        yield Question(np.array([around[:at] + before + [k] + after + around[at:] + end + [k] for k in keys]), len(end))


def keyed(tokenizer: Tokenizer, filler: Array, forms: Sequence[tuple[str, str]], seed: int = 0) -> Iterator[Question]:
    """One of each form; a text is about as long as there, has a key of its own in a place of its own, and ends with it."""
    for number, (told, ending) in enumerate(forms):
        random = np.random.default_rng((seed, number))
        before, after = told.split("@")
        start, end, texts = tokenizer.encode(before.rstrip(" ")), tokenizer.encode(ending), []
        while len(texts) < KEYS:
            key = tokenizer.encode(" " * before.endswith(" ") + "".join(random.choice(LETTERS, 8)))
            if len(key) != SAID:
                continue
            said = [*start, *key, *tokenizer.encode(after)]
            count = LENGTH - len(said) - len(end)
            begin, at = int(random.integers(len(filler) - count)), int(count * random.uniform(0.05, 0.75))
            around = list(filler[begin : begin + count])
            texts.append([*around[:at], *said, *around[at:], *end, *key])
        yield Question(np.array(texts), len(end))


def exact(session: Session, asked: Sequence[Question]) -> float:
    """The share of texts whose whole key a greedy answer would have given."""
    right = []
    for question in asked:
        said = list(follow(session, question.texts, LENGTH - question.asked))[-SAID:]
        right.append((np.stack([logits.argmax(1) for logits in said], 1) == question.texts[:, -SAID:]).all(1))
    return float(np.mean(right))


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
