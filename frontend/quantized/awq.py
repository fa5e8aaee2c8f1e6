"""The format of AWQ (AutoAWQ, ``version: gemm``): codes in i32 words along N, eight in an order of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tilewright.frontend.quantized import bits as small
from tilewright.frontend.quantized.packed import SCALES, Layer, Packed, Part, Reading
from tilewright.ir.errors import UnsupportedError
from tilewright.ir.types import DType, TensorType

_BITS = 4
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word each of eight neighbours lies


def old_settings(found: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from a quant_config.json."""
    return {
        "quant_method": "awq",
        "bits": found["w_bit"],
        "group_size": found["q_group_size"],
        "zero_point": found["zero_point"],
        "version": found.get("version", "gemm"),
    }


def read(reading: Reading) -> dict[str, Packed]:
    """The packed weights by name; raises CheckpointError and UnsupportedError as ``settings.unpacked`` says."""
    settings, folder = reading.settings, reading.checkpoint.folder
    version, bits = str(settings.get("version", "gemm")).lower(), settings.get("bits", _BITS)
    if version != "gemm":
        raise UnsupportedError(f"{folder}: AWQ of the version {version} is not read, only gemm")
    if bits != _BITS:
        raise UnsupportedError(f"{folder}: AWQ with bits {bits} is not read, only {_BITS}")
    layers = reading.layers("qweight", "scales", "qzeros")
    lone = [key for key in reading.checkpoint.where if key.endswith("act.scales")]
    if lone:
        raise UnsupportedError(f"{folder}: {lone[0]} scales the results of an activation function, which is not supported")
    return {f"{layer.module}.weight": _packed(layer, settings) for layer in layers}


def _packed(layer: Layer, settings: Mapping[str, Any]) -> Packed:
    layer.expect("qweight", ("I32",), [None, None])
    k, width = layer.shape("qweight")
    n, size = width * 8, settings.get("group_size", 128)
    size = k if size in (-1, None, 0) else size
    if k % size:
        raise UnsupportedError(f"{layer.module}: group_size {size} does not divide its {k} columns, which is not supported")
    grid = (n, k // size)
    layer.expect("scales", tuple(SCALES), [k // size, n], f"groups of {size}")
    zero = settings.get("zero_point", True) is not False
    codes = small.holder(_BITS, signed=not zero)

    def unpacked() -> np.ndarray:
        found = _rows(layer.array("qweight"))
        return small.held(found if zero else small.signed(found, _BITS), codes)

    dtype, load = layer.scales("scales")
    parts = {
        codes.value: Part(TensorType((n, k), codes), unpacked),
        "scale": Part(TensorType(grid, dtype), lambda: np.ascontiguousarray(load().T)),
    }
    if zero:
        layer.expect("qzeros", ("I32",), [k // size, width], f"groups of {size}")
        parts["zero"] = Part(TensorType(grid, DType.u8), lambda: _rows(layer.array("qzeros")))
    keys = tuple(layer.key(name) for name in ("qweight", "scales", "qzeros") if layer.has(name))
    return Packed(layer.checkpoint, keys, parts)


def _rows(words: np.ndarray) -> np.ndarray:
    """Codes ``[N, R]`` of words ``[R, N / 8]``."""
    codes = small.unpack(words, _BITS, words.shape[1] * 8)
    return np.ascontiguousarray(codes.reshape(len(words), -1, 8)[..., _PLACES].reshape(len(words), -1).T)
