"""The settings of compressed-tensors: which modules have which scheme, and whether it can be read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tilewright.frontend.quantized.packed import Reading
from tilewright.ir.errors import CheckpointError, UnsupportedError

_STRATEGIES = ("tensor", "channel", "group", "block")


@dataclass(frozen=True)
class Scheme:
    """How the weights of a group of modules are kept. ``block``: rows and columns that share a scale (0: all).

    ``dynamic``: inputs are rounded to 8 bits at run time.
    """

    bits: int
    is_float: bool
    symmetric: bool
    strategy: str
    block: tuple[int, int]
    dynamic: bool


class Schemes:
    """The ``config_groups`` of a quantization_config."""

    def __init__(self, reading: Reading) -> None:
        self.reading, settings = reading, reading.settings
        self.groups = settings.get("config_groups")
        if not isinstance(self.groups, dict) or not all(isinstance(g, dict) for g in self.groups.values()):
            raise CheckpointError("quantization_config has no config_groups with their settings written out")
        for name in ("transform_config", "moe_sparsity_config"):
            if settings.get(name):
                raise UnsupportedError(f"quantization_config.{name} is not supported; use a checkpoint without it")
        if settings.get("kv_cache_scheme"):
            reading.note("kv_cache_scheme is left out: how caches are kept is an option of the pass kv-layout")

    def of(self, module: str) -> Scheme:
        """The scheme of a module that has quantized weights; raises UnsupportedError naming it and the setting."""
        group = self._group(module)
        if group is None:
            raise CheckpointError(f"{module} has quantized weights, and no config group of quantization_config is for it")
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise CheckpointError(f"{module} has quantized weights, and its config group says nothing of weights")
        if group.get("output_activations"):
            raise UnsupportedError(f"{module}: output_activations are not supported")
        bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
        symmetric = weights.get("symmetric", True) is not False
        if kind == "float" and not symmetric:
            raise UnsupportedError(f"{module}: weights of type float with symmetric false are not supported")
        if kind == "float" and bits != 8:
            raise UnsupportedError(f"{module}: weights of type float with {bits} bits are not supported, only with 8")
        if not isinstance(bits, int) or not 1 <= bits <= 8:
            raise UnsupportedError(f"{module}: weights with num_bits {bits} are not supported")
        strategy, block = self._strategy(module, weights)
        dynamic = self._activations(module, group.get("input_activations"))
        return Scheme(bits, kind == "float", symmetric, strategy, block, dynamic)

    def _group(self, module: str) -> Mapping[str, Any] | None:
        """The most particular group: one that names the module, then one whose pattern fits, then one for its class."""
        found: dict[int, Mapping[str, Any]] = {}
        for group in self.groups.values():
            for target in group.get("targets") or ():
                if target == module:
                    found.setdefault(0, group)
                elif target.startswith("re:") and re.match(target[3:], module):
                    found.setdefault(1, group)
                elif target == self.reading.classes.get(module, "Linear"):
                    found.setdefault(2, group)
        return found[min(found)] if found else None

    def _strategy(self, module: str, weights: Mapping[str, Any]) -> tuple[str, tuple[int, int]]:
        size = weights.get("group_size")
        default = "tensor" if size is None else "channel" if size == -1 else "group"
        strategy = weights.get("strategy") or default
        if strategy not in _STRATEGIES:
            known = ", ".join(_STRATEGIES)
            raise UnsupportedError(f"{module}: weights.strategy {strategy!r} is not supported, only {known}")
        if strategy == "block":
            block = weights.get("block_structure")
            block = [int(n) for n in block.split("x")] if isinstance(block, str) else block
            if not block or len(block) != 2 or min(block) < 1:
                raise CheckpointError(f"{module}: weights.block_structure is {block!r}, expected rows and columns")
            return strategy, (block[0], block[1])
        if strategy == "group" and (not isinstance(size, int) or size < 1):
            raise CheckpointError(f"{module}: weights.group_size is {size!r} with the strategy group")
        return strategy, {"tensor": (0, 0), "channel": (1, 0), "group": (1, size)}[strategy]

    def _activations(self, module: str, given: Mapping[str, Any] | None) -> bool:
        """Whether inputs are rounded to 8 bits; raises UnsupportedError for what is not done."""
        if not given:
            return False

        def refuse(setting: str) -> None:
            raise UnsupportedError(
                f"{module}: input_activations.{setting} is {given.get(setting)!r}, which is not supported\n"
                "  remedy: use a checkpoint with dynamic activations, a scale a token, or with weights alone quantized"
            )

        if given.get("dynamic", False) is not True:
            refuse("dynamic")
        if given.get("num_bits", 8) != 8:
            refuse("num_bits")
        if given.get("type", "int") == "float":
            self.reading.note("activations stay as they are: rounding them to 8-bit floats is left out")
            return False
        if given.get("symmetric", True) is False:
            refuse("symmetric")
        if given.get("strategy") not in ("token", None):
            refuse("strategy")
        return True
