"""The kernel families there are, in order of preference, and the layouts that they store weights in."""

from __future__ import annotations

import math
from functools import cache
from importlib import import_module

import numpy as np

from tilewright.codegen.kernel import Emitter
from tilewright.codegen.packing import parse_packing
from tilewright.codegen.target import CpuTarget
from tilewright.ir import CodegenError, DType, Function, TensorType, canonical

FAMILIES: dict[str, str] = {
    "mlir.linear": "tilewright.codegen.mlir.linear_emitter:LinearEmitter",
    "mlir.attention": "tilewright.codegen.mlir.attention_emitter:AttentionEmitter",
    "mlir.sparse": "tilewright.codegen.mlir.sparse_emitter:SparseEmitter",
    "mlir.loops": "tilewright.codegen.mlir.loops:LoopsEmitter",
    "tvm": "tilewright.codegen.tvm.emitter:TvmEmitter",
}


@cache
def emitter(name: str) -> Emitter:
    """The emitter of a family; raises KeyError with those that exist."""
    if name not in FAMILIES:
        raise KeyError(f"no kernel family {name!r}; there are {', '.join(FAMILIES)}")
    module, _, kind = FAMILIES[name].partition(":")
    made: Emitter = getattr(import_module(module), kind)()
    return made


def refusals(kernel: Function, target: CpuTarget) -> dict[str, str]:
    """Why each family cannot lower ``kernel``; shorter than the list of families when one can."""
    out: dict[str, str] = {}
    for name in FAMILIES:
        reason = emitter(name).match(kernel, target)
        if reason is None:
            break
        out[name] = reason
    return out


def choose(kernel: Function, target: CpuTarget) -> Emitter:
    """The first family that can lower ``kernel``; raises CodegenError with each one's reason."""
    reasons = refusals(kernel, target)
    if len(reasons) < len(FAMILIES):
        return emitter(list(FAMILIES)[len(reasons)])
    shown = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
    loc = kernel.body[0].loc
    raise CodegenError(f"no kernel family can lower this kernel for {target}:\n{canonical(kernel)}\n{shown}", loc)


def packed_spec(type: TensorType, packing: str) -> tuple[str, tuple[int, ...]]:
    """Element type and shape that a weight of ``type`` is stored with under ``packing``.

    ``""`` is row-major; integers of four bits lie two a byte there, the first of a pair in the low half.
    """
    if not packing and type.dtype.bits < 8:
        return "u8", (-(-math.prod(map(int, type.shape)) // 2),)
    if not packing:
        return type.dtype.value, tuple(map(int, type.shape))
    layout = parse_packing(packing)
    return layout.stored, layout.shape


def pack(array: np.ndarray, packing: str) -> np.ndarray:
    """``array`` in the layout that ``packing`` names."""
    if packing:
        return parse_packing(packing).pack(array)
    if array.dtype in (DType.i4.np, DType.u4.np):
        return pack_nibbles(array)
    return np.ascontiguousarray(array)


def pack_nibbles(array: np.ndarray) -> np.ndarray:
    """Integers of four bits, row-major, two a byte: the first of a pair in the low half."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8) & 15
    low, high = flat[::2], flat[1::2]
    packed = low.copy()
    packed[: len(high)] |= high << 4
    return packed
