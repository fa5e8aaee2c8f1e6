"""What kv-layout cannot cache is refused by name, with its place and the reason; never passed over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.models import tiny_decoder as tiny
from tests.models.tiny_decoder import B, D, Decoder, H, S
from tilewright.ir import DType, Module, PassError, TensorType, UnsupportedError, Value, ops
from tilewright.passes import PassContext
from tilewright.passes.kv_layout import KvLayout

Middle = Callable[[Decoder, Value], Value]


def run(module: Module, **options: Any) -> None:
    KvLayout(**({"length": 48} | options)).run(module, PassContext())


def convolution(m: Decoder, x: Value) -> Value:
    kernel = m.weight("conv", H, H, 3)
    y = m.b(ops.Conv, m.b(ops.Transpose, x, (0, 2, 1)), kernel, None, (1,), (1,), (1,))
    return m.b(ops.Transpose, y, (0, 2, 1))


def half_split(m: Decoder, x: Value) -> Value:
    shifted = m.b(ops.Slice, x, (0, 1, 0), (B, S, H), (1, 1, 1))
    return m.b(ops.Pad, shifted, (0, 1, 0), (0, 0, 0))


def scores_by_hand(m: Decoder, x: Value) -> Value:
    scores = m.b(ops.Matmul, x, m.b(ops.Transpose, x, (0, 2, 1)))
    return m.b(ops.Matmul, m.b(ops.Softmax, scores, 2), x)


def mixing_matrix(m: Decoder, x: Value) -> Value:
    near = m.b(ops.Cast, m.b(ops.Le, m.distance(), m.scalar(2)), DType.f32)
    return m.b(ops.Matmul, near, x)


def by_length(m: Decoder, x: Value) -> Value:
    return m.b(ops.Div, x, m.b(ops.Cast, m.b(ops.SizeOf, S), DType.f32))


def from_the_end(m: Decoder, x: Value) -> Value:
    at = m.b(ops.Sub, m.b(ops.SizeOf, S), m.b(ops.Iota, S, DType.i64))
    return m.b(ops.Mul, x, m.b(ops.Reshape, m.b(ops.Cast, at, DType.f32), (S, 1)))


def by_sequence(m: Decoder, x: Value) -> Value:
    return m.b(ops.Mul, x, m.b(ops.Broadcast, tiny_positions(m), (B, S, 1)))


def tiny_positions(m: Decoder) -> Value:
    rows = m.b(ops.Reshape, m.b(ops.Cast, m.b(ops.Iota, B, DType.i64), DType.f32), (B, 1, 1))
    return m.b(ops.Add, rows, m.b(ops.Reshape, m.b(ops.Cast, m.b(ops.Iota, S, DType.i64), DType.f32), (1, S, 1)))


def across_the_batch(m: Decoder, x: Value) -> Value:
    return m.b(ops.Sub, x, m.b(ops.Reduce, x, "mean", (0,), True))


def encoder(m: Decoder, x: Value) -> Value:
    q = m.b(ops.Reshape, x, (B, S, 2, D))
    return m.b(ops.Reshape, m.b(ops.Attention, q, q, q), (B, S, H))


def padded(m: Decoder, x: Value) -> Value:
    q = m.b(ops.Reshape, x, (B, S, 2, D))
    real = m.b(ops.Ne, m.ids, m.scalar(0))
    y = m.b(ops.Attention, q, q, q, None, None, None, real, causal=True)
    return m.b(ops.Reshape, y, (B, S, H))


MIXING: dict[str, tuple[Middle, str]] = {
    "mean": (lambda m, x: m.b(ops.Sub, x, m.b(ops.Reduce, x, "mean", (1,), True)), r"core.reduce reduces \(mean\)"),
    "cumsum": (lambda m, x: m.b(ops.CumSum, x, 1), "core.cumsum works over"),
    "softmax": (lambda m, x: m.b(ops.Softmax, x, 1), "nn.softmax works over"),
    "convolution": (convolution, "nn.conv convolves"),
    "shift": (half_split, "core.slice takes a part"),
    "scores": (scores_by_hand, "core.matmul relates positions"),
    "mixing matrix": (mixing_matrix, "core.matmul sums over positions"),
    "by length": (by_length, "core.div computes with the number of tokens"),
    "from the end": (from_the_end, "gives position 2 and those before other values when more tokens follow"),
    "by sequence": (by_sequence, "gives each sequence of a batch another value"),
    "across the batch": (across_the_batch, "core.reduce reduces"),
    "both directions": (encoder, "nn.attention looks at later tokens too"),
    "padding": (padded, "nn.attention has a padding computed from the tokens"),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_is_refused_with_its_place(name: str) -> None:
    middle, reason = MIXING[name]
    with pytest.raises(UnsupportedError, match=reason) as caught:
        run(Decoder(middle=middle).build())
    assert "module model.layers.0" in str(caught.value)


def test_unknown_masks_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="neither causal, nor a causal window"):
        run(Decoder(mask=tiny.odd_mask, attention={}).build())


def test_a_longer_cache_than_positions_is_refused() -> None:
    module = Decoder(positions=tiny.learned).build()
    module.dims["S"] = (1, 4096)
    with pytest.raises(UnsupportedError, match=r"(?s)outside of the table's 64 rows.*smaller length"):
        run(module, length=65)


def test_a_longer_cache_than_traced_is_refused() -> None:
    with pytest.raises(PassError, match="more than the 64 tokens that the model was traced for"):
        run(Decoder().build(), length=65)


def test_alibi_that_depends_on_the_length_is_refused_with_sinks() -> None:
    """Up to a constant a bias is the same for softmax, but not for the extra column of a sink."""
    with pytest.raises(UnsupportedError, match="changes when more tokens follow"):
        run(Decoder(bias=tiny.alibi_key, sinks=True).build())


def test_other_inputs_are_refused() -> None:
    module = Decoder().build()
    module.functions["forward"].arg("attention_mask", TensorType((B, S), DType.i64))
    module.meta["token_input"] = "input_ids"
    with pytest.raises(UnsupportedError, match="takes attention_mask besides the token input input_ids"):
        run(module)


def test_logits_of_the_last_token_alone_are_refused() -> None:
    def last(m: Decoder, x: Value) -> Value:
        return m.b(ops.Slice, x, (0, S - 1, 0), (B, S, tiny.V), (1, 1, 1))

    with pytest.raises(UnsupportedError, match=r"core.slice takes a part"):
        run(Decoder(after=last).build())


def test_a_fixed_batch_is_refused() -> None:
    module = Decoder().build()
    arg = module.functions["forward"].args[0]
    arg.type = TensorType((2, S), DType.i64)
    with pytest.raises(UnsupportedError, match="symbolic batch and length"):
        run(module)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="length must be positive"):
        KvLayout(length=0)


def test_a_refused_module_keeps_its_forward() -> None:
    module = Decoder(middle=MIXING["cumsum"][0]).build()
    before = np.array([len(f.body) for f in module.functions.values()])
    with pytest.raises(UnsupportedError):
        run(module)
    assert list(module.functions) == ["forward"]
    assert np.array_equal(before, [len(f.body) for f in module.functions.values()])
