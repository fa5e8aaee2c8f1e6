"""Folders in the formats of GPTQ and AWQ, packed by plain loops; AWQ also against compressed-tensors' converter."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.quantized_checkpoints import Saved, awq, gptq, rewrite, set_quantization
from tilewright.frontend import trace_folder
from tilewright.ir import CheckpointError, UnsupportedError, interpret, ops
from tilewright.ir.core import Env

GATE = "model.layers.1.mlp.gate_proj"


def check(saved: Saved, codes: str) -> None:
    """The weights are the same bit for bit, the logits but for the order of sums."""
    module = trace_folder(saved.folder)
    layers = {op.codes.name: op for op in module.ops(ops.Dequantize)}
    assert len(layers) == len(saved.dense)
    for name, want in saved.dense.items():
        op = layers[f"{name}.{codes}"]
        got = op.evaluate(Env({}), *(v and v.load() for v in op.operand_slots()))
        taken = next(iter(op.result.users)).operands[0].owner
        if isinstance(taken, ops.Gather):
            whole = np.empty_like(got)
            whole[:, taken.indices.load()] = got
            got = whole
        assert torch.equal(torch.from_numpy(got), want)
    logits = interpret(module, "forward", {"input_ids": saved.inputs.numpy()})[0]
    np.testing.assert_allclose(logits, saved.logits().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("codes", ["i2", "u2", "i3", "u3", "i4", "u4", "i8", "u8"])
def test_gptq(codes, version, tmp_path) -> None:
    check(gptq(tmp_path / "model", int(codes[1]), symmetric=codes[0] == "i", version=version), codes)


def test_gptq_with_a_scale_a_row(tmp_path) -> None:
    check(gptq(tmp_path / "model", group=-1), "i4")


@pytest.mark.parametrize("symmetric", [True, False])
def test_columns_in_an_order_of_their_own(symmetric, tmp_path) -> None:
    check(gptq(tmp_path / "model", symmetric=symmetric, act_order=True), "i4" if symmetric else "u4")


def test_an_older_folder_has_its_settings_in_a_file_of_their_own(tmp_path) -> None:
    saved = gptq(tmp_path / "model")
    config = json.loads((saved.folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (saved.folder / "config.json").write_text(json.dumps(config))
    del settings["quant_method"]
    (saved.folder / "quantize_config.json").write_text(json.dumps(settings))
    check(saved, "i4")


def test_layers_of_other_widths(tmp_path) -> None:
    """GPTQModel's overrides: what a layer has then follows from its tensors."""
    saved = gptq(tmp_path / "model", bits=8, symmetric=False)
    set_quantization(saved.folder, lambda s: s.update(bits=4, dynamic={".*": {"bits": 8}}))
    check(saved, "u8")


def test_awq(tmp_path) -> None:
    check(awq(tmp_path / "model"), "u4")


def test_awq_is_what_compressed_tensors_converts_it_to(tmp_path) -> None:
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    saved = awq(tmp_path / "model")
    tensors = {k: v for k, v in load_file(saved.folder / "model.safetensors").items() if k.startswith(GATE)}
    converted = AutoAWQConverter(bits=4, group_size=32, zero_point=True).process(tensors)
    codes = unpack_from_int32(converted[f"{GATE}.weight_packed"], 4, torch.Size([128, 64])) + 8
    weights = trace_folder(saved.folder).weights
    np.testing.assert_array_equal(weights[f"{GATE}.weight.u4"].load().astype(np.uint8), codes.numpy())
    np.testing.assert_array_equal(weights[f"{GATE}.weight.scale"].load(), converted[f"{GATE}.weight_scale"].numpy())


# ---- folders that are refused ----------------------------------------------------------------------------------------


def changed(name, change):
    return lambda tensors: tensors.update({f"{GATE}.{name}": change(tensors[f"{GATE}.{name}"])})


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop(f"{GATE}.scales"), rf"lacks {GATE}\.scales; of this layer it has g_idx, qweight, qzeros"),
    (lambda t: t.pop(f"{GATE}.qzeros"), rf"lacks {GATE}\.qzeros"),
    (lambda t: t.pop(f"{GATE}.qweight"), rf"lacks {GATE}\.qweight"),
    (changed("scales", lambda t: t[:1]), rf"tensors: {GATE}\.scales has the shape \[1, 128\], expected \[2, 'any'\]"),
    (changed("scales", lambda t: t * float("nan")), rf"{GATE}\.scales has NaN or infinity"),
    (changed("qzeros", lambda t: t[:, :-1]), rf"{GATE}\.qzeros has the shape \[2, 15\], expected \[2, 16\] \(128 zero"),
    (changed("g_idx", lambda t: t + 1), rf"{GATE}\.g_idx names the groups 1 to 2, and there are 2"),
    (changed("g_idx", lambda t: t * 0), rf"{GATE}\.g_idx has groups of 0 to 64 columns, expected 32 in each"),
    (changed("g_idx", lambda t: t[:-1]), rf"{GATE}\.g_idx has the shape \[63\], expected \[64\]"),
    (changed("qweight", lambda t: t.long()), rf"{GATE}\.qweight is I64, expected I32"),
])  # fmt: skip
def test_tensors_that_do_not_fit(change, message, tmp_path) -> None:
    saved = gptq(tmp_path / "model")
    rewrite(saved.folder, change)
    with pytest.raises(CheckpointError, match=message):
        trace_folder(saved.folder)


def test_codes_that_do_not_fit_the_model(tmp_path) -> None:
    saved = gptq(tmp_path / "model")
    set_quantization(saved.folder, lambda s: s.update(bits=8))
    with pytest.raises(CheckpointError, match=r"proj\.(scales|qzeros|g_idx) has the shape"):
        trace_folder(saved.folder)


@pytest.mark.parametrize(("make", "change", "message"), [
    (gptq, lambda s: s.update(bits=5), "GPTQ with bits 5 is not read; there are 2, 3, 4, 8"),
    (gptq, lambda s: s.update(checkpoint_format="marlin"), "the checkpoint_format marlin is not read; there are gptq, "),
    (gptq, lambda s: s.update(pack_dtype="int16"), "pack_dtype int16 is not read"),
    (gptq, lambda s: s.update(group_size=48), "group_size 48 does not divide its"),
    (awq, lambda s: s.update(version="gemv"), "AWQ of the version gemv is not read, only gemm"),
    (awq, lambda s: s.update(bits=3), "AWQ with bits 3 is not read, only 4"),
])  # fmt: skip
def test_settings_that_are_not_supported(make, change, message, tmp_path) -> None:
    saved = make(tmp_path / "model")
    set_quantization(saved.folder, change)
    with pytest.raises(UnsupportedError, match=message):
        trace_folder(saved.folder)


def test_packed_embeddings_with_an_order_are_refused(tmp_path) -> None:
    saved = gptq(tmp_path / "model", act_order=True, only="embed")
    with pytest.raises(UnsupportedError, match=r"embed_tokens.*: columns in an order of their own are for linear"):
        trace_folder(saved.folder)


def test_packed_embeddings(tmp_path) -> None:
    check(gptq(tmp_path / "model", symmetric=False, only="embed"), "u4")
