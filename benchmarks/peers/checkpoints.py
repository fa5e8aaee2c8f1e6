"""Checkpoints with random weights, and a tokenizer of fillers, for systems that insist on one."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.shapes import Shape

MERGED = ("a", "b")
"""The one merge of the tokenizer: some readers refuse a table without any."""


def tokens(vocabulary: int) -> list[str]:
    """The texts of all tokens: single bytes as GPT-2 writes them, the merge, fillers."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    letters = [chr(byte) for byte in kept] + [chr(256 + i) for i in range(len(moved))]
    special = [*letters, "".join(MERGED), "<|end|>"]
    return special + [f"<{i}>" for i in range(len(special), vocabulary)]


def make(shape: Shape, folder: Path) -> None:
    """Write a Hugging Face folder: random weights (seeded), configuration, tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, shape.dtype))
    architecture = getattr(transformers, shape.architecture)
    config = architecture.config_class(**shape.config, bos_token_id=None, eos_token_id=257, pad_token_id=257)
    config.architectures = [shape.architecture]
    architecture(config).save_pretrained(folder)
    save_tokenizer(shape.vocabulary, folder)


def save_tokenizer(vocabulary: int, folder: Path) -> None:
    """Write a tokenizer of ``vocabulary`` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = {text: i for i, text in enumerate(tokens(vocabulary))}
    made = Tokenizer(models.BPE(numbers, [MERGED]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    end = "<|end|>"
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, pad_token=end).save_pretrained(folder)
