"""Folders with weights in the sparse formats of compressed-tensors: bit for bit what they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.quantized_checkpoints import bitmasked, compressed, rewrite, set_quantization, sparse
from tests.unit.test_import_compressed import GATE, dequantized, interpreted
from tilewright.frontend import trace_folder
from tilewright.ir import CheckpointError, UnsupportedError, ops

WEIGHT = torch.tensor([  # what the reference package (0.12.2) makes of it stands below
    [0, 0, 10, -6, 0, 8, -8, 0, 6, -10, 0, 0], [0] * 12, [0, 10, -6, 0, 8, -8, 0, 6, -10, 0, 0, 11]
]).float()  # fmt: skip
PACKAGE = {
    "compressed": [10, -6, 8, -8, 6, -10, 10, -6, 8, -8, 6, -10, 11],
    "bitmask": [[108, 3], [0, 0], [182, 9]],
    "row_offsets": [0, 6, 6],
    "shape": [3, 12],
}


def test_the_writer_of_these_tests_agrees_with_the_package() -> None:
    assert {name: tensor.tolist() for name, tensor in bitmasked(WEIGHT, half=False).items()} == PACKAGE


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_those_that_were_saved(half: bool, dtype: torch.dtype, tmp_path) -> None:
    saved = sparse(tmp_path / "model", half, dtype)
    module = trace_folder(saved.folder)
    for name, want in saved.dense.items():
        got = module.weights[name].load()
        assert torch.equal(torch.from_numpy(got), want.float())
        assert (got == 0).mean() == 0.5
    np.testing.assert_allclose(interpreted(module, saved), saved.logits().numpy(), rtol=1e-4, atol=1e-4)
    weight = module.weights[f"{GATE}.weight"]
    weight.release()
    assert torch.equal(torch.from_numpy(weight.load()), saved.dense[f"{GATE}.weight"].float())


@pytest.mark.parametrize("half", [False, True])
def test_codes_are_expanded_too(half: bool, tmp_path) -> None:
    saved = sparse(tmp_path / "model", half, codes=True)
    module = trace_folder(saved.folder)
    assert len(list(module.ops(ops.Dequantize))) == len(saved.dense) == 14
    for name, want in saved.dense.items():
        assert torch.equal(torch.from_numpy(dequantized(module, name.removesuffix(".weight"))), want)


def test_a_sparse_model_that_is_stored_dense_is_read_as_it_is(tmp_path) -> None:
    saved = compressed(tmp_path / "model", "int-quantized", num_bits=8, strategy="channel")
    set_quantization(saved.folder, lambda s: s.update(sparsity_config={"format": "dense", "sparsity_structure": "2:4"}))
    assert len(list(trace_folder(saved.folder).ops(ops.Dequantize))) == 14


def changed(name, change):
    """A change of one tensor of a layer."""
    return lambda tensors: tensors.update({f"{GATE}.{name}": change(tensors[f"{GATE}.{name}"])})


@pytest.mark.parametrize(("half", "change", "message"), [
    (False, lambda t: t.pop(f"{GATE}.bitmask"), rf"lacks {GATE}\.bitmask; of this layer it has compressed, row_offs"),
    (False, changed("bitmask", lambda t: t[:, 1:]), r"bitmask has the shape \[128, 7\], expected \[128, 8\] \(64 bits a r"),
    (False, changed("row_offsets", lambda t: t[1:]), r"row_offsets has the shape \[127\], expected \[128\]"),
    (True, changed("compressed", lambda t: t[:, 1:]), r"compressed has the shape \[128, 31\], expected \[128, 32\]"),
    (False, changed("compressed", lambda t: t.long()), r"compressed is I64, expected F32 or F16"),
])  # fmt: skip
def test_tensors_that_do_not_fit(half, change, message, tmp_path) -> None:
    saved = sparse(tmp_path / "model", half)
    rewrite(saved.folder, change)
    with pytest.raises(CheckpointError, match=message):
        trace_folder(saved.folder)


@pytest.mark.parametrize(("change", "message"), [
    (changed("compressed", lambda t: t[:-3]), r"compressed has 4093 numbers, and its bitmask says 4096"),
    (changed("row_offsets", lambda t: t + 1), r"row_offsets is not what the bitmask says"),
])  # fmt: skip
def test_bits_that_do_not_fit_are_found_when_numbers_are_read(change, message, tmp_path) -> None:
    saved = sparse(tmp_path / "model")
    rewrite(saved.folder, change)
    weight = trace_folder(saved.folder).weights[f"{GATE}.weight"]
    with pytest.raises(CheckpointError, match=message):
        weight.load()


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s["sparsity_config"].update(format="sparse-coo"), "the sparse format sparse-coo is not read; there are"),
    (lambda s: s.update(format="marlin-24"), "the format marlin-24 is not read; there are pack-quantized"),
])  # fmt: skip
def test_formats_that_are_not_read(change, message, tmp_path) -> None:
    saved = sparse(tmp_path / "model", codes=True)
    set_quantization(saved.folder, change)
    with pytest.raises(UnsupportedError, match=message):
        trace_folder(saved.folder)
