"""Folders that compressed-tensors wrote: the weights are bit for bit what the package makes of them."""

import json

import numpy as np
import pytest
import torch

from tests.quantized_checkpoints import Saved, compressed, rewrite, set_quantization
from tilewright.frontend import trace_folder
from tilewright.ir import CheckpointError, UnsupportedError, interpret, ops
from tilewright.ir.core import Env

DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
GATE = "model.layers.1.mlp.gate_proj"
ASYMMETRIC = {"symmetric": False}
GROUPS, CHANNEL, TENSOR = {"strategy": "group", "group_size": 32}, {"strategy": "channel"}, {"strategy": "tensor"}
BLOCK = {"strategy": "block", "block_structure": [16, 32]}
FP8 = {"num_bits": 8, "type": "float"}
CASES = {  # format, codes in the IR, QuantizationArgs
    "int4 groups": ("pack-quantized", "i4", {"num_bits": 4, **GROUPS}),
    "int4 groups asymmetric": ("pack-quantized", "u4", {"num_bits": 4, **GROUPS, "group_size": 16, **ASYMMETRIC}),
    "int4 channel": ("pack-quantized", "i4", {"num_bits": 4, **CHANNEL}),
    "int4 channel asymmetric": ("pack-quantized", "u4", {"num_bits": 4, **CHANNEL, **ASYMMETRIC}),
    "int8 groups": ("pack-quantized", "i8", {"num_bits": 8, **GROUPS}),
    "int8 groups asymmetric": ("pack-quantized", "u8", {"num_bits": 8, **GROUPS, **ASYMMETRIC}),
    "int2 groups": ("pack-quantized", "i2", {"num_bits": 2, **GROUPS}),
    "int3 groups": ("pack-quantized", "i3", {"num_bits": 3, **GROUPS}),
    "int5 channel asymmetric": ("pack-quantized", "u8", {"num_bits": 5, **CHANNEL, **ASYMMETRIC}),
    "int8 plain": ("int-quantized", "i8", {"num_bits": 8, **CHANNEL}),
    "int8 plain asymmetric": ("int-quantized", "u8", {"num_bits": 8, **CHANNEL, **ASYMMETRIC}),
    "int8 tensor": ("int-quantized", "i8", {"num_bits": 8, **TENSOR}),
    "int4 plain": ("naive-quantized", "i4", {"num_bits": 4, **GROUPS}),
    "fp8 channel": ("float-quantized", "f8e4m3", {**FP8, **CHANNEL}),
    "fp8 tensor": ("float-quantized", "f8e4m3", {**FP8, **TENSOR}),
    "fp8 block": ("naive-quantized", "f8e4m3", {**FP8, **BLOCK}),
}


def dequantized(module, name: str) -> np.ndarray:
    """What the IR makes of a packed weight."""
    op = next(op for op in module.ops(ops.Dequantize) if getattr(op.codes, "name", "").startswith(f"{name}.weight."))
    return op.evaluate(Env({}), *(v and v.load() for v in op.operand_slots()))


def interpreted(module, saved: Saved) -> np.ndarray:
    return interpret(module, "forward", {"input_ids": saved.inputs.numpy()})[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_those_of_the_package(case: str, scales: torch.dtype, tmp_path) -> None:
    kind, codes, args = CASES[case]
    saved = compressed(tmp_path / "model", kind, scales, **args)
    module = trace_folder(saved.folder)
    assert module.weights[f"{GATE}.weight.{codes}"].dtype.value == codes
    assert len(list(module.ops(ops.Dequantize))) == len(saved.dense) == 14
    for name, want in saved.dense.items():
        got = torch.from_numpy(dequantized(module, name.removesuffix(".weight")))
        assert torch.equal(got.to(want.dtype), want)  # the package rounds to the type of the scales
    if scales is torch.float32:
        np.testing.assert_allclose(interpreted(module, saved), saved.logits().numpy(), rtol=1e-4, atol=1e-4)


def test_weights_are_lazy_and_views_are_released(tmp_path) -> None:
    saved = compressed(tmp_path / "model", "pack-quantized", num_bits=4, strategy="group", group_size=32)
    weight = trace_folder(saved.folder).weights[f"{GATE}.weight.i4"]
    first = weight.load()
    weight.release()
    np.testing.assert_array_equal(weight.load(), first)


def test_dynamic_activations_are_rounded_once_for_the_layers_that_share_them(tmp_path) -> None:
    saved = compressed(tmp_path / "model", "int-quantized", num_bits=8, strategy="channel", activations=DYNAMIC)
    module = trace_folder(saved.folder)
    assert len(list(module.ops(ops.Quantize))) == 2 * 4
    got, want = interpreted(module, saved), saved.logits().numpy()
    assert 1e-4 < np.linalg.norm(got - want) / np.linalg.norm(want) < 0.05


def test_activations_in_8_bit_floats_stay_and_it_is_noted(tmp_path) -> None:
    saved = compressed(tmp_path / "model", "float-quantized", num_bits=8, type="float", strategy="channel",
                       activations={**DYNAMIC, "type": "float"})  # fmt: skip
    module = trace_folder(saved.folder)
    assert not list(module.ops(ops.Quantize))
    [note] = json.loads(module.meta["notes"])
    assert note == "activations stay as they are: rounding them to 8-bit floats is left out"


def test_the_more_particular_group_of_settings_counts(tmp_path) -> None:
    saved = compressed(tmp_path / "model", "pack-quantized", num_bits=4, strategy="group", group_size=32)

    def particular(settings):
        right = settings["config_groups"]["group_0"]
        wrong = {**right, "weights": {**right["weights"], "group_size": 16}}
        right = {**right, "targets": ["re:.*mlp.*", "re:.*self_attn.*"]}
        settings["config_groups"] = {"a": wrong, "b": right}

    set_quantization(saved.folder, particular)
    trace_folder(saved.folder)


# ---- folders that are refused ----------------------------------------------------------------------------------------


def weights_of(settings):
    return settings["config_groups"]["group_0"]["weights"]


@pytest.fixture
def folder(tmp_path):
    return compressed(tmp_path / "model", "pack-quantized", num_bits=4, **GROUPS, **ASYMMETRIC).folder


def changed(name, change):
    """A change of one tensor of a layer."""
    return lambda tensors: tensors.update({f"{GATE}.{name}": change(tensors[f"{GATE}.{name}"])})


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop(f"{GATE}.weight_scale"), rf"lacks {GATE}\.weight_scale; of this layer it has weight_packed, w"),
    (lambda t: t.pop(f"{GATE}.weight_packed"), rf"lacks {GATE}\.weight; of this layer it has weight_scale"),
    (lambda t: t.pop(f"{GATE}.weight_zero_point"), rf"lacks {GATE}\.weight_zero_point"),
    (lambda t: t.pop(f"{GATE}.weight_shape"), rf"lacks {GATE}\.weight_shape"),
    (changed("weight_scale", lambda t: t[:, :1]),
     rf"model\.safetensors: {GATE}\.weight_scale has the shape \[128, 1\], expected \[128, 2\] \(groups of 32\)"),
    (changed("weight_scale", lambda t: t / 0), rf"{GATE}\.weight_scale has NaN or infinity"),
    (changed("weight_packed", lambda t: t[:, :-1]),
     rf"tensors: {GATE}\.weight_packed has the shape \[128, 7\], expected \[128, 8\] \(64 codes of 4 bits a row\)"),
    (changed("weight_packed", lambda t: t.float()), r"weight_packed is F32, expected I32"),
    (changed("weight_zero_point", lambda t: t[:-1]), r"expected \[16, 2\]"),
])  # fmt: skip
def test_tensors_that_do_not_fit(change, message, folder) -> None:
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        trace_folder(folder)


def test_a_file_that_ends_early(folder) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated: "):
        trace_folder(folder)


def inputs(**changes):
    """A change of the settings of activations."""
    return lambda s: s["config_groups"]["group_0"].update(input_activations=DYNAMIC | changes)


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s.update(quant_method="bitsandbytes"), r"not read \(bitsandbytes\); there are compressed-tensors, gptq"),
    (lambda s: s.update(format="nvfp4-pack-quantized"), r"the format nvfp4-pack-quantized is not read; there are"),
    (lambda s: s.update(transform_config={"config_groups": {"u": {}}}), r"quantization_config\.transform_config is not"),
    (lambda s: weights_of(s).update(group_size=48), r"proj: groups of 48 do not divide"),
    (lambda s: weights_of(s).update(strategy="tensor_group"), r"proj: weights\.strategy 'tensor_group' is not supported"),
    (lambda s: s["config_groups"]["group_0"].update(output_activations=DYNAMIC), r"proj: output_activations are not"),
    (inputs(dynamic=False), r"proj: input_activations\.dynamic is False, which is not supported"),
    (inputs(strategy="tensor"), r"proj: input_activations\.strategy is 'tensor'"),
    (inputs(num_bits=4), r"proj: input_activations\.num_bits is 4"),
    (inputs(symmetric=False), r"proj: input_activations\.symmetric is False"),
])  # fmt: skip
def test_settings_that_are_not_supported(change, message, folder) -> None:
    set_quantization(folder, change)
    with pytest.raises(UnsupportedError, match=message):
        trace_folder(folder)


def test_modules_without_settings(folder) -> None:
    set_quantization(folder, lambda s: s["config_groups"]["group_0"].update(targets=["re:.*mlp.*"]))
    with pytest.raises(CheckpointError, match=r"self_attn\.k_proj has quantized weights, and no config group"):
        trace_folder(folder)


def test_settings_of_the_cache_are_noted(folder) -> None:
    set_quantization(folder, lambda s: s.update(kv_cache_scheme=DYNAMIC))
    assert "kv_cache_scheme is left out" in json.loads(trace_folder(folder).meta["notes"])[0]
