"""How the interpreter computes: narrow floats are widened to f32, and rounded once at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tilewright.ir.types import DType

Array = np.ndarray[Any, Any]


def wide(x: Array) -> Array:
    """bf16 and f16 as f32; everything else as it is."""
    return x.astype(np.float32) if x.dtype in (DType.bf16.np, DType.f16.np) else x


def rounded(fn: Callable[..., Any], *xs: Array, dtype: DType | None = None) -> Array:
    """``fn`` of the widened arrays, rounded to ``dtype`` (the first array's when None)."""
    with np.errstate(all="ignore"):
        out = np.asarray(fn(*map(wide, xs)))
    return out.astype(dtype.np if dtype else xs[0].dtype)


_erf = np.frompyfunc(math.erf, 1, 1)


def erf(x: Array) -> Array:
    return np.asarray(_erf(x.astype(np.float64)), np.float64).astype(x.dtype).reshape(x.shape)


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def gelu(x: Array) -> Array:
    return 0.5 * x * (1.0 + erf(x * np.asarray(math.sqrt(0.5), x.dtype)))


def gelu_tanh(x: Array) -> Array:
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1.0 + np.tanh(inner))


def softplus(x: Array) -> Array:
    return np.logaddexp(x, np.zeros((), x.dtype))


def softmax(x: Array, axis: int = -1) -> Array:
    """Softmax whose rows of only ``-inf`` are zero."""
    top = np.max(x, axis=axis, keepdims=True, initial=-np.inf)
    e = np.exp(x - np.where(np.isfinite(top), top, 0))
    total = e.sum(axis=axis, keepdims=True)
    return np.asarray(e / np.where(total == 0, 1, total))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * sigmoid(x),
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}
"""Activations that gated and expert layers take by name."""
