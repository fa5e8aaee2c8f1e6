"""The format of compressed-tensors: ``weight_packed`` in i32 words, or ``weight`` in 8-bit integers and floats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tilewright.frontend.quantized import bits as small
from tilewright.frontend.quantized.grouped import ordered
from tilewright.frontend.quantized.packed import SCALES, Layer, Packed, Part, Reading
from tilewright.frontend.quantized.schemes import Scheme, Schemes
from tilewright.ir.errors import UnsupportedError
from tilewright.ir.types import DType, TensorType

_FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense",
)  # fmt: skip
_OWN = tuple(f"weight_{part}" for part in ("packed", "scale", "zero_point", "shape", "g_idx", "global_scale"))
_FLOATS = {"F8_E4M3": DType.f8e4m3, "F8_E5M2": DType.f8e5m2}


def read(reading: Reading) -> dict[str, Packed]:
    """The packed weights by name; raises CheckpointError and UnsupportedError as ``settings.unpacked`` says."""
    schemes, known = Schemes(reading), ", ".join(_FORMATS)
    for name in {g.get("format") for g in (reading.settings, *schemes.groups.values())} - {*_FORMATS, None}:
        raise UnsupportedError(f"{reading.checkpoint.folder}: the format {name} is not read; there are {known}")
    return {f"{layer.module}.weight": _packed(layer, schemes.of(layer.module)) for layer in reading.layers(*_OWN)}


def _packed(layer: Layer, scheme: Scheme) -> Packed:
    if layer.has("weight_global_scale"):
        layer.fail("weight_global_scale", "belongs to a scheme with two levels of scales, which is not read")
    in_words = layer.has("weight_packed")
    codes = _words(layer, scheme) if in_words else _plain(layer, scheme)
    n, k = map(int, codes.type.shape)
    grid, spread = _grid(layer, scheme, n, k)
    dtype, load = layer.scales("weight_scale")
    parts = {codes.type.dtype.value: codes, "scale": Part(TensorType(grid, dtype), lambda: spread(load()))}
    if not scheme.symmetric:
        zeros = _packed_zeros(layer, scheme, grid) if in_words else _plain_zeros(layer, scheme, grid, spread)
        parts["zero"] = Part(TensorType(grid, DType.u8), zeros)
    elif layer.has("weight_zero_point") and layer.array("weight_zero_point").astype(np.float32).any():
        layer.fail("weight_zero_point", "is not zero, and its scheme says symmetric")
    keys = tuple(layer.key(name) for name in (*_OWN, "weight") if layer.has(name))
    whole = Packed(layer.checkpoint, keys, parts, dynamic=scheme.dynamic)
    return ordered(whole, layer, "weight_g_idx") if layer.has("weight_g_idx") else whole


def _words(layer: Layer, scheme: Scheme) -> Part:
    """Codes in i32 words."""
    if scheme.is_float:
        layer.fail("weight_packed", "is packed, and its scheme says type float; only weights of 8 bits are read")
    layer.expect("weight_shape", ("I64", "I32"), [2])
    n, k = map(int, layer.array("weight_shape"))
    width = small.words_for(k, scheme.bits)
    layer.expect("weight_packed", ("I32",), [n, width], f"{k} codes of {scheme.bits} bits a row")
    dtype = small.holder(scheme.bits, scheme.symmetric)

    def make() -> np.ndarray:
        codes = small.unpack(layer.array("weight_packed"), scheme.bits, k)
        return small.held(small.signed(codes, scheme.bits) if scheme.symmetric else codes, dtype)

    return Part(TensorType((n, k), dtype), make)


def _plain(layer: Layer, scheme: Scheme) -> Part:
    """Codes in a tensor of their own type."""
    layer.expect("weight", tuple(_FLOATS) if scheme.is_float else ("I8",), [None, None])
    shape = layer.shape("weight")
    if scheme.is_float:
        return Part(TensorType(shape, _FLOATS[layer.dtype("weight")]), lambda: layer.array("weight"))
    dtype, half = small.holder(scheme.bits, scheme.symmetric), 1 << (scheme.bits - 1)

    def make() -> np.ndarray:
        codes = layer.array("weight")
        if scheme.bits < 8 and (codes.min(initial=0) < -half or codes.max(initial=0) >= half):
            layer.fail("weight", f"has codes beyond {scheme.bits} bits")
        return small.held(codes if scheme.symmetric else codes.view(np.uint8) + np.uint8(half), dtype)

    return Part(TensorType(shape, dtype), make)


def _grid(layer: Layer, scheme: Scheme, n: int, k: int) -> tuple[tuple[int, int], Callable[[np.ndarray], np.ndarray]]:
    """The shape ``[N, G]`` of scales in the IR, and what makes it of that on disk."""
    kinds, (rows, size) = tuple(SCALES), scheme.block
    if scheme.strategy == "tensor":
        if layer.has("weight_scale") and layer.shape("weight_scale") == ():
            layer.expect("weight_scale", kinds, [])
        else:
            layer.expect("weight_scale", kinds, [1])
        return (n, 1), lambda scale: np.broadcast_to(scale.reshape(1, 1), (n, 1))
    if size and k % size:
        raise UnsupportedError(f"{layer.module}: groups of {size} do not divide its rows of {k}, which is not supported")
    groups = k // size if size else 1
    if scheme.strategy == "block":
        layer.expect("weight_scale", kinds, [-(-n // rows), groups], f"blocks of {rows} x {size}")
        return (n, groups), lambda scale: np.repeat(scale, rows, axis=0)[:n]
    layer.expect("weight_scale", kinds, [n, groups], f"groups of {size}" if size else "a scale a row")
    return (n, groups), lambda scale: scale


def _packed_zeros(layer: Layer, scheme: Scheme, grid: tuple[int, int]) -> Callable[[], np.ndarray]:
    """Zero points in i32 words, along N."""
    n, groups = grid
    layer.expect("weight_zero_point", ("I32",), [small.words_for(n, scheme.bits), groups])

    def make() -> np.ndarray:
        words = layer.array("weight_zero_point").T
        return np.ascontiguousarray(small.unpack(words, scheme.bits, n).T)

    return make


def _plain_zeros(layer: Layer, scheme: Scheme, grid: tuple[int, int], spread: Callable[[np.ndarray], np.ndarray]
                 ) -> Callable[[], np.ndarray]:  # fmt: skip
    """Zero points as they are, about the middle."""
    layer.expect("weight_zero_point", ("I8",), list(layer.shape("weight_scale")))
    half = np.uint8(1 << (scheme.bits - 1))
    return lambda: spread(layer.array("weight_zero_point")).view(np.uint8) + half
