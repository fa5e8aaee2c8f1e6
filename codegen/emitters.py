"""The kernel families there are, in order of preference, and the layouts that they store weights in."""

from __future__ import annotations

from functools import cache
from importlib import import_module

import numpy as np

from tilewright.codegen.kernel import Emitter
from tilewright.codegen.packing import Packing
from tilewright.codegen.target import CpuTarget
from tilewright.ir import CodegenError, Function, TensorType, canonical

FAMILIES: dict[str, str] = {
    "mlir.linear": "tilewright.codegen.mlir.linear_emitter:LinearEmitter",
    "mlir.attention": "tilewright.codegen.mlir.attention_emitter:AttentionEmitter",
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
    """Element type and shape that a weight of ``type`` is stored with under ``packing`` (``""`` is row-major)."""
    if not packing:
        return type.dtype.value, tuple(map(int, type.shape))
    layout = Packing.parse(packing)
    return layout.dtype, layout.shape


def pack(array: np.ndarray, packing: str) -> np.ndarray:
    """``array`` in the layout that ``packing`` names."""
    return Packing.parse(packing).pack(array) if packing else np.ascontiguousarray(array)
