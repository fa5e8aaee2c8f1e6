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
from collections.abc import Callable
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
class Schedule:
    """How a model that is there is trained on. ``context``: tokens of a text; some may have twice as many."""

    seed: int = 0
    context: int = 256
    batch_tokens: int = 2048
    peak_lr: float = 1e-3
    warmup: float = 0.03  # share of the budget
    weight_decay: float = 0.1


@dataclass(frozen=True)
class Recipe(Schedule):
    """Everything that decides the result, besides the small model and the text."""

    copies: int = 3
    intermediate: int = 768  # a multiple of 128, so that groups of 128 fit every layer


Batch = tuple[torch.Tensor, torch.Tensor]
"""Token ids and labels, both [rows, length]."""


@dataclass
class Progress:
    """What a checkpoint says beside the tensors. Seconds are those of training alone, over all runs."""

    step: int = 0
    seconds: float = 0.0
    loss: float = math.nan


def default_out(name: str = "eval-lm") -> Path:
    """``$XDG_CACHE_HOME/tilewright/bench/eval-lm``, by default below ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "tilewright" / "bench" / name


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


def learning_rate(recipe: Schedule, used: float) -> float:
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


def windows(ids: np.ndarray, recipe: Recipe) -> Callable[[int], Batch]:
    """The batch of a step: windows of the text, as the small model was trained on."""
    small = Small(batch_tokens=recipe.batch_tokens, context=recipe.context)

    def batch(step: int) -> Batch:
        rows = batch_at(ids, np.random.default_rng((recipe.seed, step)), small, step)
        return rows, rows

    return batch


def train(model: LlamaForCausalLM, batches: Callable[[int], Batch], recipe: Schedule, state: Path, args: argparse.Namespace
          ) -> Progress:  # fmt: skip
    """Train in place until the budget is used up; goes on from ``state`` when it is there."""
    optimizer, progress = make_optimizer(model, Small(weight_decay=recipe.weight_decay)), Progress()
    if state.is_file():
        progress = read_state(state, model, optimizer)
        print(f"goes on at step {progress.step}, after {progress.seconds:.0f} s", flush=True)
    before, begun, written = progress.seconds, time.monotonic(), time.monotonic()
    model.train()
    while (used := share(progress, args)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, used)
        ids, labels = batches(progress.step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
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


@dataclass(frozen=True)
class Data:
    """Texts, and their token ids by the same names."""

    text: Text
    tokenizer: PreTrainedTokenizerFast
    ids: dict[str, np.ndarray]


def prepared(args: argparse.Namespace, recipe: Schedule) -> Data:
    """Sets PyTorch up, and reads the text with the small model's tokenizer."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(args.threads)
    torch.manual_seed(recipe.seed)
    torch.use_deterministic_algorithms(True)
    text, tokenizer = read_text(), PreTrainedTokenizerFast.from_pretrained(SMALL)
    ids = {name: encode(tokenizer, getattr(text, name)) for name in ("training", "validation", "calibration")}
    return Data(text, tokenizer, ids)


def make(model: LlamaForCausalLM, data: Data, batches: Callable[[int], Batch], recipe: Schedule, args: argparse.Namespace,
         first: int | None = None) -> None:  # fmt: skip
    """Train ``model`` and write its folder; ``first``: the token that each of its texts begins with."""
    tokens = {name: len(ids) for name, ids in data.ids.items()}
    print(f"{model.num_parameters()} parameters, tokens: {tokens}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    progress = train(model, batches, recipe, args.out.with_name(f"{args.out.name}-{STATE}"), args)
    record = {
        "recipe": {**asdict(recipe), "threads": args.threads, "grown_from": "tests/models/small-lm"},
        "parameters": model.num_parameters(), "steps": progress.step, "seconds": round(progress.seconds),
        "tokens_seen": progress.step * recipe.batch_tokens,
        "data": {**data.text.source, **{f"{name}_tokens": count for name, count in tokens.items()}},
        "torch": torch.__version__,
    }  # fmt: skip
    partial, window = args.out.with_name(args.out.name + ".partial"), recipe.context
    save_model(model, data.tokenizer, partial)
    for name in ("validation", "calibration"):
        (partial / f"{name}.txt").write_text("".join(END + part for part in getattr(data.text, name)) + END)
    saved = LlamaForCausalLM.from_pretrained(partial, dtype=torch.float32)
    result = perplexity(saved, data.ids["validation"], window, window // 2, first)
    record["validation"] = {"perplexity": round(result, 3), "window": window, "stride": window // 2,
                            "weights": "bf16 as saved", "arithmetic": "f32"}  # fmt: skip
    written = json.dumps(record, indent=2) + "\n"
    (partial / "training.json").write_text(written)
    replace_folder(partial, args.out)
    if args.metrics:
        args.metrics.write_text(written)
    print(f"{args.out}: validation perplexity {result:.3f} (window {window}) after {progress.step} steps")


def arguments(about: str | None, out: Path, minutes: float) -> argparse.Namespace:
    """Where to, and for how long."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, help="folder to write (default %(default)s)")
    parser.add_argument("--metrics", type=Path, help="write the record here too")
    parser.add_argument("--minutes", type=float, default=minutes, help="of training, over all runs (default %(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps instead of minutes")
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    recipe, args = Recipe(), arguments(__doc__, default_out(), minutes=75.0)
    data = prepared(args, recipe)
    model = grow(LlamaForCausalLM.from_pretrained(SMALL), recipe)
    make(model, data, windows(data.ids["training"], recipe), recipe, args)


if __name__ == "__main__":
    main()
