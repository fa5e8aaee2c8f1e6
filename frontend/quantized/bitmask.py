"""The sparse formats of compressed-tensors: numbers that are not zero, and bits that say where they are.

``sparse-bitmask`` has the numbers in one list, with where each row begins; ``sparse-24-bitmask`` has half of each row. Bits
are eight a byte, the first in the lowest one. What is read is the weight with its zeros; codes are codes as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tilewright.frontend.checkpoint import Checkpoint, Entry, TensorSource
from tilewright.frontend.quantized.packed import Layer, Reading
from tilewright.ir.errors import UnsupportedError

FORMATS = ("dense", "sparse-bitmask", "sparse-24-bitmask")
_PARTS = ("shape", "compressed", "bitmask", "row_offsets")


def expanded(reading: Reading) -> Reading:
    """``reading`` with the weights of its sparse layers under their own names.

    Raises UnsupportedError for a format that is not read, CheckpointError naming the tensor for parts that do not fit.
    """
    settings = reading.settings.get("sparsity_config") or {}
    kind = settings.get("format", "dense")
    if kind not in FORMATS:
        known = ", ".join(FORMATS)
        raise UnsupportedError(f"{reading.checkpoint.folder}: the sparse format {kind} is not read; there are {known}")
    rest = {key: value for key, value in reading.settings.items() if key != "sparsity_config"}
    if kind == "dense":
        return replace(reading, settings=rest)
    layers = {f"{layer.module}.weight": layer for layer in reading.layers("compressed")}
    shapes = {name: _shape(layer, kind) for name, layer in layers.items()}
    return replace(reading, settings=rest, checkpoint=ExpandedCheckpoint(reading.checkpoint, layers, shapes))


_NUMBERS = ("F32", "F16", "BF16", "I8", "F8_E4M3", "F8_E5M2")


def _shape(layer: Layer, kind: str) -> tuple[int, int]:
    """Rows and columns of a layer's weight."""
    layer.expect("shape", ("I64", "I32"), [2, 1] if kind == "sparse-24-bitmask" else [2])
    n, k = (int(size) for size in layer.array("shape").reshape(-1))
    layer.expect("bitmask", ("U8",), [n, -(-k // 8)], f"{k} bits a row")
    half = kind == "sparse-24-bitmask"
    layer.expect("compressed", _NUMBERS, [n, k // 2] if half else [None])
    if not half:
        layer.expect("row_offsets", ("I64", "I32"), [n])
    return n, k


class ExpandedCheckpoint(Checkpoint):
    """A checkpoint in which sparse weights are dense ones, and their parts are not to be seen."""

    def __init__(self, inner: Checkpoint, layers: Mapping[str, Layer], shapes: Mapping[str, tuple[int, int]]) -> None:
        self.inner, self.layers, self.shapes, self.folder = inner, layers, shapes, inner.folder
        parts = {layer.key(part) for layer in layers.values() for part in _PARTS}
        self.where = {key: file for key, file in inner.where.items() if key not in parts}
        self.where |= {name: inner.where[layer.key("compressed")] for name, layer in layers.items()}

    def entry(self, name: str) -> Entry:
        if name not in self.layers:
            return self.inner.entry(name)
        return Entry(self.layers[name].dtype("compressed"), self.shapes[name], 0, 0)

    def array(self, name: str) -> np.ndarray:
        return dense(self.layers[name], self.shapes[name]) if name in self.layers else self.inner.array(name)

    def source(self, name: str, dtype: np.dtype) -> TensorSource:
        return TensorSource(self, name, dtype)

    def release(self, name: str) -> None:
        layer = self.layers.get(name)
        for key in (name,) if layer is None else (layer.key(part) for part in _PARTS if layer.has(part)):
            self.inner.release(key)


def dense(layer: Layer, shape: tuple[int, int]) -> np.ndarray:
    """The weight ``shape``; raises CheckpointError when there are not as many numbers as bits."""
    bits: Any = np.unpackbits(layer.array("bitmask"), axis=1, count=shape[1], bitorder="little").view(bool)
    numbers = layer.array("compressed").reshape(-1)
    counts = bits.sum(1)
    if counts.sum() != numbers.size:
        layer.fail("compressed", f"has {numbers.size} numbers, and its bitmask says {counts.sum()}")
    if layer.has("row_offsets") and not np.array_equal(layer.array("row_offsets"), np.cumsum(counts) - counts):
        layer.fail("row_offsets", "is not what the bitmask says")
    out = np.zeros(shape, numbers.dtype)
    out[bits] = numbers
    return out
