"""Train a language model that looks back: the small one, taught to copy, with a first token of its own.

    python examples/train_recall_lm.py                                # the model goes to a cache folder
    python examples/train_recall_lm.py --metrics benchmarks/results/recall_lm.json

``tests/models/small-lm`` was trained on windows that begin anywhere in a text, and hardly looks far back. Here it is
trained on, with texts that begin with END, as do those of models that have sinks (arXiv:2309.17453, arXiv:2410.10781).
Some are held-in text as it is; in the others much was there before: spans come again, random tokens repeat, names are given
keys that are asked for later. It learns to copy within some hundred steps. Sinks it does not learn in so few.

The text is that of ``train_eval_lm.py``, and so are the checkpoints, the budget and what the result depends on. The step
is compiled by PyTorch, which takes a C++ compiler.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from train_eval_lm import SMALL, Batch, Schedule, arguments, default_out, make, prepared
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

KINDS = ("plain", "again", "strings", "keys", "novel")
Row = tuple[np.ndarray, np.ndarray]
"""Token ids and labels, both [length]."""
UNLEARNED = -100
LETTERS = list("abcdefghijklmnopqrstuvwxyz0123456789")
FORMS = (
    ("\n# The key of N is @.\n", "\n# The key of N is @.\n"),
    ("\nN = \"@\"\n", "\nassert N == \"@\"\n"),
    ("\nN = '@'\n", "\nprint(N)  # '@'\n"),
    ("\n    N: @\n", "\n    N: @\n"),
    ("\n        self.N = '@'\n", "\n        self.N = '@'\n"),
    ("\n    \"\"\"Remember N: @\"\"\"\n", "\n    # N: @\n"),
    ("\n# What is N? It is @!\n", "\n# What is N? It is @!\n"),
    ("\n    return \"@\"  # N\n", "\n    # N\n    return \"@\"\n"),
    ("\n>>> get(\"N\")\n@\n", "\n>>> get(\"N\")\n@\n"),
    ("\ndef N():\n    return @\n", "\nassert N() == @\n"),
)  # fmt: skip
"""How a key (@) of a name (N) is told, and how it is said again."""


@dataclass(frozen=True)
class Lesson:
    """What texts are like up to a step. Shares are of KINDS; ``short``: every other batch has texts of that length."""

    until: int
    shares: tuple[float, ...]
    short: int = 0


@dataclass(frozen=True)
class Recipe(Schedule):
    """Everything that decides the result, besides the small model and the text."""

    context: int = 512
    peak_lr: float = 2e-3
    lessons: tuple[Lesson, ...] = (
        Lesson(400, (0.15, 0.15, 0.6, 0.1, 0)),
        Lesson(515, (0.35, 0.2, 0.15, 0.3, 0)),
        Lesson(1209, (0.25, 0.15, 0, 0.25, 0.35), short=64),
        Lesson(1568, (0.35, 0.15, 0.15, 0.3, 0.05)),
        Lesson(1_000_000, (0.25, 0.1, 0.05, 0.6, 0)),
    )


@dataclass(frozen=True)
class Texts:
    """Makes texts of ``length`` tokens out of ``ids``, each begins with END; equal generators give equal texts."""

    ids: np.ndarray
    tokenizer: PreTrainedTokenizerFast
    length: int

    def plain(self, rng: np.random.Generator) -> Row:
        """A piece of the text."""
        row = self.begun(self.piece(rng, self.length - 1))
        return row, row

    def again(self, rng: np.random.Generator) -> Row:
        """A piece of the text; over later parts of it earlier ones are written."""
        row, _ = self.plain(rng)
        return self.repeated(row, rng)

    def novel(self, rng: np.random.Generator) -> Row:
        """The same of random tokens: what does not come again cannot be known, and is not to be copied."""
        return self.repeated(self.begun(rng.integers(2, len(self.tokenizer), self.length - 1)), rng)

    def strings(self, rng: np.random.Generator) -> Row:
        """Random tokens, again and again; the first time there is nothing to learn of them."""
        period = round(np.exp(rng.uniform(np.log(8), np.log(self.length // 2))))
        row = self.begun(np.resize(rng.integers(0, len(self.tokenizer), period), self.length - 1))
        labels = row.copy()
        labels[: period + 1] = UNLEARNED
        return row, labels

    def keys(self, rng: np.random.Generator) -> Row:
        """A piece of the text in which names are given keys that are said again later."""
        parts = []
        for _ in range(rng.integers(1, max(2, self.length // 100))):
            name = "".join(rng.choice(self.words, rng.integers(1, 3)))
            key = "".join(rng.choice(LETTERS, rng.integers(4, 11)))
            told, asked = (form.replace("N", name) for form in FORMS[rng.integers(len(FORMS))])
            early, late = sorted(rng.random(2))
            parts += [(early, self.said(told, key)), (late, self.said(asked, key))]
        said = [part for _, part in sorted(parts, key=lambda part: part[0])]
        filler = self.piece(rng, self.length - 1 - sum(map(len, said)))
        around = np.split(filler, np.sort(rng.integers(0, len(filler) + 1, len(said))))
        row = self.begun(around[0], *(part for pair in zip(said, around[1:]) for part in pair))
        return row, row

    def repeated(self, row: np.ndarray, rng: np.random.Generator) -> Row:
        """Over later parts of ``row`` earlier ones are written."""
        for size in rng.integers(self.length // 40, 100 * self.length // 512, rng.integers(2, 7)):
            at = rng.integers(size + 1, self.length - size)
            begin = rng.integers(1, at - size + 1)
            row[at : at + size] = row[begin : begin + size]
        return row, row

    def begun(self, *parts: np.ndarray) -> np.ndarray:
        return np.concatenate([[self.tokenizer.eos_token_id], *parts]).astype(np.int64)

    def piece(self, rng: np.random.Generator, size: int) -> np.ndarray:
        begin = rng.integers(0, len(self.ids) - size)
        return self.ids[begin : begin + size]

    def said(self, form: str, key: str) -> np.ndarray:
        """Token ids; those of a key are the same wherever it stands."""
        before, after = form.split("@")
        start = before.rstrip(" ")
        parts = start, before[len(start) :] + key, after
        return np.array([i for part in parts for i in self.tokenizer.backend_tokenizer.encode(part).ids])

    @cached_property
    def words(self) -> list[str]:
        """Tokens that look like a name."""
        return sorted(word for word in self.tokenizer.get_vocab() if re.fullmatch(r"[a-z]{3,9}", word))


def mixed(texts: Texts, recipe: Recipe) -> Callable[[int], Batch]:
    """The batch of a step: texts of all kinds."""
    lengths = {texts.length, *(lesson.short for lesson in recipe.lessons)} - {0}
    sizes = {length: replace(texts, length=length) for length in lengths}

    def batch(step: int) -> Batch:
        lesson = next(lesson for lesson in recipe.lessons if step < lesson.until)
        length = lesson.short if lesson.short and step % 2 else texts.length
        rng, some = np.random.default_rng((recipe.seed, step)), sizes[length]
        chosen = rng.choice(KINDS, recipe.batch_tokens // length, p=lesson.shares)
        made = [getattr(some, kind)(rng) for kind in chosen]
        ids, labels = (torch.from_numpy(np.stack(part)) for part in zip(*made))
        return ids, labels

    return batch


def main() -> None:
    recipe, args = Recipe(), arguments(__doc__, default_out("recall-lm"), minutes=38.0)
    data = prepared(args, recipe)
    model = LlamaForCausalLM.from_pretrained(SMALL, dtype=torch.float32)
    model.compile(dynamic=False)
    texts = Texts(data.ids["training"], data.tokenizer, recipe.context)
    make(model, data, mixed(texts, recipe), recipe, args, first=data.tokenizer.eos_token_id)


if __name__ == "__main__":
    main()
