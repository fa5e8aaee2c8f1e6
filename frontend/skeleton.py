"""A transformers model without the memory of its weights, and which tensor of a checkpoint each weight is."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from tilewright.frontend.checkpoint import Checkpoint, ConvertedSource
from tilewright.frontend.quantized.packed import PackedCheckpoint
from tilewright.frontend.quantized.settings import Settings, settings_of
from tilewright.frontend.symbols import DTYPES
from tilewright.frontend.table import numpy_of
from tilewright.ir.errors import CheckpointError, UnsupportedError
from tilewright.ir.sources import WeightSource

Tensors = Checkpoint | PackedCheckpoint
_BY_TASK = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "vision": "AutoModelForImageClassification",
    "encoder": "AutoModel",
}
_TORCH_DTYPES = {d.value: t for t, d in DTYPES.items() if d.is_float} | {str(t)[6:]: t for t in DTYPES}


def load_config(folder: Path) -> tuple[Any, Settings | None]:
    """The folder's config, and how its weights are quantized if they are.

    Raises CheckpointError or UnsupportedError for a folder that cannot be compiled.
    """
    file = folder / "config.json"
    if not file.exists():
        raise CheckpointError(f"{folder} has no config.json; give a folder as model.save_pretrained writes it")
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    settings = settings_of(folder, raw)
    if "auto_map" in raw and raw.get("model_type") not in transformers.CONFIG_MAPPING:
        raise UnsupportedError(f"{folder} brings its own Python code, which is not run; trace the module instead")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{file}: {str(error).splitlines()[0]}") from None
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        part.__dict__.pop("quantization_config", None)  # the model is built as if it were not quantized
    return config, settings


def model_class(config: Any, task: str | None) -> Any:
    """The class named by the config's ``architectures``, or the one transformers uses for ``task``."""
    if task is not None:
        if task not in _BY_TASK:
            raise UnsupportedError(f"unknown task {task!r}; there are {', '.join(_BY_TASK)}")
        mapping = getattr(transformers, _BY_TASK[task])._model_mapping
        if type(config) not in mapping:
            raise UnsupportedError(f"transformers has no model of type {config.model_type} for the task {task}")
        found = mapping[type(config)]
        return found[0] if isinstance(found, tuple) else found
    names = getattr(config, "architectures", None) or []
    if len(names) != 1 or not hasattr(transformers, names[0]):
        raise UnsupportedError(f"config.json names the architectures {names}, expected one of transformers'; give a task")
    return getattr(transformers, names[0])


def torch_dtype(dtype: str | None, config: Any) -> torch.dtype:
    """``"bf16"`` or ``"bfloat16"`` as a torch type; without one, the type that the config names, else f32."""
    if dtype is None:
        return getattr(config, "dtype", None) or torch.float32
    if str(dtype) not in _TORCH_DTYPES:
        raise UnsupportedError(f"unknown dtype {dtype!r}; there are f32, bf16, f16, f64")
    return _TORCH_DTYPES[str(dtype)]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters lose their memory as they are registered, before anything writes to it; buffers are real."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def build(config: Any, kind: Any, dtype: torch.dtype) -> Any:
    """The model with parameters on the meta device, in eval mode, tied weights shared."""
    sdpa = kind._supports_sdpa and not kind._can_set_attn_implementation()
    config._attn_implementation = "sdpa" if sdpa else "eager"
    with _parameters_on_meta(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind._from_config(config, dtype=dtype)
        model.tie_weights()
    return model.eval()


def fake_parameters(model: nn.Module) -> None:
    """Exchange meta parameters for fakes that claim the CPU: torch.export would bake ``meta`` into the graph."""
    made: dict[int, nn.Parameter] = {}
    with FakeTensorMode():
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is None:
                    continue
                if id(p) not in made:
                    empty = torch.empty(p.shape, dtype=p.dtype, device="cpu")
                    made[id(p)] = nn.Parameter(empty, requires_grad=False)
                module._parameters[name] = made[id(p)]


@dataclass
class Group:
    """Tensors of the checkpoint that together make one weight, or several."""

    converter: Any
    parts: list[tuple[str, str]] = field(default_factory=list)  # name on disk, pattern of the converter it matched


@dataclass
class Binding:
    """What was found for a model: a source for each weight, names that were not found, tensors that nothing uses."""

    sources: dict[str, WeightSource]
    missing: list[str]
    unused: list[str]


def classes_of(model: nn.Module) -> dict[str, str]:
    """The class of each module, by its name."""
    return {name: type(module).__name__ for name, module in model.named_modules()}


def bind(model: Any, checkpoint: Tensors) -> Binding:
    """Match the checkpoint's names with the model's, by transformers' own tables. Reads no tensor.

    Raises CheckpointError for a shape that does not fit.
    """
    state = model.state_dict()
    groups, unused = _groups(model, checkpoint, state)
    sources: dict[str, WeightSource] = {}
    for first, group in groups.items():
        sources |= _sources(model, checkpoint, state, first, group)
    _share_tied(model, sources)
    parameters = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    return Binding(sources, [n for n in parameters if n not in sources], unused)


def _groups(model: Any, checkpoint: Tensors, state: Mapping[str, Any]) -> tuple[dict[str, Group], list[str]]:
    """For each weight (the first of each conversion) its tensors on disk; and the tensors that fit nothing."""
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    prefix = model.base_model_prefix
    groups: dict[str, Group] = {}
    unused = []
    for key in sorted(checkpoint.where, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            unused.append(key)
            continue
        group = groups.setdefault(name, Group(by_pattern[pattern] if pattern else None))
        group.parts.append((key, pattern or key))
    return groups, unused


def _sources(
    model: Any, checkpoint: Tensors, state: Mapping[str, Any], first: str, group: Group
) -> dict[str, WeightSource]:
    if group.converter is None:
        (key, _), *_ = group.parts
        _expect_plain(model, first, checkpoint, key)
        _expect_shape(first, checkpoint.entry(key).shape, state)
        return {first: checkpoint.source(key, _numpy_dtype(state[first]))}
    keys = tuple(k for k, _ in group.parts)
    results = _convert(model, first, group, lambda key: _meta(checkpoint, key))
    out: dict[str, WeightSource] = {}
    for name, tensor in results.items():
        if name not in state:
            continue
        _expect_shape(name, tuple(tensor.shape), state)
        make = partial(_load_converted, model, checkpoint, first, group, name)
        out[name] = ConvertedSource(checkpoint, keys, _numpy_dtype(state[name]), make)
    return out


def _expect_plain(model: nn.Module, name: str, checkpoint: Tensors, key: str) -> None:
    """Raises UnsupportedError for a packed weight of a module that has its weight another way round, or no matrix."""
    if not isinstance(checkpoint, PackedCheckpoint) or key not in checkpoint.packed:
        return
    owner = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(owner, (nn.Linear, nn.Embedding)):
        kind = type(owner).__name__
        raise UnsupportedError(f"{name}: quantized weights of a {kind} are not read, only of linear layers and embeddings")


def _numpy_dtype(tensor: torch.Tensor) -> np.dtype:
    return DTYPES[tensor.dtype].np


def _expect_shape(name: str, got: tuple[int, ...], state: Mapping[str, Any]) -> None:
    want = tuple(state[name].shape)
    if got != want:
        raise CheckpointError(f"{name}: the model expects shape {list(want)}, the checkpoint has {list(got)}")


def _meta(checkpoint: Tensors, key: str) -> torch.Tensor:
    return torch.empty(checkpoint.entry(key).shape, device="meta")


def _real(checkpoint: Tensors, key: str) -> torch.Tensor:
    array = checkpoint.array(key)
    if str(array.dtype) == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _convert(model: Any, first: str, group: Group, read: Any) -> dict[str, torch.Tensor]:
    """Run transformers' conversion on the tensors that ``read`` gives: weight name -> tensor."""
    converter = copy.deepcopy(group.converter)
    for key, pattern in group.parts:
        converter.add_tensor(first, key, pattern, partial(read, key))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arrays that are read-only: nothing here writes
        results = converter.convert(first, model=model, config=model.config)
    return {name: t[0] if isinstance(t, list) else t for name, t in results.items()}


def _load_converted(model: Any, checkpoint: Tensors, first: str, group: Group, name: str) -> np.ndarray:
    return numpy_of(_convert(model, first, group, partial(_real, checkpoint))[name])


def _share_tied(model: nn.Module, sources: dict[str, WeightSource]) -> None:
    """Give every name of a tied weight the source of the one that is in the checkpoint."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    for tied in names.values():
        found = next((sources[n] for n in tied if n in sources), None)
        if found is not None:
            sources.update({n: found for n in tied if n not in sources})
