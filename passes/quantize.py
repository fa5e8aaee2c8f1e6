"""``nn.linear(x, @w)`` -> ``nn.linear(x, @w.i8, none, @w.scale)``: weights of 8 bits, one scale an output channel."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, ClassVar, Literal

import numpy as np

from tilewright.ir import DType, Module, Op, Rewriter, TensorType, Value, Weight, ops
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.match import replace
from tilewright.passes.weights import as_weight, derive


@dataclass(frozen=True)
class Quantize(Pass):
    """Weight-only quantization, symmetric, rounded to nearest; activations keep their type.

    ``skip`` holds patterns of weight names (``*lm_head*``) to leave alone. Numbers are computed when the artifact is
    written, a weight at a time.
    """

    name: ClassVar[str] = "quantize"
    scheme: Literal["w8a16"] = "w8a16"
    skip: tuple[str, ...] = ()

    def run(self, module: Module, ctx: PassContext) -> bool:
        rw = Rewriter(module, pattern=self.name)
        done: dict[Weight, tuple[Weight, Weight]] = {}
        for function in module.entries():
            for op in function.walk(ops.Linear, ops.GatedLinear):
                self.layer(op, rw, done)
        before, after = (sum(int(w.tensor.bytes) for w in ws) for ws in (done, [q for p in done.values() for q in p]))
        ctx.note(f"{len(done)} weights of {before} bytes became {after} bytes")
        return ctx.take(rw)

    def layer(self, op: Op, rw: Rewriter, done: dict[Weight, tuple[Weight, Weight]]) -> None:
        """Quantize the weights of one layer, all or none."""
        names = {"weight": "scale"} if isinstance(op, ops.Linear) else {"gate": "gate_scale", "up": "up_scale"}
        found = [as_weight(getattr(op, name), 2) for name in names]
        weights = [w for w in found if w is not None]
        reason = self.unfit(weights) if len(weights) == len(found) else "its weight is computed"
        if reason is not None:
            rw.skip(op, reason)
            return
        changes: dict[str, Value] = {}
        for (name, scale), weight in zip(names.items(), weights):
            if weight not in done:
                done[weight] = quantized(rw.module, weight)
            changes[name], changes[scale] = done[weight]
        replace(rw, op, op.clone({}, **changes))

    def unfit(self, weights: list[Weight]) -> str | None:
        for weight in weights:
            if not weight.dtype.is_float:
                return f"@{weight.name} is {weight.dtype.value} already"
            if any(fnmatch(weight.name, pattern) for pattern in self.skip):
                return f"the option skip names @{weight.name}"
        return None


def quantized(module: Module, weight: Weight) -> tuple[Weight, Weight]:
    """The weight as i8 and the scale of each of its rows."""
    q = derive(module, f"{weight.name}.i8", TensorType(weight.shape, DType.i8), [weight], to_i8)
    s = derive(module, f"{weight.name}.scale", TensorType(weight.shape[:1], DType.f32), [weight], row_scales)
    return q, s


def row_scales(array: Any) -> Any:
    """Largest magnitude of each row over 127; 1 for a row of zeros."""
    top = np.abs(array).max(axis=1).astype(np.float32)
    return np.where(top > 0, top / np.float32(127), np.float32(1)).astype(np.float32)


def to_i8(array: Any) -> Any:
    scaled = array.astype(np.float32) / row_scales(array)[:, None]
    return np.clip(np.rint(scaled), -127, 127).astype(np.int8)
