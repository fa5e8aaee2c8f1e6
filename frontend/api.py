"""The two ways in: a module, or a Hugging Face folder."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tilewright.frontend.convert import Sources, convert, drop_dead
from tilewright.frontend.export import export
from tilewright.frontend.pretrained import Recipe, is_pretrained, recipe
from tilewright.ir.core import Module, Return, Value
from tilewright.ir.errors import CheckpointError, TraceError
from tilewright.ir.verifier import verify

_LOCK = threading.RLock()  # tracing swaps functions of torch and transformers


def trace(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic: Mapping[str, Any] | None = None,
) -> Module:
    """The IR of ``model(*args, **kwargs)`` in eval mode.

    ``dynamic`` says which axes vary and how they are called: ``{"x": {0: "B", 1: ("S", 1, 512)}}``; without it the
    example's sizes are fixed. A transformers model needs neither: its inputs are made up, batch and sequence vary. A
    causal language model becomes ``forward(input_ids) -> logits``, without a cache and without padding.

    Weights stay shared with ``model``; inputs are never written, even where forward does. Raises TraceError or
    UnsupportedError with the module's path, the line and what to do instead: for branches on tensor values, attributes
    written by forward, sizes that change what the model does, operations that the IR lacks.
    """
    with _LOCK:
        if is_pretrained(model):
            return _trace(model, recipe(model, args, kwargs or {}, dynamic), {})
        if not args and not kwargs:
            raise TraceError(f"{type(model).__name__} needs example inputs: trace(model, (x,))")
        return _trace(model, Recipe(args, dict(kwargs or {}), dynamic or {}), {})


def trace_folder(path: str | os.PathLike[str], dtype: str | None = None, task: str | None = None) -> Module:
    """The IR of the model in a Hugging Face folder (config.json and safetensors) or a GGUF file, its weights not loaded.

    ``dtype`` (``"bf16"``, ``"f32"``, ...) is that of the weights and activations; by default what the config says.
    ``task`` (causal-lm, encoder, vision, seq2seq) is by default that of the config's architecture. Weights are read
    from the mapped files when they are asked for; those that are quantized already keep their codes. Raises
    CheckpointError for a folder that is damaged, incomplete, or has only pickled weights; otherwise as :func:`trace`.
    """
    from tilewright.frontend import skeleton
    from tilewright.frontend.checkpoint import Checkpoint
    from tilewright.frontend.quantized.packed import Reading
    from tilewright.frontend.quantized.settings import unpacked

    folder = Path(path)
    if folder.suffix == ".gguf" and folder.is_file():
        return _trace_gguf(folder, dtype)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    config, settings = skeleton.load_config(folder)
    checkpoint: skeleton.Tensors = Checkpoint(folder)
    notes: list[str] = []
    with _LOCK:
        kind = skeleton.model_class(config, task)
        model = skeleton.build(config, kind, skeleton.torch_dtype(dtype, config))
        if settings is not None:
            checkpoint = unpacked(Reading(checkpoint, settings, skeleton.classes_of(model), notes))
        return _bound(model, checkpoint, task, notes, _generation(folder))


def _trace_gguf(path: Path, dtype: str | None) -> Module:
    """The IR of the model in a GGUF file."""
    from tilewright.frontend import skeleton
    from tilewright.frontend.quantized import gguf_model
    from tilewright.frontend.quantized.gguf_file import GgufFile, opened

    file = GgufFile(path)
    config = gguf_model.config_of(file)
    checkpoint = opened(file, gguf_model.heads_of(file, config))
    with _LOCK:
        kind = skeleton.model_class(config, "causal-lm")
        chosen = gguf_model.dtype_of(file) if dtype is None else skeleton.torch_dtype(dtype, config)
        model = skeleton.build(config, kind, chosen)
        gguf_model.scale_frequencies(model, file)
        return _bound(model, checkpoint, None, gguf_model.notes_of(file), {})


def _bound(model: Any, checkpoint: Any, task: str | None, notes: Sequence[str], meta: Mapping[str, str]) -> Module:
    """The IR of a model without memory, with the weights of a checkpoint."""
    from tilewright.frontend import skeleton
    from tilewright.frontend.quantized.insert import insert_packed
    from tilewright.frontend.quantized.packed import PackedCheckpoint

    binding = skeleton.bind(model, checkpoint)
    skeleton.fake_parameters(model)
    module = _trace(model, recipe(model, (), {}, None, task), binding.sources, binding.missing)
    if isinstance(checkpoint, PackedCheckpoint):
        notes = [*notes, *insert_packed(module, checkpoint)]
        verify(module)
        module.meta |= {"notes": json.dumps(notes)} if notes else {}
    module.meta |= meta
    if binding.unused:
        module.meta["unused_tensors"] = json.dumps(binding.unused)
    return module


def _generation(folder: Path) -> dict[str, str]:
    """The end-of-sequence ids that the folder's generation_config.json gives; they go before the config's."""
    file = folder / "generation_config.json"
    eos = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    return {} if eos is None else {"eos": json.dumps(eos if isinstance(eos, list) else [eos])}


def _trace(model: nn.Module, how: Recipe, sources: Sources, missing: Sequence[str] = ()) -> Module:
    exported = export(model, how.args, how.kwargs, how.dynamic)
    module = convert(exported, type(model).__name__.lower(), sources, how.keep)
    module.meta |= how.meta
    _drop_outputs_without_weights(module, set(missing))
    verify(module)
    return module


def _drop_outputs_without_weights(module: Module, missing: set[str]) -> None:
    """Leave out results that need a weight which the checkpoint lacks, as an encoder's pooler; an error if all do."""
    absent = [w for w in module.weights.values() if w.name in missing]
    if not absent:
        return
    tainted: set[Value] = set(absent)
    function = module.functions["forward"]
    for op in function.body:
        if any(v in tainted for v in op.operands):
            tainted |= set(op.results)
    ends = function.terminator
    names = [n for n, v in zip(json.loads(module.meta["outputs"]), ends.values) if v not in tainted]
    if not names:
        raise CheckpointError(f"the checkpoint lacks {', '.join(w.name for w in absent)}")
    kept = tuple(v for v in ends.values if v not in tainted)
    ends.drop()
    function.append(Return(kept, loc=ends.loc))
    module.meta["outputs"] = json.dumps(names)
    drop_dead(module)
