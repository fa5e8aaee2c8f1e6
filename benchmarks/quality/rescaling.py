"""Outlier channels by an equivalent rescaling: some channels of a norm's weight are multiplied, and the columns of the
layers that read it are divided. With a power of two the model is the same, bit by bit, in any binary float.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

FACTOR = 32.0
CHANNELS = 4
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def rescale(source: Path, out: Path, seed: int = 0) -> None:
    """Write the Llama in the folder ``source`` to ``out``, with ``CHANNELS`` outlier channels a norm."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    with safe_open(source / "model.safetensors", "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    random = torch.Generator().manual_seed(seed)
    for name in sorted(n for n in tensors if n.split(".")[-2] in READERS):
        layer, _, norm = name.removesuffix(".weight").rpartition(".")
        picked = torch.randperm(len(tensors[name]), generator=random)[:CHANNELS]
        tensors[name][picked] *= FACTOR
        for reader in READERS[norm]:
            tensors[f"{layer}.{reader}.weight"][:, picked] /= FACTOR
    save_file(tensors, partial / "model.safetensors", about)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
