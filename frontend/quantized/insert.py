"""Packed weights in a traced module: ``nn.linear(x, @w)`` -> ``nn.linear(x, quant.dequantize(@w.i4, @w.scale))``."""

from __future__ import annotations

import numpy as np

from tilewright.frontend.checkpoint import ConvertedSource
from tilewright.frontend.quantized.packed import Packed, PackedCheckpoint, PackedSource
from tilewright.ir import DType, Module, Op, Rewriter, UnsupportedError, Value, Weight, ops


def insert_packed(module: Module, checkpoint: PackedCheckpoint) -> list[str]:
    """Put codes, scales and what belongs to them in the place of packed weights; gives notes for the report."""
    work = _Insertion(module)
    for function in module.entries():
        for op in function.walk():
            for weight in [v for v in op.operands if isinstance(v, Weight) and isinstance(v.source, PackedSource)]:
                work.take(op, weight)
    for name in [n for n, w in module.weights.items() if isinstance(w.source, PackedSource)]:
        del module.weights[name]
    dense = [name for name, w in module.weights.items() if _converts(w, checkpoint)]
    return [f"@{name} is put together of quantized weights and dequantized for that" for name in dense]


def _converts(weight: Weight, checkpoint: PackedCheckpoint) -> bool:
    source = weight.source
    converted = isinstance(source, ConvertedSource) and source.checkpoint is checkpoint
    return converted and any(name in checkpoint.packed for name in source.names)


class _Insertion:
    def __init__(self, module: Module) -> None:
        self.module, self.rw = module, Rewriter(module)
        self.parts: dict[Weight, dict[str, Weight]] = {}
        self.orders: dict[bytes, Weight] = {}
        self.inputs: dict[tuple[Value, bytes, bool], Value] = {}

    def take(self, op: Op, weight: Weight) -> None:
        """Let ``op`` take the parts of ``weight``."""
        source = weight.source
        assert isinstance(source, PackedSource)
        if isinstance(op, ops.Linear) and op.weight is weight:
            return self.layer(op, weight, source.packed)
        if source.packed.order is not None:
            raise UnsupportedError(f"@{weight.name}: columns in an order of their own are for linear layers only", op.loc)
        op.replace_operand(weight, self.dequantized(op, weight, source.packed, weight.dtype))
        return None

    def layer(self, op: ops.Linear, weight: Weight, packed: Packed) -> None:
        """A linear layer: its weight in f32, its input as the checkpoint wants it."""
        x = self.input(op, packed)
        new = self.rw.before(op).insert(op.clone({}, x=x, weight=self.dequantized(op, weight, packed, DType.f32)))
        kind = op.result.dtype
        self.rw.replace(op, ops.Cast(new.result, kind) if new.result.dtype is not kind else new.result)

    def dequantized(self, op: Op, weight: Weight, packed: Packed, dtype: DType) -> Value:
        if weight not in self.parts:
            self.parts[weight] = {
                name: self.module.weight(f"{weight.name}.{name}", part.type, packed.source(name))
                for name, part in packed.parts.items()
            }
        codes, *others = self.parts[weight].items()
        return self.rw.before(op).add(ops.Dequantize(codes[1], dtype=dtype, **dict(others)))

    def input(self, op: ops.Linear, packed: Packed) -> Value:
        """The layer's input in the order of the columns, rounded if it is to be: once for all layers that read it."""
        order = b"" if packed.order is None else packed.order.astype(np.int32).tobytes()
        key = (op.x, order, packed.dynamic)
        if key in self.inputs:
            return self.inputs[key]
        b, x = self.rw.before(op), op.x
        if packed.order is not None:
            if order not in self.orders:
                self.orders[order] = self.module.constant(packed.order.astype(np.int32), f"{op.loc.module}.order")
            x = b.add(ops.Gather(x, self.orders[order], x.tensor.rank - 1))
        if packed.dynamic:
            codes, scale = b.insert(ops.Quantize(x)).results
            x = b.add(ops.Dequantize(codes, scale, dtype=DType.f32))
        self.inputs[key] = x
        return x
