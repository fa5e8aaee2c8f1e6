"""What is known about transformers' models without asking the user: task, example inputs, varying sizes, outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import nn

from tilewright.frontend.dynamic import HIGH, DimSpec
from tilewright.ir.errors import TraceError

BATCH, LENGTH, TARGET, IMAGE = 5, 11, 13, 224  # made-up sizes: small primes that no layer has
MAX_BATCH = 256
TASKS = ("causal-lm", "seq2seq", "vision", "encoder")


@dataclass
class Recipe:
    """How to trace a model."""

    args: Sequence[Any] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    dynamic: Mapping[str, Any] = field(default_factory=dict)
    keep: Sequence[str] = ()
    meta: dict[str, str] = field(default_factory=dict)


def is_pretrained(model: nn.Module) -> bool:
    """Whether ``model`` is one of transformers', without importing transformers to find out."""
    return any(t.__name__ == "PreTrainedModel" and t.__module__.startswith("transformers.") for t in type(model).__mro__)


def task_of(model: Any) -> str:
    """``causal-lm``, ``seq2seq``, ``vision`` or ``encoder``."""
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-lm"
    if getattr(model.config, "is_encoder_decoder", False):
        return "seq2seq"
    return "vision" if model.main_input_name == "pixel_values" else "encoder"


def recipe(
    model: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic: Mapping[str, Any] | None,
    task: str | None = None,
) -> Recipe:
    """Fill in what the user did not give. Raises TraceError for an unknown task."""
    task = task or task_of(model)
    if task not in TASKS:
        raise TraceError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
    parameters = list(signature(model.forward).parameters)
    given = dict(kwargs) | dict(zip(parameters, args))
    inputs = given or {k: v.to(model.device) for k, v in example_inputs(model, task).items()}
    if dynamic is None:
        specs = _sizes(model.config, task)
        dynamic = {n: specs[n] for n in inputs if n in specs and isinstance(inputs[n], torch.Tensor)}
    fixed = {n: v for n, v in {"use_cache": False, "return_dict": True}.items() if n in parameters and n not in inputs}
    keep = ("logits",) if task == "causal-lm" else ()
    return Recipe((), inputs | fixed, dynamic, keep, _meta(model, task))


def example_inputs(model: Any, task: str) -> dict[str, torch.Tensor]:
    """Inputs of the right kind; their values do not matter."""
    ids = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    if task == "causal-lm":
        return {"input_ids": ids}
    if task == "seq2seq" and model.main_input_name == "input_features":
        audio = torch.zeros(BATCH, model.config.num_mel_bins, 2 * model.config.max_source_positions, dtype=model.dtype)
        return {"input_features": audio, "decoder_input_ids": torch.ones(BATCH, TARGET, dtype=torch.int64)}
    if task == "seq2seq":
        return {"input_ids": ids, "decoder_input_ids": torch.ones(BATCH, TARGET, dtype=torch.int64)}
    if task == "vision":
        return {"pixel_values": _image(model.config).to(model.dtype)}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _image(config: Any) -> torch.Tensor:
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", IMAGE)
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(BATCH, getattr(config, "num_channels", 3), height, width)


def _sizes(config: Any, task: str) -> dict[str, dict[int, DimSpec]]:
    """Varying axes of the inputs that models have in common."""
    text = getattr(config, "text_config", config)
    names = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")
    longest = next((v for n in names if isinstance(v := getattr(text, n, None), int)), HIGH)
    batch = DimSpec("B", 1, MAX_BATCH, "auto")
    tokens = {0: batch, 1: DimSpec("S", 1, int(longest), "auto")}
    target = {0: batch, 1: DimSpec("T", 1, int(longest), "auto")}
    source = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
    decoder = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")
    whole = ("pixel_values", "input_features", "input_values")
    rows = {0: batch}
    return dict.fromkeys(source, tokens) | dict.fromkeys(decoder, target) | dict.fromkeys(whole, rows)


def _meta(model: Any, task: str) -> dict[str, str]:
    """What later stages ask about the model; all values are text."""
    config = model.config
    told = json.loads(config.to_json_string(use_diff=False))
    told.pop("_name_or_path", None)  # where the folder lay: an artifact must not depend on it, nor tell
    meta = {"task": task, "architecture": type(model).__name__, "config": json.dumps(told, sort_keys=True)}
    if task == "causal-lm":
        eos = getattr(config, "eos_token_id", None)
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        meta |= {"token_input": "input_ids", "logits": "logits", "eos": json.dumps(eos)}
        meta["vocab_size"] = str(getattr(config, "text_config", config).vocab_size)
    return meta
