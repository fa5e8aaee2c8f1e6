"""A small decoder after fusions: q, k and v in one product, gated feed-forward layers; ``forward(ids[B, S]) -> logits``."""

from __future__ import annotations

import math

import numpy as np

from tilewright.ir import Builder, DType, Function, Loc, Module, Return, TensorType, Value, ops, sym

V, H, F, D, HEADS, KV = 40, 32, 48, 8, 4, 2
ROWS = (HEADS + 2 * KV) * D
B, S = sym("B"), sym("S")


def gated_decoder(layers: int = 2, seed: int = 0) -> Module:
    """Channels of the norms differ in size, and columns of the weights in length, as those of trained models do."""
    rng = np.random.default_rng(seed)
    module = Module("gated", dims={"B": (1, 16), "S": (1, 64)}, meta={"task": "causal-lm"})
    function = module.add(Function("forward"))
    ids = function.arg("input_ids", TensorType((B, S), DType.i64))
    b = Builder(function, loc=Loc("model"))

    def weight(name: str, *shape: int) -> Value:
        spread = np.exp(rng.standard_normal(shape[-1]) / 2)
        numbers = spread if len(shape) == 1 else rng.standard_normal(shape) * spread * 1.5 / math.sqrt(shape[1])
        return module.constant(numbers.astype(np.float32), name)

    def heads(qkv: Value, start: int, count: int) -> Value:
        part = b(ops.Slice, qkv, (0, 0, start * D), (B, S, (start + count) * D), (1, 1, 1))
        return b(ops.Reshape, part, (B, S, count, D))

    x: Value = b(ops.Embedding, ids, weight("embed", V, H))
    for i in range(layers):
        with b.at(Loc(f"layers.{i}")):
            h = b(ops.RmsNorm, x, weight(f"{i}.norm", H))
            qkv = b(ops.Linear, h, weight(f"{i}.qkv", ROWS, H), weight(f"{i}.qkv.bias", ROWS))
            q, k, v = heads(qkv, 0, HEADS), heads(qkv, HEADS, KV), heads(qkv, HEADS + KV, KV)
            y = b(ops.Attention, q, k, v, scale=D**-0.5, causal=True)
            x = b(ops.Add, x, b(ops.Linear, b(ops.Reshape, y, (B, S, HEADS * D)), weight(f"{i}.o", H, HEADS * D)))
            h = b(ops.RmsNorm, x, weight(f"{i}.norm2", H))
            h = b(ops.GatedLinear, h, weight(f"{i}.gate", F, H), weight(f"{i}.up", F, H))
            x = b(ops.Add, x, b(ops.Linear, h, weight(f"{i}.down", H, F)))
    b.insert(Return((b(ops.Linear, b(ops.RmsNorm, x, weight("norm", H)), weight("head", V, H)),)))
    return module
