"""From PyTorch to the IR: :func:`trace` an ``nn.Module``, :func:`trace_folder` a Hugging Face folder.

The only package that imports torch and transformers, and only when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright.frontend.api import trace, trace_folder

__all__ = ["trace", "trace_folder"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tilewright.frontend import api

    return getattr(api, name)
