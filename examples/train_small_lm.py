"""Train the small language model that the tests use, on text that every Python installation carries.

    python examples/train_small_lm.py --out tests/models/small-lm

The text is the standard library's own sources; every sixteenth file, by content hash, is held out. The model is a
Llama of 5.3 million parameters with grouped-query attention. The output is an ordinary Hugging Face folder with a
``training.json`` that says how it came about. Needs the ``compile`` extra (torch, transformers).

The result depends only on the Python version (the text), the seed, the number of steps and the number of threads.
``--minutes`` picks the number of steps from the measured speed; ``--steps`` with the recorded number repeats the run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings",
           "pydoc_data", "__pycache__", "_bundled"}
GENERATED = ("_sysconfigdata", "config-")  # differ from one installation to the next
HELD_OUT = 16  # one file in this many is for validation


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides the text."""

    seed: int = 0
    steps: int = 2500
    threads: int = 2
    vocab: int = 4096
    context: int = 256
    batch_tokens: int = 2048
    peak_lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.1

    @property
    def longest(self) -> int:
        """The longest sequence that training sees, in tokens."""
        return 2 * self.context


def library_files(root: Path) -> list[tuple[str, bytes]]:
    """The standard library's own modules as (relative path, contents), sorted by path."""
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if SKIPPED.isdisjoint(parts) and not parts[0].startswith(GENERATED):
            found.append(("/".join(parts), path.read_bytes()))
    return sorted(found)


def is_held_out(contents: bytes) -> bool:
    return hashlib.sha256(contents).digest()[0] % HELD_OUT == 0


def train_tokenizer(texts: list[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text round-trips, no token is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False,
        model_max_length=recipe.longest,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All files in one row of token ids; the end token stands before each file and after the last."""
    end = tokenizer.eos_token_id
    ids = [end]
    for text in texts:
        ids += [*tokenizer.backend_tokenizer.encode(text).ids, end]
    return np.array(ids, dtype=np.int64)


def make_model(recipe: Recipe, end: int, pad: int) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=recipe.longest, tie_word_embeddings=True,
        bos_token_id=end, eos_token_id=end, pad_token_id=pad,
    )
    return LlamaForCausalLM(config)


def batch_at(ids: np.ndarray, rng: np.random.Generator, recipe: Recipe, step: int) -> torch.Tensor:
    """Random windows [rows, length]; every fourth batch has windows twice as long, so later positions are learned."""
    length = recipe.longest if step % 4 == 3 else recipe.context
    starts = rng.integers(0, len(ids) - length, size=recipe.batch_tokens // length)
    return torch.from_numpy(np.stack([ids[s : s + length] for s in starts]))


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warmup, then a cosine down to a twentieth of the peak."""
    if step < recipe.warmup:
        return recipe.peak_lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.peak_lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(0.9, 0.95), fused=True)


def train(model: LlamaForCausalLM, ids: np.ndarray, recipe: Recipe, minutes: float | None) -> Recipe:
    """Train in place; returns the recipe with the number of steps that were made."""
    rng, optimizer, begun, step = np.random.default_rng(recipe.seed), make_optimizer(model, recipe), time.time(), 0
    model.train()
    while step < recipe.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        batch = batch_at(ids, rng, recipe, step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if minutes is not None and step == recipe.warmup:  # until here the schedule does not depend on `steps`
            steps = int(minutes * 60 / (time.time() - begun) * recipe.warmup)
            recipe = Recipe(**{**asdict(recipe), "steps": max(steps, recipe.warmup + 1)})
        if step % 25 == 0:
            print(f"step {step}/{recipe.steps}  loss {loss.item():.3f}  {time.time() - begun:.0f} s", flush=True)
    return recipe


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: np.ndarray, window: int, stride: int, first: int | None = None) -> float:
    """exp(mean negative log-likelihood), each token scored once with at least ``window - stride`` tokens before it.

    Only the row's first ``window - stride`` tokens are left out: they would have less context. ``first``: what stands in
    the place of each window's first token.
    """
    model.eval()
    starts = range(0, len(ids) - window + 1, stride)
    total, count = 0.0, 0
    for at in range(0, len(starts), 16):
        rows = torch.from_numpy(np.stack([ids[s : s + window] for s in starts[at : at + 16]]))
        if first is not None:
            rows[:, 0] = first
        logits = model(input_ids=rows, use_cache=False).logits[:, -stride - 1 : -1]
        targets = rows[:, -stride:]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += targets.numel()
    return math.exp(total / count)


def replace_folder(new: Path, out: Path) -> None:
    """Put ``new`` in the place of ``out``; at no time does ``out`` hold half a model."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id, do_sample=False, max_new_tokens=64,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tests/models/small-lm"), help="folder to write")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimizer steps (default %(default)s)")
    parser.add_argument("--minutes", type=float, help="pick the number of steps so that training takes this long")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=Recipe.threads)
    return parser.parse_args()


def main() -> None:
    args, begun = parse_arguments(), time.time()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    recipe = Recipe(seed=args.seed, steps=args.steps, threads=args.threads)

    files = library_files(Path(sysconfig.get_path("stdlib")))
    digest = hashlib.sha256(b"".join(name.encode() + b"\0" + contents for name, contents in files)).hexdigest()
    texts = [contents.decode("utf-8", errors="replace") for _, contents in files if not is_held_out(contents)]
    held_out = [contents.decode("utf-8", errors="replace") for _, contents in files if is_held_out(contents)]
    tokenizer = train_tokenizer(texts, recipe)
    ids, held_out_ids = encode(tokenizer, texts), encode(tokenizer, held_out)
    model = make_model(recipe, tokenizer.eos_token_id, tokenizer.pad_token_id)
    parameters = model.num_parameters()
    print(f"{len(files)} files, {len(ids)} + {len(held_out_ids)} tokens, {parameters} parameters", flush=True)

    trained = train(model, ids, recipe, args.minutes)
    partial = args.out.with_name(args.out.name + ".partial")
    save(model, tokenizer, partial)
    window, stride = recipe.context, recipe.context // 2
    saved = LlamaForCausalLM.from_pretrained(partial, dtype=torch.float32)
    result = perplexity(saved, held_out_ids, window, stride)
    record = {
        "recipe": asdict(trained), "parameters": parameters, "tokens_seen": trained.steps * recipe.batch_tokens,
        "data": {
            "source": "Python standard library sources", "python": platform.python_version(), "files": len(files),
            "sha256": digest, "train_tokens": len(ids), "validation_tokens": len(held_out_ids),
        },
        "validation": {
            "perplexity": round(result, 3), "window": window, "stride": stride, "weights": "bf16 as saved",
            "arithmetic": "f32",
        },
        "torch": torch.__version__, "wall_seconds": round(time.time() - begun),
    }
    (partial / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    replace_folder(partial, args.out)
    print(f"{args.out}: validation perplexity {result:.2f} after {trained.steps} steps")


if __name__ == "__main__":
    main()
