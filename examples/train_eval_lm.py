"""Train the language model that quantization is evaluated on: the small one grown to 15 million parameters.

    python examples/train_eval_lm.py --minutes 75                     # the model goes to a cache folder
    python examples/train_eval_lm.py --metrics benchmarks/results/eval_lm.json

The six layers of ``tests/models/small-lm`` stand three times each, every copy with a third of the effect, and its MLPs
get 64 more neurons (halves of old ones): nearly the same function, which is then trained on. That gives in an hour on
two cores what would take a day from nothing. The text is that of ``train_small_lm.py``; of its held-out files one half
is for validation and one for calibration, so neither was trained on by any of the two models.

Training goes on where it was stopped: a checkpoint is written every few minutes, beside and then renamed. The learning
rate follows the share of the budget (``--minutes`` of training, or ``--steps``) that is used up. With ``--steps`` the
result depends only on the small model, the Python version (the text), the seed and the number of threads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from train_small_lm import END, batch_at, encode, is_held_out, library_files, make_optimizer, perplexity, replace_folder
from train_small_lm import Recipe as Small
from train_small_lm import save as save_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SMALL = Path(__file__).parents[1] / "tests" / "models" / "small-lm"
STATE = "training-state.safetensors"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides the small model and the text."""

    seed: int = 0
    copies: int = 3
    intermediate: int = 768  # a multiple of 128, so that groups of 128 fit every layer
    context: int = 256
    batch_tokens: int = 2048
    peak_lr: float = 1e-3
    warmup: float = 0.03  # share of the budget
    weight_decay: float = 0.1


@dataclass
class Progress:
    """What a checkpoint says beside the tensors. Seconds are those of training alone, over all runs."""

    step: int = 0
    seconds: float = 0.0
    loss: float = math.nan


def default_out() -> Path:
    """``$XDG_CACHE_HOME/tilewright/bench/eval-lm``, by default below ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "tilewright" / "bench" / "eval-lm"


def grow(small: LlamaForCausalLM, recipe: Recipe) -> LlamaForCausalLM:
    """A deeper and wider model of nearly the same function: a layer is ``copies`` steps of ``1 / copies`` of its effect."""
    config = small.config
    layers = config.num_hidden_layers * recipe.copies
    fields = {**config.to_dict(), "num_hidden_layers": layers, "intermediate_size": recipe.intermediate}
    fields.pop("layer_types", None)
    big, twice = LlamaForCausalLM(LlamaConfig(**fields)), recipe.intermediate - config.intermediate_size
    old, new = small.state_dict(), {}
    for name, value in old.items():
        value = value.float()
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            value = torch.cat([value, value[:twice]])
        if name.endswith("down_proj.weight"):  # the first neurons stand twice, each with half of the effect
            value = torch.cat([value[:, :twice] / 2, value[:, twice:], value[:, :twice] / 2], dim=1)
        if name.endswith(("down_proj.weight", "o_proj.weight")):
            value = value / recipe.copies
        head, _, rest = name.partition("model.layers.")
        if not rest:
            new[name] = value
            continue
        number, _, tail = rest.partition(".")
        for copy in range(recipe.copies):
            new[f"{head}model.layers.{int(number) * recipe.copies + copy}.{tail}"] = value.clone()
    big.load_state_dict(new)
    return big


def learning_rate(recipe: Recipe, used: float) -> float:
    """Linear warmup, then a cosine down to a twentieth of the peak; ``used`` is the share of the budget."""
    if used < recipe.warmup:
        return recipe.peak_lr * max(used / recipe.warmup, 0.02)
    along = min(1.0, (used - recipe.warmup) / (1 - recipe.warmup))
    return recipe.peak_lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * along)))


def tensors_of(model: LlamaForCausalLM, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """What a checkpoint holds: weights and both moments of each, named alike."""
    found = {}
    for name, parameter in model.named_parameters():
        found[f"weight.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            found[f"{key}.{name}"] = value
    return found


def write_state(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, progress: Progress) -> None:
    beside = path.with_name(path.name + ".partial")
    save_file(tensors_of(model, optimizer), beside, {"progress": json.dumps(asdict(progress))})
    os.replace(beside, path)


def read_state(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW) -> Progress:
    with safe_open(path, "pt") as file:
        for name, parameter in model.named_parameters():
            parameter.data.copy_(file.get_tensor(f"weight.{name}"))
            keys = ("step", "exp_avg", "exp_avg_sq")
            optimizer.state[parameter] = {key: file.get_tensor(f"{key}.{name}") for key in keys}
        return Progress(**json.loads(file.metadata()["progress"]))


def train(model: LlamaForCausalLM, ids: np.ndarray, recipe: Recipe, state: Path, args: argparse.Namespace) -> Progress:
    """Train in place until the budget is used up; goes on from ``state`` when it is there."""
    small = Small(batch_tokens=recipe.batch_tokens, context=recipe.context, weight_decay=recipe.weight_decay)
    optimizer, progress = make_optimizer(model, small), Progress()
    if state.is_file():
        progress = read_state(state, model, optimizer)
        print(f"goes on at step {progress.step}, after {progress.seconds:.0f} s", flush=True)
    before, begun, written = progress.seconds, time.monotonic(), time.monotonic()
    model.train()
    while (used := share(progress, args)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, used)
        batch = batch_at(ids, np.random.default_rng((recipe.seed, progress.step)), small, progress.step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress = Progress(progress.step + 1, before + time.monotonic() - begun, loss.item())
        if progress.step % 10 == 0:
            print(f"step {progress.step}  {used:.1%}  loss {progress.loss:.3f}  {progress.seconds:.0f} s", flush=True)
        if time.monotonic() - written > 60 * args.checkpoint_minutes:
            write_state(state, model, optimizer, progress)
            written = time.monotonic()
    write_state(state, model, optimizer, progress)
    return progress


def share(progress: Progress, args: argparse.Namespace) -> float:
    """How much of the budget is used up, from 0 to 1."""
    return progress.step / args.steps if args.steps else progress.seconds / (60 * args.minutes)


@dataclass(frozen=True)
class Text:
    """Contents of files, by what they are for."""

    training: list[str]
    validation: list[str]
    calibration: list[str]
    source: dict[str, object]


def read_text() -> Text:
    """The standard library's sources: of the held-out files, every other one (by hash) is for calibration."""
    files = library_files(Path(sysconfig.get_path("stdlib")))
    digest = hashlib.sha256(b"".join(name.encode() + b"\0" + contents for name, contents in files)).hexdigest()
    parts: dict[str, list[str]] = {"training": [], "validation": [], "calibration": []}
    for _, contents in files:
        half = "calibration" if hashlib.sha256(contents).digest()[1] % 2 else "validation"
        parts[half if is_held_out(contents) else "training"].append(contents.decode("utf-8", errors="replace"))
    source = {"source": "Python standard library sources", "python": platform.python_version(), "files": len(files),
              "sha256": digest}  # fmt: skip
    return Text(**parts, source=source)


def finish(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Text, out: Path, record: dict[str, object]
           ) -> dict[str, object]:  # fmt: skip
    """Write the folder of the model with the texts beside its weights; gives ``record`` with the perplexity."""
    partial, window = out.with_name(out.name + ".partial"), Recipe.context
    save_model(model, tokenizer, partial)
    for name in ("validation", "calibration"):
        (partial / f"{name}.txt").write_text("".join(END + part for part in getattr(text, name)) + END)
    saved = LlamaForCausalLM.from_pretrained(partial, dtype=torch.float32)
    result = perplexity(saved, encode(tokenizer, text.validation), window, window // 2)
    record["validation"] = {"perplexity": round(result, 3), "window": window, "stride": window // 2,
                            "weights": "bf16 as saved", "arithmetic": "f32"}  # fmt: skip
    (partial / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    replace_folder(partial, out)
    return record


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=default_out(), help="folder to write (default %(default)s)")
    parser.add_argument("--metrics", type=Path, help="write the record here too")
    parser.add_argument("--minutes", type=float, default=75.0, help="of training, over all runs (default %(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps instead of minutes")
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args, recipe = parse_arguments(), Recipe()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(args.threads)
    torch.manual_seed(recipe.seed)
    torch.use_deterministic_algorithms(True)
    text, tokenizer = read_text(), PreTrainedTokenizerFast.from_pretrained(SMALL)
    ids = encode(tokenizer, text.training)
    model = grow(LlamaForCausalLM.from_pretrained(SMALL), recipe)
    held_out = {name: len(encode(tokenizer, getattr(text, name))) for name in ("validation", "calibration")}
    print(f"{model.num_parameters()} parameters, {len(ids)} tokens, held out {held_out}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    state = args.out.with_name(f"{args.out.name}-{STATE}")
    progress = train(model, ids, recipe, state, args)
    record = {
        "recipe": {**asdict(recipe), "threads": args.threads, "grown_from": "tests/models/small-lm"},
        "parameters": model.num_parameters(), "steps": progress.step, "seconds": round(progress.seconds),
        "tokens_seen": progress.step * recipe.batch_tokens,
        "data": {**text.source, "train_tokens": len(ids), "validation_tokens": held_out["validation"],
                 "calibration_tokens": held_out["calibration"]},
        "torch": torch.__version__,
    }  # fmt: skip
    record = finish(model, tokenizer, text, args.out, record)
    if args.metrics:
        args.metrics.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{args.out}: validation perplexity {record['validation']['perplexity']} "
          f"(window {recipe.context}, stride {recipe.context // 2}) after {progress.step} steps")  # fmt: skip


if __name__ == "__main__":
    main()
