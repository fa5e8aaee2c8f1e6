"""The format of GPTQ (AutoGPTQ, GPTQModel): codes in i32 words along K, zero points along N, the group of each column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tilewright.frontend.quantized import bits as small
from tilewright.frontend.quantized.grouped import ordered
from tilewright.frontend.quantized.packed import SCALES, Layer, Packed, Part, Reading
from tilewright.ir.errors import UnsupportedError
from tilewright.ir.types import DType, TensorType

_BITS = (2, 3, 4, 8)
_ZEROS = {"gptq": 1, "gptq_v2": 0}  # by checkpoint_format: what is to be added to the zero points that are kept


def old_settings(found: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from a quantize_config.json."""
    return {**found, "quant_method": found.get("quant_method", "gptq")}


def read(reading: Reading) -> dict[str, Packed]:
    """The packed weights by name; raises CheckpointError and UnsupportedError as ``settings.unpacked`` says."""
    settings, folder = reading.settings, reading.checkpoint.folder
    kept = settings.get("checkpoint_format") or "gptq"
    if kept not in _ZEROS:
        raise UnsupportedError(f"{folder}: the checkpoint_format {kept} is not read; there are {', '.join(_ZEROS)}")
    if settings.get("pack_dtype", "int32") != "int32":
        raise UnsupportedError(f"{folder}: the pack_dtype {settings['pack_dtype']} is not read, only int32")
    bits = settings.get("bits")
    if bits not in _BITS:
        raise UnsupportedError(f"{folder}: GPTQ with bits {bits} is not read; there are {', '.join(map(str, _BITS))}")
    layers = reading.layers("qweight", "scales", "qzeros", "g_idx")
    return {f"{layer.module}.weight": _packed(layer, settings, _ZEROS[kept]) for layer in layers}


def _packed(layer: Layer, settings: Mapping[str, Any], add: int) -> Packed:
    layer.expect("qweight", ("I32",), [None, None])
    words, n = layer.shape("qweight")
    bits, k = _width(layer, settings, words)
    layer.expect("scales", tuple(SCALES), [None, n])
    groups = _groups(layer, settings, k)
    layer.expect("qzeros", ("I32",), [groups, small.words_for(n, bits)], f"{n} zero points of {bits} bits a group")
    zeros = _zeros(layer, bits, n, add)
    middle = settings.get("sym", False) is True and bool((zeros == 1 << (bits - 1)).all())
    codes, grid = small.holder(bits, signed=middle), (n, groups)

    def unpacked() -> np.ndarray:
        found = small.unpack(layer.array("qweight").T, bits, k)
        return small.held(small.signed(found, bits) if middle else found, codes)

    dtype, load = layer.scales("scales")
    parts = {
        codes.value: Part(TensorType((n, k), codes), unpacked),
        "scale": Part(TensorType(grid, dtype), lambda: np.ascontiguousarray(load().T)),
    }
    if not middle:
        parts["zero"] = Part(TensorType(grid, DType.u8), lambda: _zeros(layer, bits, n, add))
    keys = tuple(layer.key(name) for name in ("qweight", "scales", "qzeros", "g_idx") if layer.has(name))
    whole = Packed(layer.checkpoint, keys, parts)
    return ordered(whole, layer, "g_idx") if layer.has("g_idx") else whole


def _width(layer: Layer, settings: Mapping[str, Any], words: int) -> tuple[int, int]:
    """Bits of a code, and K. The layer's own where the settings say that layers differ, which ``g_idx`` then tells."""
    bits = int(settings["bits"])
    if settings.get("dynamic") and layer.has("g_idx"):
        k = layer.shape("g_idx")[0]
        bits = words * 32 // max(k, 1)
        if bits not in _BITS or words * 32 != bits * k:
            layer.fail("qweight", f"has {words} words for {k} columns, which is no number of bits that is read")
    if words * 32 % bits:
        layer.fail("qweight", f"has {words} words, no whole number of codes of {bits} bits")
    return bits, words * 32 // bits


def _groups(layer: Layer, settings: Mapping[str, Any], k: int) -> int:
    """How many groups there are along K."""
    groups, size = layer.shape("scales")[0], settings.get("group_size", -1)
    if settings.get("dynamic"):
        size = k // groups if groups and k % groups == 0 else size
    size = k if size in (-1, None, 0) else size
    if k % size:
        raise UnsupportedError(f"{layer.module}: group_size {size} does not divide its {k} columns, which is not supported")
    layer.expect("scales", tuple(SCALES), [k // size, None], f"groups of {size}")
    return k // size


def _zeros(layer: Layer, bits: int, n: int, add: int) -> np.ndarray:
    """Zero points u8 ``[N, G]``. What is kept of them in the first version is one less, and wraps around."""
    kept = small.unpack(layer.array("qzeros"), bits, n).T
    return np.ascontiguousarray((kept + np.uint8(add)) & np.uint8(2**bits - 1))
