"""The two ways in: a module, or a Hugging Face folder."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tilewright.frontend.convert import Sources, convert
from tilewright.frontend.export import export
from tilewright.ir.core import Module
from tilewright.ir.errors import TraceError
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

    Weights stay shared with ``model``. Raises TraceError or UnsupportedError with the module's path, the line and what
    to do instead: for branches on tensor values, attributes written by forward, sizes that change what the model does,
    operations that the IR lacks.
    """
    with _LOCK:
        return _trace(model, args, kwargs or {}, dynamic, {})


def _trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic: Mapping[str, Any] | None,
    sources: Sources,
) -> Module:
    from tilewright.frontend import pretrained

    keep: Sequence[str] = ()
    meta: dict[str, str] = {}
    if pretrained.is_pretrained(model):
        recipe = pretrained.recipe(model, args, kwargs, dynamic)
        args, kwargs, dynamic, keep, meta = recipe.args, recipe.kwargs, recipe.dynamic, recipe.keep, recipe.meta
    elif not args and not kwargs:
        raise TraceError(f"{type(model).__name__} needs example inputs: trace(model, (x,))")
    module = convert(export(model, args, kwargs, dynamic), type(model).__name__.lower(), sources, keep)
    module.meta |= meta
    verify(module)
    return module
