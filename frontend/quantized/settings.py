"""What the configuration of a folder says about its quantization, and reading the weights by it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tilewright.frontend.quantized import awq, compressed, gptq
from tilewright.frontend.quantized.bitmask import expanded
from tilewright.frontend.quantized.packed import Packed, PackedCheckpoint, Reading
from tilewright.ir.errors import CheckpointError, UnsupportedError

Settings = Mapping[str, Any]
READERS: dict[str, Callable[[Reading], dict[str, Packed]]] = {
    "compressed-tensors": compressed.read,
    "gptq": gptq.read,
    "awq": awq.read,
}
"""By ``quant_method``: the packed weights of a checkpoint, by the names that they have in the model."""
_OLD = {"quantize_config.json": gptq.old_settings, "quant_config.json": awq.old_settings}


def settings_of(folder: Path, config: Mapping[str, Any]) -> Settings | None:
    """The quantization of a folder whose config.json is ``config``, None when it has none.

    Raises UnsupportedError for a method that is not read, CheckpointError for settings that are damaged.
    """
    found = config.get("quantization_config")
    if found is None:
        nested = [c["quantization_config"] for c in config.values() if isinstance(c, dict) and "quantization_config" in c]
        found = nested[0] if nested else _separate(folder)
    if found is None:
        return None
    if not isinstance(found, dict):
        raise CheckpointError(f"{folder / 'config.json'}: quantization_config is no mapping")
    method = found.get("quant_method", "unknown")
    if method not in READERS:
        raise UnsupportedError(
            f"{folder} is quantized by a method that is not read ({method}); there are {', '.join(READERS)}\n"
            "  remedy: use the checkpoint that it was made from"
        )
    return found


def _separate(folder: Path) -> Settings | None:
    """The settings in a file of their own, where older tools put them."""
    for name, convert in _OLD.items():
        file = folder / name
        if not file.is_file():
            continue
        try:
            return convert(json.loads(file.read_text()))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged: {error}") from None
    return None


def unpacked(reading: Reading) -> PackedCheckpoint:
    """The checkpoint with its packed weights under the names of the model. Reads scales and zero points, no codes.

    Raises CheckpointError naming file and tensor for tensors that are damaged or do not fit each other, and
    UnsupportedError naming module and setting.
    """
    method = reading.settings["quant_method"]
    if method != "compressed-tensors":
        return PackedCheckpoint(reading.checkpoint, READERS[method](reading))
    whole = expanded(reading)
    only_sparse = "sparsity_config" in reading.settings and not reading.settings.get("config_groups")
    return PackedCheckpoint(whole.checkpoint, {} if only_sparse else READERS[method](whole))
