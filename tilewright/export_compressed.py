"""Quantized weights as compressed-tensors keeps them: tensors by name, and the quantization_config that says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.export_layers import Rows, Stored
from tilewright.ir import DType, UnsupportedError

_INTEGERS = {DType.i8: 8, DType.i4: 4, DType.i3: 3, DType.i2: 2, DType.u8: 8, DType.u4: 4, DType.u3: 3, DType.u2: 2}
_SCALES = (DType.f32, DType.f16)
_NAMES = {DType.f32: "F32", DType.f16: "F16", DType.bf16: "BF16", DType.f8e4m3: "F8_E4M3", DType.f64: "F64"}
Array = np.ndarray


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file: name, type as safetensors calls it, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def check(item: Stored) -> None:
    """Raises UnsupportedError naming a weight that the format does not carry."""
    codes, scale = item.codes, item.scale
    if scale is None:
        if codes.dtype not in _NAMES:
            raise UnsupportedError(f"@{codes.name}: compressed-tensors carries no plain weights of {codes.dtype.value}")
        return
    if codes.dtype not in (*_INTEGERS, DType.f8e4m3) or scale.dtype not in _SCALES:
        kind = f"codes {codes.dtype.value} with scales {scale.dtype.value}"
        raise UnsupportedError(
            f"@{codes.name}: compressed-tensors carries no {kind}; it has i2 to i8, u2 to u8 and f8e4m3 with scales of "
            "f32 or f16, such as the schemes w8a16, w8a8, w4a16, w4a8, w3a16, w2a16 and fp8 give"
        )


def format_of(item: Stored) -> str:
    """The name of the package's format for the weight."""
    if item.codes.dtype is DType.f8e4m3:
        return "float-quantized" if item.dynamic else "naive-quantized"
    return "int-quantized" if item.dynamic and item.codes.dtype.bits == 8 else "pack-quantized"


def tensors(item: Stored) -> list[Tensor]:
    """The tensors of the file, in the order of :func:`arrays`."""
    return [t for rows in item.rows for t in _tensors(item, rows)]


def _tensors(item: Stored, rows: Rows) -> Iterator[Tensor]:
    n = rows.stop - rows.start
    if item.scale is None:
        yield Tensor(rows.name, _NAMES[item.codes.dtype], (n, *map(int, item.codes.shape[1:])))
        return
    k, groups = int(item.codes.shape[1]), int(item.scale.shape[1])
    packed, bits = format_of(item) == "pack-quantized", item.codes.dtype.bits
    if packed:
        yield Tensor(f"{rows.name}_packed", "I32", (n, -(-k * bits // 32)))
        yield Tensor(f"{rows.name}_shape", "I64", (2,))
    else:
        yield Tensor(rows.name, "F8_E4M3" if item.codes.dtype is DType.f8e4m3 else "I8", (n, k))
    yield Tensor(f"{rows.name}_scale", _NAMES[item.scale.dtype], (n, groups))
    if item.zero is not None:
        shape = (-(-n * bits // 32), groups) if packed else (n, groups)
        yield Tensor(f"{rows.name}_zero_point", "I32" if packed else "I8", shape)


def arrays(item: Stored) -> Iterator[Array]:
    """The numbers of :func:`tensors`; loads the weight once."""
    parts = [part.load() for part in item.parts]
    for rows in item.rows:
        yield from _arrays(item, [part[rows.start : rows.stop] for part in parts])
    for part in item.parts:
        part.release()


def _arrays(item: Stored, parts: Sequence[Array]) -> Iterator[Array]:
    if item.scale is None:
        yield parts[0]
        return
    codes, scale, *zero = parts
    if item.codes.dtype is DType.f8e4m3:
        yield from (codes, scale)
        return
    bits = item.codes.dtype.bits
    half = np.uint8(1 << (bits - 1))
    numbers = codes.astype(np.uint8 if zero else np.int8).view(np.uint8)
    unsigned = numbers if zero else numbers + half
    if format_of(item) == "pack-quantized":
        yield pack(unsigned, bits)
        yield np.array(codes.shape, np.int64)
        yield scale
        yield from (np.ascontiguousarray(pack(np.ascontiguousarray(z.T), bits).T) for z in zero)
        return
    yield (unsigned - half).view(np.int8)
    yield scale
    yield from ((z - half).view(np.int8) for z in zero)


def pack(codes: Array, bits: int) -> Array:
    """Unsigned codes ``[R, C]`` one after the other in words ``[R, W]`` of 32 bits, low bits first."""
    width = -(-codes.shape[1] * bits // 32) * 4
    out = np.zeros((len(codes), width), np.uint8)
    step = max(1, (1 << 22) // max(codes.shape[1], 1))
    for start in range(0, len(codes), step):
        spread = np.unpackbits(codes[start : start + step, :, None], axis=2, count=bits, bitorder="little")
        packed = np.packbits(spread.reshape(len(spread), -1), axis=1, bitorder="little")
        out[start : start + step, : packed.shape[1]] = packed
    return out.view(np.int32)


def settings(items: Sequence[Stored]) -> dict[str, Any]:
    """The quantization_config. The group with the most layers is for all of the class Linear, others name theirs."""
    groups: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {}
    for item in items:
        if item.scale is not None:
            scheme = _scheme(item)
            _, layers, tables = groups.setdefault(repr(scheme), (scheme, [], []))
            (layers if item.linear else tables).extend(rows.name.removesuffix(".weight") for rows in item.rows)
    ranked = sorted(groups.values(), key=lambda group: -len(group[1]))
    found = {}
    for i, (scheme, layers, tables) in enumerate(ranked):
        found[f"group_{i}"] = {"targets": [*(["Linear"] if i == 0 and layers else layers), *tables], **scheme}
    left = [item for item in items if item.scale is None and item.linear]
    plain = [rows.name.removesuffix(".weight") for item in left for rows in item.rows]
    formats = {scheme["format"] for scheme, *_ in ranked}
    return {
        "quant_method": "compressed-tensors",
        "format": next(iter(formats)) if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": found,
        "ignore": plain,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _scheme(item: Stored) -> dict[str, Any]:
    assert item.scale is not None
    k, groups = int(item.codes.shape[1]), int(item.scale.shape[1])
    weights: dict[str, Any] = {
        "num_bits": item.codes.dtype.bits,
        "type": "float" if item.codes.dtype is DType.f8e4m3 else "int",
        "symmetric": item.zero is None,
        "strategy": "group" if groups > 1 else "channel",
        "group_size": k // groups if groups > 1 else None,
        "dynamic": False,
    }
    tokens = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {"weights": weights, "input_activations": tokens if item.dynamic else None, "format": format_of(item)}
