"""Weights without their zeros: which are stored so, and that nothing changes."""

from __future__ import annotations

import numpy as np
import pytest

from tilewright.ir import ArraySource, DType, Module, PassError, interpret, ops, parse_module
from tilewright.ir.ops.sparse_expand import STORED, MaskLayout
from tilewright.passes.formats import SCHEMES
from tilewright.passes.pipeline import Pipeline

TEXT = """
module @m {
  dim B : 1..8
  weight @gate : tensor<128x256xbf16>
  weight @up : tensor<128x256xbf16>
  weight @down : tensor<256x128xbf16>
  weight @head : tensor<40x256xbf16>
  func @forward(%x: tensor<Bx256xbf16>) {
    %0 = nn.gated_linear(%x, @gate, @up) : tensor<Bx128xbf16> loc("mlp")
    %1 = nn.linear(%0, @down) : tensor<Bx256xbf16> loc("down")
    %2 = nn.linear(%1, @head) : tensor<Bx40xbf16> loc("head")
    return([%2])
  }
}
"""


def model(density: float = 0.4, word: int = 1, dense: tuple[str, ...] = ("head",)) -> Module:
    """Numbers of which ``word`` neighbours are zero together."""
    module, rng = parse_module(TEXT), np.random.default_rng(2)
    for name, w in module.weights.items():
        rows, columns = map(int, w.shape)
        keep = np.repeat(rng.random((rows, columns // word)) < density, word, 1)
        numbers = rng.standard_normal((rows, columns)) * 0.1
        w.source = ArraySource(np.where(keep | (name in dense), numbers, 0).astype(w.dtype.np))
    return module


def found(module: Module) -> list[ops.SparseExpand]:
    return list(module.functions["forward"].walk(ops.SparseExpand))  # type: ignore[arg-type]


def outcome(module: Module) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((4, 256)).astype(DType.bf16.np)
    return interpret(module, "forward", [x])[0].view(np.uint16)


@pytest.mark.parametrize(("word", "unit"), [(1, 1), (2, 2)])
def test_layers_compute_the_same_bit_for_bit(word: int, unit: int) -> None:
    want, module = outcome(model(word=word)), model(word=word)
    report = Pipeline.parse("sparse-store,dce").run(module)
    assert [op.unit for op in found(module)] == [unit] * 3
    assert np.array_equal(outcome(module), want)
    (skip,) = report.ctx.skips
    assert skip.reason == "@head would come to 104% of the bytes"


def test_the_report_has_bytes_of_each_weight() -> None:
    module = model()
    lines = [line for _, line in Pipeline.parse("sparse-store").run(module).ctx.notes]
    assert len(lines) == 4
    size = sum(int(v.tensor.bytes) for v in found(module)[0].operands)
    assert lines[0] == f"@gate: 60.0% zeros, a bit for a number; {128 * 256 * 2} bytes became {size}"
    assert lines[-1].startswith(f"3 weights of {3 * 128 * 256 * 2} bytes became ")


def test_the_share_that_is_worth_it_can_be_set() -> None:
    module = model(density=0.7)
    Pipeline.parse("sparse-store{worth=0.75}").run(module)
    assert not found(module)
    Pipeline.parse("sparse-store{worth=0.8}").run(module)
    assert len(found(module)) == 3
    with pytest.raises(PassError, match="worth is a share"):
        Pipeline.parse("sparse-store{worth=1.5}")


def test_single_codes_of_four_bits_are_stored_when_asked_for() -> None:
    module = model(density=0.5)
    Pipeline.parse("quantize{scheme=w4a8},sparse-store").run(module)
    assert not found(module)
    Pipeline.parse("sparse-store{singles=true}").run(module)
    assert {op.unit for op in found(module)} == {1}


def test_weights_of_one_shape_share_their_types() -> None:
    module = model()
    Pipeline.parse("sparse-store").run(module)
    gate, up, _ = found(module)
    assert [str(v.type) for v in gate.operands] == [str(v.type) for v in up.operands]


def test_a_weight_that_is_a_table_too_stays_dense() -> None:
    text = """
    module @m {
      dim B : 1..8
      weight @table : tensor<64x32xf32>
      func @forward(%i: tensor<Bxi64>) {
        %0 = nn.embedding(%i, @table) : tensor<Bx32xf32>
        %1 = nn.linear(%0, @table) : tensor<Bx64xf32>
        return([%1])
      }
    }
    """
    module = parse_module(text)
    module.weights["table"].source = ArraySource(np.zeros((64, 32), np.float32))
    (skip,) = Pipeline.parse("sparse-store").run(module).ctx.skips
    assert skip.reason == "@table is a table of embeddings too"


REFUSED = {
    **dict.fromkeys(("w3a16", "w3a8"), " is i3; there are masks for f32, bf16, "),
    **dict.fromkeys(("w2a16", "w2a8", "ternary", "ternary-a16"), " is i2; there are masks for "),
    "two-level": "a weight by way of quant.expand",
    **dict.fromkeys(("nf4", "codebook4", "codebook3"), "a weight by way of quant.lookup"),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_stored_or_refused_by_name(scheme: str) -> None:
    def quantized() -> Module:
        module = model(word=8, dense=())
        Pipeline.parse(f"quantize{{scheme={scheme}}},dce").run(module)
        return module

    module = quantized()
    report = Pipeline.parse("sparse-store,dce").run(module)
    if scheme in REFUSED:
        assert not found(module)
        assert all(REFUSED[scheme] in skip.reason for skip in report.ctx.skips)
        return
    assert len(found(module)) == 4
    assert np.array_equal(outcome(module), outcome(quantized()))


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_codes_with_zero_points_are_refused(scheme: str) -> None:
    module = model(dense=())
    report = Pipeline.parse(f"quantize{{scheme={scheme} zero=true}},sparse-store").run(module)
    assert not found(module)
    assert {"zero points" in skip.reason for skip in report.ctx.skips} == {True}


@pytest.mark.parametrize("dtype", STORED, ids=lambda d: d.value)
@pytest.mark.parametrize("shape", [(1, 1), (37, 65), (33, 600), (1030, 6)])
def test_every_number_comes_back(dtype: DType, shape: tuple[int, int]) -> None:
    """Also negative zeros, infinities and NaNs: what is stored is bits."""
    rng = np.random.default_rng(shape[1])
    bits = rng.integers(0, 256, (*shape, dtype.size), np.uint8).view(f"u{dtype.size}")[..., 0] & ((1 << dtype.bits) - 1)
    kept = np.where(rng.random(shape) < rng.random((shape[0], 1)), bits, 0).astype(bits.dtype)
    weight = kept.view(dtype.np) if dtype is not DType.i4 else ((kept ^ 8).astype(np.int8) - 8).astype(dtype.np)
    for unit in MaskLayout.units(dtype):
        for split in (False, True) if dtype.bits <= 8 else (False,):
            layout = MaskLayout(dtype, unit, split)
            parts = layout.store(weight, layout.count(weight))
            back = layout.expand(*parts, *shape)
            assert np.array_equal(back.view(np.uint8), weight.view(np.uint8))
