"""How a key/value cache lies in a GPU's memory, and how kernels' C finds its way in there.

Kernels ask the layout for the address of a row (one slot of one head) and for the element type, and bring rows in by
pieces of 16 bytes, which `Operand` widens where its tiles are of another type. Another layout is another class with the
same methods.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

_STORED = {"f32": np.dtype("f4"), "f16": np.dtype("f2"), "bf16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class CudaCacheLayout:
    """Row-major: K ``[heads, length, dim]`` and V ``[heads, length, vdim]`` of each sequence, one layer's cache."""

    heads: int
    dim: int
    vdim: int
    length: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in _STORED:
            raise ValueError(f"no cache of {self.dtype}; known: {', '.join(_STORED)}")

    @property
    def k_shape(self) -> tuple[int, ...]:
        """Of one sequence."""
        return self.heads, self.length, self.dim

    @property
    def v_shape(self) -> tuple[int, ...]:
        """Of one sequence."""
        return self.heads, self.length, self.vdim

    @property
    def k_bytes(self) -> int:
        """Bytes of K of one sequence."""
        return self.heads * self.length * self.dim * _STORED[self.dtype].itemsize

    @property
    def v_bytes(self) -> int:
        """Bytes of V of one sequence."""
        return self.heads * self.length * self.vdim * _STORED[self.dtype].itemsize

    def empty(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """A fresh cache, zero: K ``[batch, *k_shape]`` and V ``[batch, *v_shape]``."""
        kind = _STORED[self.dtype]
        return np.zeros((batch, *self.k_shape), kind), np.zeros((batch, *self.v_shape), kind)

    def read(self, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Plain copies: K ``[B, length, heads, dim]`` and V ``[B, length, heads, vdim]``."""
        keys, values = k.reshape(-1, *self.k_shape), v.reshape(-1, *self.v_shape)
        return np.ascontiguousarray(keys.swapaxes(1, 2)), np.ascontiguousarray(values.swapaxes(1, 2))

    def write(self, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A cache whose first slots hold ``keys`` [B, T, heads, dim] and ``values`` [B, T, heads, vdim]."""
        k, v = self.empty(len(keys))
        for store, new in ((k, keys), (v, values)):
            store[:, :, : new.shape[1]] = new.swapaxes(1, 2)
        return k, v

    def row(self, pointer: str, size: int, batch: str, head: str, slot: str) -> str:
        """C: where the ``size`` elements of a slot begin; ``pointer`` is K or V, the places are i64."""
        return f"{pointer} + ({batch} * {self.heads} + {head}) * {self.length * size} + {slot} * {size}"
