"""What stands in for attention, masks and experts while a transformers model is traced.

transformers lets a model's attention, mask and expert functions be replaced by name. Under the name ``tilewright``
the ops of :mod:`tilewright.frontend.opaque` are registered, so that a traced layer carries one attention, and a mask
carries its meaning (causal, window, chunk) instead of the arithmetic that spells it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tilewright.frontend import opaque  # noqa: F401  (defines torch.ops.tilewright)

NAME = "tilewright"


@dataclass
class MaskSpec:
    """Which keys a query sees: ``key <= query`` if causal, ``key > query - left``, ``key < query + right`` (where not
    negative), and ``key // chunk == query // chunk`` if chunk is positive."""

    causal: bool = False
    left: int = -1
    right: int = -1
    chunk: int = 0


_packed = False  # True while a model is traced whose position ids are an input and may say where sequences meet


def read_mask_function(fn: Callable[..., Any]) -> MaskSpec | None:
    """The meaning of one of transformers' mask closures, or None when it is not one that is known."""
    spec = MaskSpec()
    return spec if _read_into(fn, spec) else None


def _read_into(fn: Callable[..., Any], spec: MaskSpec) -> bool:
    cells = dict(zip(fn.__code__.co_freevars, (c.cell_contents for c in fn.__closure__ or ())))
    match fn.__qualname__.split(".")[0]:
        case "causal_mask_function":
            spec.causal = True
        case "bidirectional_mask_function":
            pass
        case "and_masks":
            return all(_read_into(f, spec) for f in cells["mask_functions"])
        case "sliding_window_overlay":
            spec.left = int(cells["sliding_window"])
        case "sliding_window_bidirectional_overlay":
            spec.left = spec.right = int(cells["sliding_window"]) + 1
        case "chunked_overlay":
            spec.chunk = int(cells["chunk_size"])
        # transformers looks for several sequences packed in one row; position ids that the model itself counts up
        # never say that, so the check folds away
        case "packed_sequence_mask_function":
            return not _packed
        case "remap_positions_for_packed_sequence":
            return not _packed and _read_into(cells["mask_function"], spec)
        case _:
            return False
    return True


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **rest: Any,
) -> Tensor:
    """The mask function of the AttentionMaskInterface: a mask op, or the mask itself when it is of an unknown kind.

    Always gives a mask: ``None`` would let the attention fall back to the module's own idea of causality.
    """
    spec = None if rest.get("use_vmap") or mask_function is None else read_mask_function(mask_function)
    if spec is not None:
        sizes = (batch_size, q_length, kv_length, q_offset, kv_offset)
        return torch.ops.tilewright.mask(attention_mask, *sizes, *asdict(spec).values())
    rest |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **rest)


def make_float_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
    """:func:`make_mask` for attention written out by hand, which adds its mask to the scores."""
    keep = make_mask(*args, **kwargs)
    return torch.where(keep, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function of the AttentionInterface: q ``[B, Hq, S, D]``, k and v ``[B, Hkv, T, D]``."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = torch.ops.tilewright.attention(
        query,
        key,
        value,
        attention_mask,
        position_bias,
        sinks if s_aux is None else s_aux,
        float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        bool(causal) and attention_mask is None,
        float(softcap or 0.0),
    )
    return out, None


_ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUActivation": "gelu", "ReLU": "relu"}


def run_experts(module: Any, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The experts function: one op a layer for gated SiLU and its like, gathered matrices for anything else."""
    act = _ACTIVATIONS.get(type(module.act_fn).__name__) if hasattr(module, "act_fn") else None
    plain = type(module)._apply_gate is _default_apply_gate and act and not module.has_bias
    if not plain or module.has_post_expert_norm or not module.is_concatenated:
        return ALL_EXPERTS_FUNCTIONS["batched_mm"](module, x, indices, weights)
    up = module.gate_up_proj if module.has_gate else module.up_proj
    flags = (act, module.has_gate, module.is_transposed)
    return torch.ops.tilewright.experts(x, indices, weights, up, module.down_proj, *flags)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)
ALL_EXPERTS_FUNCTIONS.register(NAME, run_experts)


@contextmanager
def installed(model: nn.Module, packed: bool = False) -> Iterator[None]:
    """Have ``model`` use the functions above inside the block; nothing happens to a model that is not transformers'.

    Registering on a class that ignores the interface is silently wrong, so only those that honour it are switched;
    for the others (bloom, mpt, falcon, gptj) the mask functions that their attention asks for are replaced. Nothing is
    cached: a KV cache is made by a pass.
    ``packed``: position ids are an input of the model.
    """
    global _packed
    undo: list[Callable[[], None]] = []
    _packed = packed
    try:
        for config, attention, experts in _configs(model):
            if attention:
                undo.append(_swap(config, "_attn_implementation_internal", NAME))
            if experts:
                undo.append(_swap(config, "_experts_implementation_internal", NAME))
            if getattr(config, "use_cache", False):
                undo.append(_swap(config, "use_cache", False))
        if any(not _honours_attention(m) for m in _pretrained(model)):
            undo.extend(_swap_masks())
        yield
    finally:
        _packed = False
        for step in reversed(undo):
            step()


def _pretrained(model: nn.Module) -> list[Any]:
    from transformers import PreTrainedModel

    return [m for m in model.modules() if isinstance(m, PreTrainedModel)]


def _honours_attention(model: Any) -> bool:
    return type(model)._can_set_attn_implementation()


def _configs(model: nn.Module) -> list[tuple[Any, bool, bool]]:
    """Every config in use below ``model``, with whether its attention and its experts can be switched."""
    found: dict[int, tuple[Any, bool, bool]] = {}
    for owner in _pretrained(model):
        attention, experts = _honours_attention(owner), type(owner)._can_set_experts_implementation()
        for module in owner.modules():
            config = getattr(module, "config", None)
            if config is not None and hasattr(config, "_attn_implementation_internal"):
                _, a, e = found.get(id(config), (config, True, False))
                found[id(config)] = (config, a and attention, e or experts)
    return list(found.values())


def _swap(owner: Any, name: str, value: Any) -> Callable[[], None]:
    before = getattr(owner, name, None)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


def _swap_masks() -> list[Callable[[], None]]:
    table = AttentionMaskInterface._global_mapping
    before = {name: table[name] for name in ("sdpa", "eager")}
    table.update(sdpa=make_mask, eager=make_float_mask)
    return [lambda: table.update(before)]
