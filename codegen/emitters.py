"""The kernel families there are, in order of preference, and the layouts that they store weights in."""

from __future__ import annotations

import math
from functools import cache
from importlib import import_module

import numpy as np

from tilewright.codegen.cuda.target import CudaTarget
from tilewright.codegen.kernel import Emitter
from tilewright.codegen.packing import code_planes, parse_packing
from tilewright.codegen.target import Target
from tilewright.ir import CodegenError, DType, Function, TensorType, canonical

FAMILIES: dict[str, str] = {
    "mlir.columns": "tilewright.codegen.mlir.columns_emitter:ColumnsEmitter",
    "mlir.linear": "tilewright.codegen.mlir.linear_emitter:LinearEmitter",
    "mlir.attention": "tilewright.codegen.mlir.attention_emitter:AttentionEmitter",
    "mlir.sparse": "tilewright.codegen.mlir.sparse_emitter:SparseEmitter",
    "mlir.loops": "tilewright.codegen.mlir.loops:LoopsEmitter",
    "tvm": "tilewright.codegen.tvm.emitter:TvmEmitter",
    "cuda.linear": "tilewright.codegen.cuda.linear:CudaLinearEmitter",
    "cuda.attention": "tilewright.codegen.cuda.attention:CudaAttentionEmitter",
    "cuda.loops": "tilewright.codegen.cuda.loops:CudaLoopsEmitter",
    "cuda.tvm": "tilewright.codegen.tvm.cuda:CudaTvmEmitter",
}


def families(target: Target) -> list[str]:
    """The families that make kernels for ``target``, in order of preference."""
    return [name for name in FAMILIES if name.startswith("cuda.") == isinstance(target, CudaTarget)]


@cache
def emitter(name: str) -> Emitter:
    """The emitter of a family; raises KeyError with those that exist."""
    if name not in FAMILIES:
        raise KeyError(f"no kernel family {name!r}; there are {', '.join(FAMILIES)}")
    module, _, kind = FAMILIES[name].partition(":")
    made: Emitter = getattr(import_module(module), kind)()
    return made


def refusals(kernel: Function, target: Target) -> dict[str, str]:
    """Why each family cannot lower ``kernel``; shorter than the list of families when one can."""
    out: dict[str, str] = {}
    for name in families(target):
        reason = emitter(name).match(kernel, target)
        if reason is None:
            break
        out[name] = reason
    return out


def choose(kernel: Function, target: Target) -> Emitter:
    """The first family that can lower ``kernel``; raises CodegenError with each one's reason."""
    reasons, there = refusals(kernel, target), families(target)
    if len(reasons) < len(there):
        return emitter(there[len(reasons)])
    shown = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
    loc = kernel.body[0].loc
    raise CodegenError(f"no kernel family can lower this kernel for {target}:\n{canonical(kernel)}\n{shown}", loc)


def packed_spec(type: TensorType, packing: str) -> tuple[str, tuple[int, ...]]:
    """Element type and shape that a weight of ``type`` is stored with under ``packing``.

    ``""`` is row-major, several codes of few bits a byte (see `pack_codes`), floats of 8 bits as bytes.
    """
    if not packing and type.dtype.bits < 8:
        count = math.prod(map(int, type.shape))
        return "u8", (sum(-(-count // (8 // bits)) for bits in code_planes(type.dtype.bits)),)
    if not packing:
        return "u8" if type.dtype.is_narrow_float else type.dtype.value, tuple(map(int, type.shape))
    layout = parse_packing(packing)
    return layout.stored, layout.shape


def pack(array: np.ndarray, packing: str, dtype: DType) -> np.ndarray:
    """``array`` of ``dtype`` in the layout that ``packing`` names."""
    if packing:
        return parse_packing(packing).pack(array)
    if dtype.bits < 8:
        return pack_codes(array, dtype.bits)
    whole = np.ascontiguousarray(array)
    return whole.view(np.uint8) if dtype.is_narrow_float else whole


def pack_codes(array: np.ndarray, bits: int) -> np.ndarray:
    """Codes of ``bits``, row-major, as many as fit in a byte, the first in the lowest bits.

    Of codes of 3 bits come first the lower two of all, four a byte, and then the highest, eight a byte.
    """
    flat, parts, shift = np.ascontiguousarray(array).reshape(-1).view(np.uint8), [], 0
    for plane in code_planes(bits):
        apart = 8 // plane
        part = np.pad((flat >> np.uint8(shift)) & np.uint8((1 << plane) - 1), (0, -len(flat) % apart))
        parts.append(np.bitwise_or.reduce([part[i::apart] << np.uint8(plane * i) for i in range(apart)]))
        shift += plane
    return np.concatenate(parts)
